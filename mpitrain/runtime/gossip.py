"""Rumours of progress: whether any rank of the job gets on, told without waiting for anybody.

Each rank has a clock that it moves on when it has seen progress itself, and sets to the latest it has heard of
(Lamport, "Time, clocks, and the ordering of events in a distributed system", 1978). So clocks rise as long as any rank
gets on, stop soon after all have stopped, and who answers no more only leaves a few messages lying. An alarm is a time
that is later than all others.
"""

from __future__ import annotations

import time

import numpy as np
from mpi4py import MPI

from mpitrain.runtime.agree import Comm

TAG = 1
FAREWELL = -1
ALARM = 1 << 62
NAP = 1e-3  # seconds


class Gossip:
    """Talks to the ranks 1, 2, 4, 8 ... further on: a rumour comes to all in log2(ranks) rounds."""

    def __init__(self, world: Comm) -> None:
        """Begin (collective)."""
        self._comm = Comm(world.Dup())
        self._clock = 0
        strides = [1 << bit for bit in range((world.size - 1).bit_length())]
        self._mail = [_Line(self._comm, stride) for stride in strides]

    @property
    def num_rounds(self) -> int:
        """Exchanges after which a rumour has come to all, if all make them."""
        return len(self._mail)

    @property
    def is_alarmed(self) -> bool:
        """Whether any rank, as far as is known here, has raised the alarm."""
        return self._clock >= ALARM

    def raise_alarm(self) -> None:
        """Tell all, with the next exchanges."""
        self._clock = max(self._clock, ALARM)

    def exchange(self, progress: bool) -> bool:
        """Whether any rank has made progress since the last call, as far as is known here."""
        before = self._clock
        self._clock = max([before + progress, *(line.hear() for line in self._mail)])
        for line in self._mail:
            line.say(self._clock)
        return self._clock > before

    def close(self) -> None:
        """Take leave of those who are told, and hear all others do so (collective)."""
        leaving = list(self._mail)
        while leaving:
            leaving = [line for line in leaving if not line.is_over()]
            time.sleep(NAP)
        self._comm.Free()


class _Line:
    """One message under way at a time to the rank so many further on, and one from the rank so many before."""

    def __init__(self, comm: Comm, stride: int) -> None:
        self._comm = comm
        self._target, self._source = (comm.rank + stride) % comm.size, (comm.rank - stride) % comm.size
        self._leaving: MPI.Request = MPI.REQUEST_NULL
        self._out = np.zeros(1, np.int64)
        self._in = np.zeros(1, np.int64)
        self._arriving: MPI.Request = comm.Irecv(self._in, self._source, TAG)

    def hear(self) -> int:
        """The latest clock that has come; FAREWELL is the last."""
        heard = 0
        while heard != FAREWELL and self._arriving.Test():
            heard = int(self._in[0])
            if heard != FAREWELL:
                self._arriving = self._comm.Irecv(self._in, self._source, TAG)
        return heard

    def say(self, clock: int) -> bool:
        """Send it, if the last one has been taken; whether it has."""
        if not self._leaving.Test():
            return False
        self._out[0] = clock
        self._leaving = self._comm.Issend(self._out, self._target, TAG)
        return True

    def is_over(self) -> bool:
        """Whether the farewells of both sides have been taken; to be asked until they are."""
        if self._out[0] != FAREWELL:
            self.say(FAREWELL)
        return self.hear() == FAREWELL and self._out[0] == FAREWELL and bool(self._leaving.Test())
