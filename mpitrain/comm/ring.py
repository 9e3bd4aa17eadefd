"""Our own reduce-scatter, all-gather and all-reduce: a ring of point-to-point messages.

With k ranks the flat tensor is cut into k chunks (`split.aligned_part`; some may be empty). In reduce-scatter each
rank passes a partial sum to its right neighbour k - 1 times, so that rank r ends with the whole sum of chunk r; in
all-gather finished chunks go round the same way. Each rank sends 2 (k - 1) / k of the tensor, which is the minimum
(Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009, section 3).

    chunk sent by rank r at hop h:   reduce-scatter r - h - 1,   all-gather r - h      (modulo k)

Chunks travel in segments: one is sent on as soon as it has been added to, while the next is still on its way, so that
the link never waits for an addition. Within a chunk segments keep their order, as messages between two ranks do. Two
ranks of one host have no link, only their cores, which cannot copy and add at once: there chunks travel whole.

A chunk is summed once, by hops in a fixed order, then copied: every rank holds the same bits.

What does not change from step to step, chunks, segments and their addresses, is laid out once: between 2 ranks that is
half of the time of a short ring. Requests are not persistent: that saved another 10 % at 64 and 256 KiB between 2 ranks
on 2 cores, 5 % at 1 MiB, and at 4 MiB nothing that could be told from noise; buckets are larger than that.
"""

from __future__ import annotations

import torch

from mpitrain.comm.buffers import MAX_MESSAGE, Transport
from mpitrain.comm.segments import Landing, Part, Swap, open_boxes
from mpitrain.comm.wire import Wire
from mpitrain.runtime.agree import Comm
from mpitrain.split import aligned_part

SEGMENT = 1 << 18  # elements; 1 MiB of fp32: long against a message's latency, short against a chunk
CROWDED_SEGMENT = 1 << 19  # where a rank that waits for a segment gives its core away, and has to get it back


class AllReduce:
    """Sums a flat contiguous tensor over all ranks in place when called, the same bits everywhere (collective)."""

    def __init__(
        self, comm: Comm, flat: torch.Tensor, transport: Transport, wire_dtype: torch.dtype | None = None
    ) -> None:
        """Lay out what a call does.

        Args:
            comm: the ring, in rank order.
            flat: [n] fp32, fp16, bf16 or any dtype that torch adds; n may be 0 or less than the number of ranks.
            transport: how to wait, and how device memory travels.
            wire_dtype: of everything on the way, if not the tensor's own; additions stay in the tensor's own.

        Raises:
            ValueError: the tensor is not flat and contiguous.
        """
        self._flat = flat
        self._wired = flat if wire_dtype in (None, flat.dtype) else torch.empty_like(flat, dtype=wire_dtype)
        self._own = slice(*aligned_part(comm.rank, flat.numel(), comm.size))
        wire = None if self._wired is flat else Wire(self._wired.dtype)
        self._reduce_scatter = ReduceScatter(comm, flat, transport, wire)
        self._all_gather = AllGather(comm, self._wired, transport)

    def __call__(self) -> None:
        """Run."""
        self._reduce_scatter()
        if self._wired is not self._flat:
            self._wired[self._own].copy_(self._flat[self._own])
        self._all_gather()
        if self._wired is not self._flat:
            self._flat.copy_(self._wired)  # the own chunk too, or its bits would differ from the others'


