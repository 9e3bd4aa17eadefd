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
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from mpi4py import MPI

from mpitrain.comm.buffers import Transport, memory
from mpitrain.runtime.agree import Comm

TAG = 7
RECEIVES_AHEAD = 2  # receives posted; more buffers only push each other out of caches
CROWDED_RECEIVES_AHEAD = 1  # where caches are shared too, and a sender waits for its core rather than for a receive
SENDS_AHEAD = 2  # staged segments that are copied or sent at a time
YIELDING = 5e-3  # seconds: ranks of a ring compute little, and a nap of one holds up all others


class Part(NamedTuple):
    """A piece of contiguous memory, and the same as MPI takes it."""

    tensor: torch.Tensor
    message: list[Any]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Part:
        """This tensor."""
        return cls(tensor, [memory(tensor), MPI.BYTE])


class Landing:
    """Buffers that segments arrive in; grown to the longest and kept, because fresh memory is slow to touch."""

    def __init__(self) -> None:
        """None yet."""
        self._held: dict[torch.dtype, list[torch.Tensor]] = {}

    def buffers(self, longest: int, dtype: torch.dtype, transport: Transport) -> list[torch.Tensor]:
        """As many as receives are posted, of this length."""
        held = self._held.setdefault(dtype, [])
        if not held or len(held[0]) < longest:
            count = CROWDED_RECEIVES_AHEAD if transport.patient else RECEIVES_AHEAD
            held[:] = [torch.empty(longest, dtype=dtype, device=transport.device) for _ in range(count)]
        return held


class Outbox:
    """What is on its way to the right neighbour."""

    def __init__(self, comm: Comm, transport: Transport) -> None:
        """Nothing yet."""
        self._comm, self._transport = comm, transport
        self._right = (comm.rank + 1) % comm.size
        self._leaving: deque[tuple[MPI.Request, Part]] = deque()

    def send(self, part: Part) -> None:
        """Start to send; the memory must stay as it is until `wait`."""
        self._forget()
        self._transport.synchronize()
        self._start(part)

    def wait(self) -> None:
        """Return once all has left."""
        self._transport.wait([request for request, _ in self._leaving])
        self._leaving.clear()

    def _start(self, part: Part) -> None:
        self._leaving.append((self._comm.Isend(part.message, self._right, TAG), part))

    def _forget(self) -> None:
        while self._leaving and self._leaving[0][0].Test():
            self._leaving.popleft()  # and with it what was made to be sent


class Inbox:
    """What comes from the left neighbour; receives are posted ahead, in order."""

    def __init__(
        self, comm: Comm, transport: Transport, targets: Sequence[Part], dtype: torch.dtype, landing: Landing | None
    ) -> None:
        """Expect a segment for each target, in its size and in `dtype`: through buffers, or (None) into the target."""
        self._comm, self._transport = comm, transport
        self._left = (comm.rank - 1) % comm.size
        self._sizes = [part.tensor.numel() for part in targets]
        self._places = list(targets)
        self._num_ahead = len(targets)
        if landing is not None:
            buffers = landing.buffers(max(self._sizes, default=0), dtype, transport)
            self._places, self._num_ahead = self._lay_out(buffers), len(buffers)
        self._requests: deque[MPI.Request] = deque()
        self._num_taken = 0

    def begin(self) -> None:
        """Post the first receives."""
        self._num_taken = 0
        for number in range(min(self._num_ahead, len(self._places))):
            self._post(number)

    def next(self) -> torch.Tensor:
        """The next segment; its memory is good until the next call."""
        number = self._num_taken
        if number and number - 1 + self._num_ahead < len(self._places):
            self._post(number - 1 + self._num_ahead)  # into the buffer that the last call gave out
        self._num_taken += 1
        self._wait(self._requests.popleft())
        return self._places[number].tensor

    def _lay_out(self, buffers: Sequence[torch.Tensor]) -> list[Part]:
        """Where each segment arrives: the buffers take turns."""
        return [Part.of(buffers[number % len(buffers)][:size]) for number, size in enumerate(self._sizes)]

    def _post(self, number: int) -> None:
        self._free_buffers()
        self._requests.append(self._comm.Irecv(self._places[number].message, self._left, TAG))

    def _free_buffers(self) -> None:
        """Return once no kernel or copy uses a buffer that was given out."""
        self._transport.synchronize()

    def _wait(self, request: MPI.Request) -> None:
        self._transport.wait([request])


