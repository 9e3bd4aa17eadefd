"""How a data group sums gradients and spreads weights: one interface, and its form in messages between all ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from mpitrain.comm import ring, rows
from mpitrain.comm.buckets import Bucket, StateSlice
from mpitrain.comm.buffers import Transport
from mpitrain.comm.segments import Landing
from mpitrain.comm.wire import Wire
from mpitrain.runtime.agree import Comm
from mpitrain.split import aligned_part

Run = Callable[[], None]
PlanReduceScatter = Callable[[Comm, torch.Tensor, Transport, Wire | None, Landing], Run]
PlanAllGather = Callable[[Comm, torch.Tensor, Transport], Run]


class Exchange(ABC):
    """The memory of the buckets of a data group; every rank of it makes the same calls in the same order.

    In a step gradients are added up in `bucket.gradients`, then `reduce` is called for every bucket; then a vote of all
    ranks, after which owners write their part of the weights; then `spread`. Nobody may write weights, or gradients of
    the next step, before that vote: in shared memory others still compute with the one and sum up the other.

    The buckets have their memory once the exchange is made, and whole weights after its first `spread`.
    """

    name: str  # what it uses, in a word or two
    wants_squares = True  # `reduce` leaves `bucket.squares` where that costs little

    def __init__(
        self,
        transport: Transport,
        buckets: Sequence[Bucket],
        *,
        wire_dtype: torch.dtype | None,
        error_feedback: bool,
        overlapped: bool,
    ) -> None:
        """Exchange what `buckets` hold; `overlapped` if `reduce` is called in a thread beside the backward pass."""
        self.overlapped = overlapped
        self._wire_dtype, self._error_feedback = wire_dtype, error_feedback
        self.buckets = buckets
        self.transport = transport
        self.reducing = replace(transport, background=overlapped)
        self._wires: list[Wire | None] = []  # of each bucket

    def _add_wire(self, comm: Comm, start: int, size: int) -> Wire | None:
        """The wire of the next bucket, for its elements from `start` on; None if nothing is rounded."""
        wire = None
        if self._wire_dtype is not None:
            feedback = self._error_feedback and comm.size > 1
            device = self.transport.device
            wire = Wire(self._wire_dtype, size, start=start, feedback=feedback, device=device)
        self._wires.append(wire)
        return wire

    @abstractmethod
    def reduce(self, number: int) -> None:
        """Sum a bucket's gradients over all ranks into the owners' `reduced` (collective)."""

    def take_wire_errors(self) -> list[tuple[float, float]]:
        """Sums of squares, by bucket, of what this rank's roundings have lost in a step and of the sums it owns."""
        return [
            (wire.take_squared_error(), float(bucket.reduced.double().square().sum()))
            for bucket, wire in zip(self.buckets, self._wires, strict=True)
            if wire is not None
        ]

    def residuals(self, rank: int) -> Iterator[StateSlice]:
        """What roundings have lost and is still to be sent: state that nobody but this rank has."""
        for bucket, wire in zip(self.buckets, self._wires, strict=True):
            if wire is not None and wire.residual is not None:
                yield from bucket.slices_of(f"residual-{rank}", wire.start, wire.residual)

    @property
    @abstractmethod
    def comms(self) -> list[Comm]:
        """In which this rank may wait for others."""

    @abstractmethod
    def spread(self) -> None:
        """Return once every rank sees the weights that the owners have written (collective)."""

    def close(self) -> None:
        """Give memory and communicators back; parameters are empty and pieces dangle after this (collective)."""
        for bucket in self.buckets:
            bucket.detach()


class MessageExchange(Exchange):
    """Every rank has its own copy of everything; sums and weights travel in messages."""

    name = "messages"

    def __init__(
        self,
        data_axis: Comm,
        transport: Transport,
        buckets: Sequence[Bucket],
        dtype: torch.dtype,
        *,
        reduce_scatter: PlanReduceScatter = ring.ReduceScatter,
        all_gather: PlanAllGather = ring.AllGather,
        by_rows: bool = True,
        wire_dtype: torch.dtype | None = None,
        error_feedback: bool = False,
        overlapped: bool = True,
    ) -> None:
        """Give the buckets private memory; rank i owns chunk i, where a reduce-scatter leaves its sum (collective).

        Args:
            data_axis: the data group; its duplicate is used.
            transport: device and manner of waiting.
            buckets: without memory yet.
            dtype: of the weights.
            reduce_scatter: gives what sums a flat tensor in place, cut as `split.aligned_part` does.
            all_gather: likewise.
            by_rows: tables of embeddings may be summed by rows instead.
            wire_dtype: of partial sums in messages, if not fp32; of the ring only.
            error_feedback: send what rounding has lost the next time.
            overlapped: `reduce` is called in a thread beside the backward pass.
        """
        super().__init__(
            transport, buckets, wire_dtype=wire_dtype, error_feedback=error_feedback, overlapped=overlapped
        )
        self._comm = Comm(data_axis.Dup())
        self._sums: list[Run] = []
        self._gathers: list[Run] = []
        landing = Landing()
        for bucket in buckets:
            if not by_rows:
                bucket.without_rows()
            wire = self._add_wire(self._comm, 0, bucket.size)
            weights = torch.zeros(bucket.size, dtype=dtype, device=transport.device)
            gradients = torch.zeros(bucket.size, device=transport.device)
            owned = aligned_part(self._comm.rank, bucket.size, self._comm.size)
            bucket.attach(weights, gradients, owned, gradients[slice(*owned)])
            self._sums.append(reduce_scatter(self._comm, gradients, self.reducing, wire, landing))
            self._gathers.append(all_gather(self._comm, weights, transport))

    @property
    def comms(self) -> list[Comm]:
        """One of its own."""
        return [self._comm]

    def reduce(self, number: int) -> None:
        """Reduce-scatter in place."""
        bucket = self.buckets[number]
        if not bucket.num_rows:
            self._sums[number]()
            return
        touched, wire = bucket.blocks_of(bucket.touched_rows()), self._wires[number]
        bucket.spoil(
            rows.reduce_scatter(self._comm, bucket.gradients, touched, self.reducing, wire, self._sums[number])
        )

    def spread(self) -> None:
        """All-gather in place."""
        for gather in self._gathers:
            gather()

    def close(self) -> None:
        """Give the communicator back too."""
        super().close()
        self._sums, self._gathers = [], []
        self._comm.Free()
