"""Each rank watches over the next one of its node: who waits for the dead waits for ever, if nobody tells.

Launchers end a job when they notice a death, but not all do, nor always: srun does with --kill-on-bad-exit alone, and
MPICH 5's mpirun does not if it collects a rank that left without a signal before it reads that its socket was closed.
Looking costs nothing: it is done once a second, at one line of proc(5). A death that no rank of the same node survives
is the launcher's to notice.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from mpi4py import MPI

from mpitrain.errors import MpitrainError
from mpitrain.runtime.agree import Comm, collect
from mpitrain.runtime.launch import start_of

LOOK_EVERY = 1.0  # seconds
GRACE = 5.0  # seconds for the launcher, which knows the exit code


class Watch:
    """A thread that calls `alarm` with an error if the next rank of the node is gone, until `end`."""

    def __init__(self, world: Comm, alarm: Callable[[MpitrainError], object]) -> None:
        """Begin (collective)."""
        node = Comm(world.Split_type(MPI.COMM_TYPE_SHARED))
        pid = os.getpid()
        everyone = collect(node, [world.rank, pid, start_of(pid)])
        self._start: int | None
        self._neighbour, self._pid, self._start = everyone[(node.rank + 1) % node.size]
        self._alarm, self._ended = alarm, threading.Event()
        node.Free()
        # Containers of their own number processes of their own: such a neighbour cannot be seen.
        if self._neighbour != world.rank and self._lives():
            threading.Thread(target=self._look, name="watch", daemon=True).start()

    def _lives(self) -> bool:
        # Told by its start: the number of a process can be given to a new one.
        return self._start is not None and start_of(self._pid) == self._start

    def _look(self) -> None:
        while self._lives():
            if self._ended.wait(LOOK_EVERY):
                return
        if not self._ended.wait(GRACE):
            self._alarm(
                MpitrainError(
                    f"rank {self._neighbour} (process {self._pid} of this node) is gone, and the launcher has not "
                    "ended the job"
                )
            )

    def end(self) -> None:
        """Look no more: to be called by all ranks before the first of them may leave."""
        self._ended.set()