class StagedOutbox(Outbox):
    """Sends what is on the device through the host, as far as can be done without waiting; more at each `go_on`.

    It must not wait for its buffers: they come free when the right neighbour receives, who may wait in the same way.
    """

    def __init__(self, comm: Comm, transport: Transport) -> None:
        super().__init__(comm, transport)
        self._waiting: deque[tuple[torch.Tensor, torch.cuda.Event | None]] = deque()
        self._copying: deque[tuple[torch.Tensor, torch.Tensor, torch.cuda.Event | None]] = deque()
        self._stream = _side_stream(transport.device)

    def send(self, part: Part) -> None:
        """As above."""
        self._waiting.append((part.tensor, self._transport.mark()))
        self.go_on()

    def go_on(self) -> bool:
        """Start what can be started; whether all has left."""
        self._forget()
        while self._waiting and len(self._copying) + len(self._leaving) < SENDS_AHEAD:
            wired, written = self._waiting.popleft()
            host = self._transport.pinned(wired.numel(), wired.dtype)
            self._copying.append((host, wired, start_copy(host, wired, self._stream, written)))
        while self._copying and _is_over(self._copying[0][2]):
            self._start(Part.of(self._copying.popleft()[0]))
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
        targets: Sequence[Part],
        dtype: torch.dtype,
        landing: Landing | None,
        outbox: StagedOutbox,
    ) -> None:
        super().__init__(comm, transport, targets, dtype, landing)
        self._outbox, self._dtype = outbox, dtype
        self._on_device = self._places
        self._num_ahead = RECEIVES_AHEAD
        self._copied: torch.cuda.Event | None = None

    def begin(self) -> None:
        """As above."""
        longest = max(self._sizes, default=0)
        self._places = self._lay_out([self._transport.pinned(longest, self._dtype) for _ in range(RECEIVES_AHEAD)])
        super().begin()

    def next(self) -> torch.Tensor:
        """As above."""
        number = self._num_taken
        host = super().next()
        arrived = self._on_device[number].tensor
        arrived.copy_(host, non_blocking=True)
        self._copied = self._transport.mark()
        return arrived

    def _free_buffers(self) -> None:
        if self._copied is not None:
            self._copied.synchronize()

    def _wait(self, request: MPI.Request) -> None:
        self._transport.wait_until(lambda: (self._outbox.go_on(), request.Test())[1])


class Swap:
    """One message each way between two ranks, in few steps of Python: their memory has left the caches since the last.

    Between 2 ranks of 2 cores that is a tenth of the time of 4 MiB, when other work has gone on in between.
    """

    def __init__(self, comm: Comm, transport: Transport, leaving: Part, arriving: Part) -> None:
        """Lay it out; memory that is not `transport.staged`."""
        self._comm, self._transport = comm, replace(transport, yielding=YIELDING)
        self._leaving, self._arriving = leaving.message, arriving.message

    def __call__(self) -> None:
        """Return once both messages have come."""
        comm, other = self._comm, 1 - self._comm.rank
        self._transport.synchronize()
        self._transport.wait([comm.Irecv(self._arriving, other, TAG), comm.Isend(self._leaving, other, TAG)])


def open_boxes(
    comm: Comm, transport: Transport, targets: Sequence[Part], dtype: torch.dtype, landing: Landing | None = None
) -> tuple[Outbox, Inbox]:
    """For segments that arrive in `dtype`, through the buffers of `landing`, or in the targets themselves."""
    transport = replace(transport, yielding=YIELDING)
    if transport.staged:
        outbox = StagedOutbox(comm, transport)
        return outbox, StagedInbox(comm, transport, targets, dtype, landing, outbox)
    return Outbox(comm, transport), Inbox(comm, transport, targets, dtype, landing)


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
