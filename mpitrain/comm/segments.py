"""Segments on their way round a ring: straight from a tensor's memory, or through a few buffers in pinned host memory.

The second way is for a device's memory that MPI cannot take. While MPI sends one segment, the next is copied to the
host, on a stream of its own; while one is copied to the device and used there, the next are received. MPI knows no
streams, so before it gets a buffer to send or to fill, the copies from and to this buffer must have ended.

Nothing is pinned twice: torch keeps pinned memory that is no longer used, and gives it out again once copies from and
to it have ended. On a CPU copies end when they return, and the same code can be tested there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from mpi4py import MPI

from mpitrain.comm.buffers import Transport, memory
from mpitrain.runtime.agree import Comm

TAG = 7
RECEIVES_AHEAD = 4  # receives posted before their segment is due
SENDS_AHEAD = 2  # staged segments that are copied or sent at a time


class Outbox:
    """What is on its way to the right neighbour."""

    def __init__(self, comm: Comm, transport: Transport, dtype: torch.dtype) -> None:
        """Send in `dtype`."""
        self._comm, self._transport, self._dtype = comm, transport, dtype
        self._right = (comm.rank + 1) % comm.size
        self._leaving: deque[tuple[MPI.Request, torch.Tensor]] = deque()

    def send(self, segment: torch.Tensor) -> None:
        """Start to send; the memory must stay as it is until `wait`, unless the dtype differs."""
        self._forget()
        wired = segment.to(self._dtype)
        self._transport.synchronize()
        self._start(wired)

    def wait(self) -> None:
        """Return once all has left."""
        self._transport.wait([request for request, _ in self._leaving])

    def _start(self, wired: torch.Tensor) -> None:
        self._leaving.append((self._comm.Isend([memory(wired), MPI.BYTE], self._right, TAG), wired))

    def _forget(self) -> None:
        while self._leaving and self._leaving[0][0].Test():
            self._leaving.popleft()  # and with it the copy in the wire's dtype


class Inbox:
    """What comes from the left neighbour; receives are posted ahead, in order."""

    def __init__(
        self, comm: Comm, transport: Transport, targets: Sequence[torch.Tensor], dtype: torch.dtype, in_place: bool
    ) -> None:
        """Expect a segment for each target, in its size and in `dtype`: into the target, or through a few buffers."""
        self._comm, self._transport, self._targets, self._in_place = comm, transport, targets, in_place
        self._left = (comm.rank - 1) % comm.size
        self._buffers = self._get_buffers(max((target.numel() for target in targets), default=0), dtype)
        self._requests: deque[MPI.Request] = deque()
        self._num_taken = 0
        for number in range(len(self._buffers)):
            self._post(number)

    def next(self) -> torch.Tensor:
        """The next segment; its memory is good until the next call."""
        number = self._num_taken
        if number and number - 1 + len(self._buffers) < len(self._targets):
            self._post(number - 1 + len(self._buffers))  # into the buffer that the last call gave out
        self._num_taken += 1
        self._wait(self._requests.popleft())
        return self._buffer(number)

    def _get_buffers(self, longest: int, dtype: torch.dtype) -> Sequence[torch.Tensor]:
        if self._in_place:
            return self._targets
        device = self._transport.device
        return [torch.empty(longest, dtype=dtype, device=device) for _ in self._targets[:RECEIVES_AHEAD]]

    def _buffer(self, number: int) -> torch.Tensor:
        return self._buffers[number % len(self._buffers)][: self._targets[number].numel()]

    def _post(self, number: int) -> None:
        self._free_buffers()
        self._requests.append(self._comm.Irecv([memory(self._buffer(number)), MPI.BYTE], self._left, TAG))

    def _free_buffers(self) -> None:
        """Return once no kernel or copy uses a buffer that was given out."""
        self._transport.synchronize()

    def _wait(self, request: MPI.Request) -> None:
        self._transport.wait([request])


class StagedOutbox(Outbox):
    """Sends what is on the device through the host, as far as can be done without waiting; more at each `go_on`.

    It must not wait for its buffers: they come free when the right neighbour receives, who may wait in the same way.
    """

    def __init__(self, comm: Comm, transport: Transport, dtype: torch.dtype) -> None:
        super().__init__(comm, transport, dtype)
        self._waiting: deque[tuple[torch.Tensor, torch.cuda.Event | None]] = deque()
        self._copying: deque[tuple[torch.Tensor, torch.Tensor, torch.cuda.Event | None]] = deque()
        self._stream = _side_stream(transport.device)

    def send(self, segment: torch.Tensor) -> None:
        """As above."""
        wired = segment.to(self._dtype)
        self._waiting.append((wired, self._transport.mark()))
        self.go_on()

    def go_on(self) -> bool:
        """Start what can be started; whether all has left."""
        self._forget()
        while self._waiting and len(self._copying) + len(self._leaving) < SENDS_AHEAD:
            wired, written = self._waiting.popleft()
            host = self._transport.pinned(wired.numel(), wired.dtype)
            self._copying.append((host, wired, start_copy(host, wired, self._stream, written)))
        while self._copying and _is_over(self._copying[0][2]):
            self._start(self._copying.popleft()[0])
        return not (self._waiting or self._copying or self._leaving)

    def wait(self) -> None:
        """As above."""
        self._transport.wait_until(self.go_on)


class StagedInbox(Inbox):
    """Receives on the host and copies to the device; while it waits, the outbox goes on."""

    def __init__(
        self,
        comm: Comm,
        transport: Transport,
        targets: Sequence[torch.Tensor],
        dtype: torch.dtype,
        in_place: bool,
        outbox: StagedOutbox,
    ) -> None:
        self._outbox = outbox
        self._copied: torch.cuda.Event | None = None
        self._landing = torch.empty(0)
        super().__init__(comm, transport, targets, dtype, in_place)

    def next(self) -> torch.Tensor:
        """As above."""
        number = self._num_taken
        host = super().next()
        arrived = self._targets[number] if self._in_place else self._landing[: host.numel()]
        arrived.copy_(host, non_blocking=True)  # on the stream that uses it, so one place to land is enough
        self._copied = self._transport.mark()
        return arrived

    def _get_buffers(self, longest: int, dtype: torch.dtype) -> Sequence[torch.Tensor]:
        if not self._in_place:
            self._landing = torch.empty(longest, dtype=dtype, device=self._transport.device)
        return [self._transport.pinned(longest, dtype) for _ in self._targets[:RECEIVES_AHEAD]]

    def _free_buffers(self) -> None:
        if self._copied is not None:
            self._copied.synchronize()

    def _wait(self, request: MPI.Request) -> None:
        self._transport.wait_until(lambda: (self._outbox.go_on(), request.Test())[1])


def open_boxes(
    comm: Comm,
    transport: Transport,
    targets: Sequence[torch.Tensor],
    dtype: torch.dtype,
    *,
    in_place: bool = False,
) -> tuple[Outbox, Inbox]:
    """Post the first receives for `targets`, and be ready to send, both in `dtype`; `in_place` fills the targets."""
    if transport.staged:
        outbox = StagedOutbox(comm, transport, dtype)
        return outbox, StagedInbox(comm, transport, targets, dtype, in_place, outbox)
    return Outbox(comm, transport, dtype), Inbox(comm, transport, targets, dtype, in_place)


def start_copy(
    host: torch.Tensor, tensor: torch.Tensor, stream: torch.cuda.Stream | None, written: torch.cuda.Event | None
) -> torch.cuda.Event | None:
    """Copy to the host once the tensor is written; the event is the end of the copy, None if it has ended."""
    if stream is None or written is None:
        host.copy_(tensor)
        return None
    stream.wait_event(written)
    with torch.cuda.stream(stream):
        host.copy_(tensor, non_blocking=True)
        event: torch.cuda.Event = stream.record_event()
    return event


def _side_stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]


def _is_over(event: torch.cuda.Event | None) -> bool:
    return event is None or bool(event.query())  # type: ignore[no-untyped-call]
