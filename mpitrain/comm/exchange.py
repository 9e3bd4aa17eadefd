"""How a data group sums gradients and spreads weights: one interface, and its form in messages between all ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from mpitrain.comm import ring
from mpitrain.comm.buckets import Bucket
from mpitrain.comm.buffers import Transport
from mpitrain.runtime.agree import Comm
from mpitrain.split import aligned_part

Collective = Callable[[Comm, torch.Tensor, Transport], None]
RowCollective = Callable[[Comm, torch.Tensor, torch.Tensor, Transport], torch.Tensor | None]


class Exchange(ABC):
    """The memory of the buckets of a data group; every rank of it makes the same calls in the same order.

    In a step gradients are added up in `bucket.gradients`, then `reduce` is called for every bucket; then a vote of all
    ranks, after which owners write their part of the weights; then `spread`. Nobody may write weights, or gradients of
    the next step, before that vote: in shared memory others still compute with the one and sum up the other.

    The buckets have their memory once the exchange is made, and whole weights after its first `spread`.
    """

    def __init__(self, transport: Transport, buckets: Sequence[Bucket]) -> None:
        """Exchange what `buckets` hold."""
        self.buckets = buckets
        self.transport = transport
        # Reductions run in a thread which shares cores with the backward pass: it must never spin.
        self.patient = replace(transport, patient=True)

    @abstractmethod
    def reduce(self, number: int) -> None:
        """Sum a bucket's gradients over all ranks into the owners' `reduced` (collective)."""

    @abstractmethod
    def spread(self) -> None:
        """Return once every rank sees the weights that the owners have written (collective)."""

    def close(self) -> None:
        """Give memory and communicators back; parameters are empty and pieces dangle after this (collective)."""
        for bucket in self.buckets:
            bucket.detach()


class MessageExchange(Exchange):
    """Every rank has its own copy of everything; sums and weights travel in messages."""

    def __init__(
        self,
        data_axis: Comm,
        transport: Transport,
        buckets: Sequence[Bucket],
        dtype: torch.dtype,
        *,
        reduce_scatter: Collective = ring.reduce_scatter,
        all_gather: Collective = ring.all_gather,
        reduce_rows: RowCollective | None = None,
    ) -> None:
        """Give the buckets private memory; rank i owns chunk i, where a reduce-scatter leaves its sum (collective).

        Args:
            data_axis: the data group; its duplicate is used.
            transport: device and manner of waiting.
            buckets: without memory yet.
            dtype: of the weights.
            reduce_scatter: in place on flat tensors, cut as `split.aligned_part` does.
            all_gather: likewise.
            reduce_rows: as `rows.reduce_scatter`; None has tables of embeddings treated like anything else.
        """
        super().__init__(transport, buckets)
        self._comm = Comm(data_axis.Dup())
        self._reduce_scatter, self._all_gather, self._reduce_rows = reduce_scatter, all_gather, reduce_rows
        for bucket in buckets:
            bucket.num_rows = bucket.num_rows if reduce_rows is not None else 0
            weights = torch.zeros(bucket.size, dtype=dtype, device=transport.device)
            gradients = torch.zeros(bucket.size, device=transport.device)
            owned = aligned_part(self._comm.rank, bucket.size, self._comm.size)
            bucket.attach(weights, gradients, owned, gradients[slice(*owned)])

    def reduce(self, number: int) -> None:
        """Reduce-scatter in place."""
        bucket = self.buckets[number]
        if not bucket.num_rows or self._reduce_rows is None:
            self._reduce_scatter(self._comm, bucket.gradients, self.patient)
            return
        touched = bucket.blocks_of(bucket.touched_rows().to(self.transport.device))
        arrived = self._reduce_rows(self._comm, bucket.gradients, touched, self.patient)
        bucket.spoil(arrived)

    def spread(self) -> None:
        """All-gather in place."""
        for bucket in self.buckets:
            self._all_gather(self._comm, bucket.weights, self.transport)

    def close(self) -> None:
        """Give the communicator back too."""
        super().close()
        self._comm.Free()
