"""How a data group sums gradients and spreads weights: one interface, and its form in messages between all ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace

import torch

from mpitrain.comm import native, ring
from mpitrain.comm.buckets import Bucket
from mpitrain.comm.buffers import Transport
from mpitrain.runtime.agree import Comm
from mpitrain.split import part


class Exchange(ABC):
    """Owns a duplicate of the data axis; every rank of it makes the same calls in the same order.

    In a step: `begin`, then gradients are added up in `bucket.gradients`, then `reduce` for every bucket; then a vote
    of all ranks, after which owners write their part of the weights; then `spread`. Nobody may write weights before
    that vote: in shared memory they are the very weights with which another rank still computes.
    """

    def __init__(self, data_axis: Comm, transport: Transport) -> None:
        """Take part in the data group (collective)."""
        self.comm = Comm(data_axis.Dup())
        self.transport = transport
        # Reductions run in a thread which shares cores with the backward pass: it must never spin.
        self.patient = replace(transport, patient=True)
        self.buckets: Sequence[Bucket] = ()

    @abstractmethod
    def adopt(self, buckets: Sequence[Bucket], dtype: torch.dtype) -> None:
        """Give the buckets their memory, weights in `dtype`; they are whole after the first `spread` (collective)."""

    def begin(self) -> None:
        """Return once this rank's gradients may be overwritten, all zero."""
        for bucket in self.buckets:
            bucket.gradients.zero_()

    @abstractmethod
    def reduce(self, number: int) -> None:
        """Sum a bucket's gradients over all ranks into the owners' `reduced` (collective)."""

    @abstractmethod
    def spread(self) -> None:
        """Return once every rank sees the weights that the owners have written (collective)."""

    def close(self) -> None:
        """Give memory and communicator back (collective)."""
        for bucket in self.buckets:
            bucket.detach()
        self.buckets = ()
        self.comm.Free()


class MessageExchange(Exchange):
    """Every rank has its own copy of everything; sums and weights go round a ring, or through MPI's own collectives."""

    def __init__(
        self, data_axis: Comm, transport: Transport, *, use_native: bool = False, wire_dtype: torch.dtype | None = None
    ) -> None:
        """Exchange by our ring, with partial sums in `wire_dtype` if given, or by MPI's collectives."""
        super().__init__(data_axis, transport)
        self._use_native, self._wire_dtype = use_native, wire_dtype

    def adopt(self, buckets: Sequence[Bucket], dtype: torch.dtype) -> None:
        """Private memory; rank i owns the i-th of equal parts, so that a ring leaves each sum with its owner."""
        self.buckets = buckets
        for bucket in buckets:
            weights = torch.empty(bucket.size, dtype=dtype, device=self.transport.device)
            gradients = torch.zeros(bucket.size, device=self.transport.device)
            owned = part(self.comm.rank, bucket.size, self.comm.size)
            bucket.attach(weights, gradients, owned, gradients[slice(*owned)])

    def reduce(self, number: int) -> None:
        """Reduce-scatter in place."""
        bucket = self.buckets[number]
        if self._use_native:
            native.reduce_scatter(self.comm, bucket.gradients, self.patient)
        else:
            ring.reduce_scatter(self.comm, bucket.gradients, self.patient, self._wire_dtype)

    def spread(self) -> None:
        """All-gather in place."""
        all_gather = native.all_gather if self._use_native else ring.all_gather
        for bucket in self.buckets:
            all_gather(self.comm, bucket.weights, self.transport)
