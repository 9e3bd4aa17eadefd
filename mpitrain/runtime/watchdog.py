"""Each rank watches its node: who waits for a rank that is dead or stuck waits for ever, if nobody tells.

Launchers end a job when they notice a death, but not all do, nor always: srun does with --kill-on-bad-exit alone, and
MPICH 5's mpirun does not if it collects a rank that left without a signal before it reads that its socket was closed.
So each rank looks at the next one of its node, once a second. A death that no rank of the same node survives is the
launcher's to notice.

A hang nobody else notices. All ranks write down what they do (`notes`); when none of the whole job has got on for
too long, the first rank of each node that still answers calls the roll and ends the job.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from mpi4py import MPI

from mpitrain.errors import MpitrainError
from mpitrain.runtime import notes
from mpitrain.runtime.agree import Comm, any_rank
from mpitrain.runtime.gossip import Gossip
from mpitrain.runtime.launch import announce_end
from mpitrain.runtime.notes import State
from mpitrain.runtime.rollcall import Board, call_the_roll, describe_stacks

LOOK_EVERY = 1.0  # seconds
HURRY = 10  # looks for one when the time is up, so that all nodes call their rolls at once
GRACE = 5.0  # seconds for the launcher, which knows the exit code
HANG_TIMEOUT = 600.0  # until the configuration is known
WORKS = 5e-3  # share of a core that a process takes at least when it works


class Watch:
    """A thread that calls `alarm` with an error if the next rank of the node is gone or all ranks hang, until `end`.

    Attributes:
        hang_timeout: seconds without progress of any rank that count as a hang; 0 is for ever.
        survives: the death of a rank is MPI's to tell, and no reason to end.
    """

    def __init__(
        self,
        world: Comm,
        alarm: Callable[[MpitrainError], object],
        hang_timeout: float = HANG_TIMEOUT,
        *,
        survives: bool = False,
    ) -> None:
        """Begin (collective)."""
        self.hang_timeout, self.survives, self.alarm = hang_timeout, survives, alarm
        self._board = Board(world)
        ranks, node = self._board.ranks, self._board.node
        self._gossip = Gossip(world) if any_rank(world, node.size < world.size) else None
        self._neighbour = ranks[(node.rank + 1) % node.size]
        # Containers of their own number processes of their own: such a neighbour cannot be seen.
        self._sees = self._neighbour is not self._board.own and self._neighbour.lives()
        # Nodes hear of the last progress one after the other.
        self._lag = LOOK_EVERY * (1 + self._gossip.num_rounds) if self._gossip else 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)
        self._thread.start()

    def _look(self) -> None:
        now, worked, before = time.monotonic(), 0.0, [rank.progress() for rank in self._board.ranks]
        idle, gone = 0.0, 0.0
        while not self._ended.wait(LOOK_EVERY / (HURRY if self._alarmed or self._is_up(idle) else 1)):
            # Not more: a job may be suspended as a whole, and go on later.
            elapsed, now = min(time.monotonic() - now, 2 * LOOK_EVERY), time.monotonic()
            used, worked = time.process_time() - time.thread_time() - worked, time.process_time() - time.thread_time()
            self._board.answer()
            self._board.beat(alive=self._is_alive(used > WORKS * elapsed))
            progress = [rank.progress() for rank in self._board.ranks]
            moved, before = progress != before, progress
            if self._gossip is not None:
                moved = self._hear_of_progress(self._gossip, moved)
            idle = 0.0 if moved else idle + elapsed
            gone = gone + elapsed if self._sees and not self._neighbour.lives() else 0.0
            found = self._find_fault(idle, gone)
            if found is not None:
                self.alarm(found)
                return

    def _hear_of_progress(self, gossip: Gossip, moved: bool) -> bool:
        try:
            return gossip.exchange(moved)
        except MPI.Exception:
            if not self.survives:
                raise
            return True  # a rank is gone, which the others will notice

    def _is_up(self, idle: float) -> bool:
        """Whether the time is, for all that is known here."""
        return 0 < self.hang_timeout <= idle

    @property
    def _alarmed(self) -> bool:
        return self._gossip is not None and self._gossip.is_alarmed

    def _is_alive(self, computes: bool) -> bool:
        """Whether this rank gets on though it notes nothing new."""
        state = notes.read(self._board.own.memory).state
        return state == State.LISTENING or (state == State.WORKING and computes)

    def _find_fault(self, idle: float, gone: float) -> MpitrainError | None:
        if gone > GRACE and not self.survives:
            return MpitrainError(
                f"rank {self._neighbour.number} (process {self._neighbour.pid} of this node) is gone, and the launcher "
                "has not ended the job"
            )
        if (self._alarmed or self._is_up(idle - self._lag)) and self._board.speaks():
            return self._report()
        return None

    def _report(self) -> MpitrainError:
        """Say where all ranks of this node are; the stacks come last, as who was stopped goes on by being asked."""
        announce_end()
        roll, gossip = call_the_roll(self._board.ranks), self._gossip
        if gossip is not None:  # the first node to end the job ends it for all
            _write(roll)
            gossip.raise_alarm()
            self._wait_for_others(gossip, LOOK_EVERY * (1 + gossip.num_rounds / HURRY))
        _write(describe_stacks(self._board))
        if gossip is not None:
            self._wait_for_others(gossip, LOOK_EVERY)
        return MpitrainError(f"no rank has made progress for {self.hang_timeout:g} s (--runtime.hang_timeout); {roll}")

    def _wait_for_others(self, gossip: Gossip, seconds: float) -> None:
        limit = time.monotonic() + seconds
        while time.monotonic() < limit and not self._ended.wait(LOOK_EVERY / HURRY):
            self._board.beat(alive=False)
            gossip.exchange(progress=False)

    def abandon(self) -> None:
        """Look no more, and give nothing back: others are gone."""
        self._ended.set()
        self._thread.join()
        notes.detach()

    def end(self) -> None:
        """Look no more (collective, and before the first rank may leave)."""
        self._ended.set()
        self._thread.join()
        if self._gossip is not None:
            self._gossip.close()
        self._board.close()


def _write(text: str) -> None:
    with suppress(OSError):
        os.write(2, f"{text}\n".encode())