class ReduceScatter:
    """Leaves the sum over ranks in this rank's chunk when called; other chunks are overwritten (collective)."""

    def __init__(
        self,
        comm: Comm,
        flat: torch.Tensor,
        transport: Transport,
        wire: Wire | None = None,
        landing: Landing | None = None,
    ) -> None:
        """Lay out what a call does.

        Args:
            comm: the ring, in rank order.
            flat: as for `AllReduce`.
            transport: likewise.
            wire: rounds what is sent; nothing is rounded if None. Additions stay in the tensor's own dtype.
            landing: buffers to share with others that are never called at the same time.
        """
        self._flat, self._wire = flat, wire
        landing = landing or Landing()
        self._swap = None
        on_cores = transport.one_host and transport.device.type == "cpu"
        if on_cores and wire is None and _may_swap(comm, flat, transport):
            self._own, other = _halves(comm, flat)
            self._landed = landing.buffers(len(self._own), flat.dtype, transport)[0][: len(self._own)]
            self._swap = Swap(comm, transport, Part.of(other), Part.of(self._landed))
            return
        chunks = _cut(comm, flat, crowded=transport.patient)
        self._first = chunks[comm.rank - 1]
        self._targets = [part for hop in range(comm.size - 1) for part in chunks[(comm.rank - hop - 2) % comm.size]]
        self._num_forwarded = len(self._targets) - len(chunks[comm.rank])  # the own ones come last, and stay
        self._alone = comm.size == 1
        dtype = wire.dtype if wire is not None else flat.dtype
        self._outbox, self._inbox = open_boxes(comm, transport, self._targets, dtype, landing)

    def __call__(self) -> None:
        """Run."""
        if self._swap:
            self._swap()
            self._own.add_(self._landed)
            return
        if self._alone:
            return
        self._inbox.begin()
        for part in self._first:
            self._send(part)
        for number, part in enumerate(self._targets):
            part.tensor.add_(self._inbox.next())
            if number < self._num_forwarded:
                self._send(part)
        self._outbox.wait()

    def _send(self, part: Part) -> None:
        if self._wire is not None:
            part = Part.of(self._wire.round(self._flat, part.tensor))
        self._outbox.send(part)


class AllGather:
    """Fills every chunk from the rank that owns it when called (collective)."""

    def __init__(self, comm: Comm, flat: torch.Tensor, transport: Transport) -> None:
        """Lay out what a call does; arguments are as for `ReduceScatter`."""
        self._swap = None
        if _may_swap(comm, flat, transport):  # nothing is forwarded or added: there is nothing to cut for
            own, other = _halves(comm, flat)
            self._swap = Swap(comm, transport, Part.of(own), Part.of(other))
            return
        chunks = _cut(comm, flat, crowded=transport.patient)
        self._own = chunks[comm.rank]
        self._targets = [part for hop in range(comm.size - 1) for part in chunks[(comm.rank - hop - 1) % comm.size]]
        # The right neighbour's own chunk comes last: it has it.
        self._num_forwarded = len(self._targets) - len(chunks[(comm.rank + 1) % comm.size])
        self._alone = comm.size == 1
        self._outbox, self._inbox = open_boxes(comm, transport, self._targets, flat.dtype)

    def __call__(self) -> None:
        """Run."""
        if self._swap:
            self._swap()
            return
        if self._alone:
            return
        self._inbox.begin()
        for part in self._own:
            self._outbox.send(part)
        for number, part in enumerate(self._targets):
            self._inbox.next()
            if number < self._num_forwarded:
                self._outbox.send(part)
        self._outbox.wait()


def _may_swap(comm: Comm, flat: torch.Tensor, transport: Transport) -> bool:
    """Whether a chunk may travel as one message each way."""
    return comm.size == 2 and not transport.staged and flat.nbytes <= MAX_MESSAGE


def _halves(comm: Comm, flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The own chunk and the other's."""
    own, other = (flat[slice(*aligned_part(rank, flat.numel(), 2))] for rank in (comm.rank, 1 - comm.rank))
    return own, other


def _cut(comm: Comm, flat: torch.Tensor, *, crowded: bool) -> list[list[Part]]:
    """Each rank's chunk in segments of equal size, the last one shorter; an empty chunk costs no message."""
    length = CROWDED_SEGMENT if crowded else SEGMENT
    if flat.dim() != 1 or not flat.is_contiguous():
        raise ValueError(f"a ring takes a flat contiguous tensor, found shape {tuple(flat.shape)}")
    bounds = [aligned_part(index, flat.numel(), comm.size) for index in range(comm.size)]
    return [
        [Part.of(flat[begin : min(begin + length, stop)]) for begin in range(start, stop, length)]
        for start, stop in bounds
    ]
