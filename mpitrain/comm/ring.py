"""Our own reduce-scatter, all-gather and all-reduce: a ring of point-to-point messages.

With k ranks the flat tensor is cut into k chunks (`split.aligned_part`; some may be empty). In reduce-scatter each
rank passes a partial sum to its right neighbour k - 1 times, so that rank r ends with the whole sum of chunk r; in
all-gather finished chunks go round the same way. Each rank sends 2 (k - 1) / k of the tensor, which is the minimum
(Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009, section 3).

    chunk sent by rank r at hop h:   reduce-scatter r - h - 1,   all-gather r - h      (modulo k)

Chunks travel in segments: one is sent on as soon as it has been added to, while the next is still on its way, so that
the link never waits for an addition. Within a chunk segments keep their order, as messages between two ranks do.

A chunk is summed once, by hops in a fixed order, then copied: every rank holds the same bits.

Requests are not persistent. Made once and kept with the tensor, they saved 10 % at 64 and 256 KiB between 2 ranks on
2 cores, 5 % at 1 MiB, and at 4 MiB nothing that could be told from noise; buckets are larger than that.
"""

from __future__ import annotations

import torch

from mpitrain.comm.buffers import Transport
from mpitrain.comm.segments import open_boxes
from mpitrain.comm.wire import Wire
from mpitrain.runtime.agree import Comm
from mpitrain.split import aligned_part

SEGMENT = 1 << 18  # elements; 1 MiB of fp32: long against a message's latency, short against a chunk


def all_reduce(comm: Comm, flat: torch.Tensor, transport: Transport, wire_dtype: torch.dtype | None = None) -> None:
    """Sum a flat contiguous tensor over all ranks in place, the same bits everywhere (collective).

    Args:
        comm: the ring, in rank order.
        flat: [n] fp32, fp16, bf16 or any dtype that torch adds; n may be 0 or less than the number of ranks.
        transport: how to wait, and how device memory travels.
        wire_dtype: dtype of everything on the way, if not the tensor's own; additions stay in the tensor's own.

    Raises:
        ValueError: the tensor is not flat and contiguous.
    """
    reduce_scatter(comm, flat, transport, Wire(wire_dtype) if wire_dtype is not None else None)
    if wire_dtype in (None, flat.dtype):
        all_gather(comm, flat, transport)
        return
    wired = torch.empty_like(flat, dtype=wire_dtype)
    own = slice(*aligned_part(comm.rank, flat.numel(), comm.size))
    wired[own].copy_(flat[own])
    all_gather(comm, wired, transport)
    flat.copy_(wired)  # the own chunk too, or its bits would differ from the others'


def reduce_scatter(comm: Comm, flat: torch.Tensor, transport: Transport, wire: Wire | None = None) -> None:
    """Leave the sum over ranks in this rank's chunk; other chunks are overwritten (collective).

    Args:
        comm: the ring, in rank order.
        flat: as for `all_reduce`.
        transport: likewise.
        wire: rounds what is sent; nothing is rounded if None. Additions stay in the tensor's own dtype.
    """
    _check(flat)
    if comm.size == 1:
        return
    chunks = _chunks(comm, flat)
    targets = [s for hop in range(comm.size - 1) for s in _segments(chunks[(comm.rank - hop - 2) % comm.size])]
    num_own = len(_segments(chunks[comm.rank]))  # they come last, and stay
    outbox, inbox = open_boxes(comm, transport, targets, wire.dtype if wire else flat.dtype)
    for segment in _segments(chunks[comm.rank - 1]):
        outbox.send(wire.round(flat, segment) if wire else segment)
    for number, target in enumerate(targets):
        target += inbox.next()
        if number < len(targets) - num_own:
            outbox.send(wire.round(flat, target) if wire else target)
    outbox.wait()


def all_gather(comm: Comm, flat: torch.Tensor, transport: Transport) -> None:
    """Fill every chunk from the rank that owns it (collective)."""
    _check(flat)
    if comm.size == 1:
        return
    chunks = _chunks(comm, flat)
    targets = [s for hop in range(comm.size - 1) for s in _segments(chunks[(comm.rank - hop - 1) % comm.size])]
    num_last = len(_segments(chunks[(comm.rank + 1) % comm.size]))  # the right neighbour's own: it has them
    outbox, inbox = open_boxes(comm, transport, targets, flat.dtype, in_place=True)
    for segment in _segments(chunks[comm.rank]):
        outbox.send(segment)
    for number, target in enumerate(targets):
        inbox.next()
        if number < len(targets) - num_last:
            outbox.send(target)
    outbox.wait()


def _check(flat: torch.Tensor) -> None:
    if flat.dim() != 1 or not flat.is_contiguous():
        raise ValueError(f"a ring takes a flat contiguous tensor, found shape {tuple(flat.shape)}")


def _chunks(comm: Comm, flat: torch.Tensor) -> list[torch.Tensor]:
    return [flat[slice(*aligned_part(index, flat.numel(), comm.size))] for index in range(comm.size)]


def _segments(chunk: torch.Tensor) -> list[torch.Tensor]:
    """Pieces of equal size, the last one shorter; none of an empty chunk, so it costs no message."""
    return [chunk[start : start + SEGMENT] for start in range(0, chunk.numel(), SEGMENT)]
