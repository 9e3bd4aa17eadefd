"""Our own reduce-scatter, all-gather and all-reduce: a ring of point-to-point messages.

With k ranks the flat tensor is cut into k chunks (`split.aligned_part`; some may be empty). In reduce-scatter each
rank passes a partial sum to its right neighbour k - 1 times, so that rank r ends with the whole sum of chunk r; in
all-gather finished chunks go round the same way. Each rank sends 2 (k - 1) / k of the tensor, which is the minimum
(Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009, section 3).

    chunk sent by rank r at hop h:   reduce-scatter r - h - 1,   all-gather r - h      (modulo k)

Chunks travel in segments: one is sent on as soon as it has been added to, while the next is still on its way, so that
the link never waits for an addition. Within a chunk segments keep their order, as messages between two ranks do.

A chunk is summed once, by hops in a fixed order, then copied: every rank holds the same bits.
"""

from __future__ import annotations

from collections import deque

import torch
from mpi4py import MPI

from mpitrain.comm.buffers import Transport, memory
from mpitrain.runtime.agree import Comm
from mpitrain.split import aligned_part

TAG = 7
SEGMENT = 1 << 18  # elements; 1 MiB of fp32: long against a message's latency, short against a chunk
RECEIVES_AHEAD = 4  # receives posted before their segment is due


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
    reduce_scatter(comm, flat, transport, wire_dtype)
    if wire_dtype in (None, flat.dtype):
        all_gather(comm, flat, transport)
        return
    wired = torch.empty_like(flat, dtype=wire_dtype)
    own = slice(*aligned_part(comm.rank, flat.numel(), comm.size))
    wired[own].copy_(flat[own])
    all_gather(comm, wired, transport)
    flat.copy_(wired)  # the own chunk too, or its bits would differ from the others'


def reduce_scatter(comm: Comm, flat: torch.Tensor, transport: Transport, wire_dtype: torch.dtype | None = None) -> None:
    """Leave the sum over ranks in this rank's chunk; other chunks are overwritten (collective)."""
    _check(flat)
    if comm.size == 1:
        return
    host = transport.host(flat)
    if host is not flat:
        host.copy_(flat)
    chunks = _chunks(comm, host)
    targets = [s for hop in range(comm.size - 1) for s in _segments(chunks[(comm.rank - hop - 2) % comm.size])]
    num_own = len(_segments(chunks[comm.rank]))  # they come last, and stay
    inbox = _Inbox(comm, transport, targets, wire_dtype or host.dtype)
    outbox = _Outbox(comm, transport, wire_dtype or host.dtype)
    for segment in _segments(chunks[comm.rank - 1]):
        outbox.send(segment)
    for number, target in enumerate(targets):
        target += inbox.next()
        if number < len(targets) - num_own:
            outbox.send(target)
    outbox.wait()
    if host is not flat:
        own = slice(*aligned_part(comm.rank, flat.numel(), comm.size))
        flat[own].copy_(host[own])


def all_gather(comm: Comm, flat: torch.Tensor, transport: Transport) -> None:
    """Fill every chunk from the rank that owns it (collective)."""
    _check(flat)
    if comm.size == 1:
        return
    host = transport.host(flat)
    if host is not flat:
        own = slice(*aligned_part(comm.rank, flat.numel(), comm.size))
        host[own].copy_(flat[own])
    chunks = _chunks(comm, host)
    targets = [s for hop in range(comm.size - 1) for s in _segments(chunks[(comm.rank - hop - 1) % comm.size])]
    num_last = len(_segments(chunks[(comm.rank + 1) % comm.size]))  # the right neighbour's own: it has them
    transport.synchronize()
    requests = [comm.Irecv([memory(target), MPI.BYTE], (comm.rank - 1) % comm.size, TAG) for target in targets]
    outbox = _Outbox(comm, transport, host.dtype)
    for segment in _segments(chunks[comm.rank]):
        outbox.send(segment)
    for number, (request, target) in enumerate(zip(requests, targets, strict=True)):
        transport.wait([request])
        if number < len(targets) - num_last:
            outbox.send(target)
    outbox.wait()
    if host is not flat:
        flat.copy_(host)


class _Outbox:
    """What is on its way to the right neighbour."""

    def __init__(self, comm: Comm, transport: Transport, dtype: torch.dtype) -> None:
        """Send in `dtype`."""
        self._comm, self._transport, self._dtype = comm, transport, dtype
        self._pending: deque[tuple[MPI.Request, torch.Tensor]] = deque()

    def send(self, segment: torch.Tensor) -> None:
        """Start to send; the memory must stay as it is until `wait`, unless the dtype differs."""
        while self._pending and self._pending[0][0].Test():
            self._pending.popleft()  # and with it the copy in the wire's dtype
        wired = segment.to(self._dtype)
        self._transport.synchronize()
        right = (self._comm.rank + 1) % self._comm.size
        self._pending.append((self._comm.Isend([memory(wired), MPI.BYTE], right, TAG), wired))

    def wait(self) -> None:
        """Return once all has left."""
        self._transport.wait([request for request, _ in self._pending])


class _Inbox:
    """What comes from the left neighbour, through a few buffers; receives are posted ahead, in order."""

    def __init__(self, comm: Comm, transport: Transport, targets: list[torch.Tensor], dtype: torch.dtype) -> None:
        """Expect a segment for each target, in its size and in `dtype`."""
        self._comm, self._transport, self._targets = comm, transport, targets
        longest = max((target.numel() for target in targets), default=0)
        device = targets[0].device if targets else None
        self._buffers = [torch.empty(longest, dtype=dtype, device=device) for _ in range(RECEIVES_AHEAD)]
        self._requests: deque[MPI.Request] = deque()
        self._num_taken = 0
        for number in range(min(RECEIVES_AHEAD, len(targets))):
            self._post(number)

    def next(self) -> torch.Tensor:
        """The next segment; its memory is good until the next call."""
        number = self._num_taken
        if number and number - 1 + RECEIVES_AHEAD < len(self._targets):
            self._post(number - 1 + RECEIVES_AHEAD)  # into the buffer that the last call gave out
        self._num_taken += 1
        self._transport.wait([self._requests.popleft()])
        return self._buffer(number)

    def _buffer(self, number: int) -> torch.Tensor:
        return self._buffers[number % RECEIVES_AHEAD][: self._targets[number].numel()]

    def _post(self, number: int) -> None:
        self._transport.synchronize()
        left = (self._comm.rank - 1) % self._comm.size
        self._requests.append(self._comm.Irecv([memory(self._buffer(number)), MPI.BYTE], left, TAG))


def _check(flat: torch.Tensor) -> None:
    if flat.dim() != 1 or not flat.is_contiguous():
        raise ValueError(f"a ring takes a flat contiguous tensor, found shape {tuple(flat.shape)}")


def _chunks(comm: Comm, host: torch.Tensor) -> list[torch.Tensor]:
    return [host[slice(*aligned_part(index, host.numel(), comm.size))] for index in range(comm.size)]


def _segments(chunk: torch.Tensor) -> list[torch.Tensor]:
    """Pieces of equal size, the last one shorter; none of an empty chunk, so it costs no message."""
    return [chunk[start : start + SEGMENT] for start in range(0, chunk.numel(), SEGMENT)]
