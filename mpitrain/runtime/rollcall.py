"""The roll of a node's ranks: what each notes, whether it answers, and where its threads are in the code."""

from __future__ import annotations

import faulthandler
import os
import platform
import re
import signal
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpi4py import MPI

from mpitrain.runtime import notes
from mpitrain.runtime.agree import Comm, collect
from mpitrain.runtime.launch import start_of

STACK_SIGNAL = signal.SIGUSR2
SECONDS_FOR_STACKS = 2.0
SILENT = 5.0  # seconds after which a thread that beats once a second is taken to be held up
PROCESS_STATES = {"T": "stopped by a signal", "t": "stopped by a debugger", "D": "waits for a disk or a file server"}


@dataclass(frozen=True)
class Rank:
    """A rank of this node, as the others see it.

    Attributes:
        number: in the world.
        start: of its process, by which it is known (`launch.start_of`); None where processes cannot be seen.
        stacks: descriptor, in its process, of a file that its stacks are written to when it gets STACK_SIGNAL.
        memory: its notes.
    """

    number: int
    pid: int
    start: int | None
    stacks: int
    memory: Any

    def lives(self) -> bool:
        """Told by its start: the number of a process can be given to a new one."""
        return self.start is not None and start_of(self.pid) == self.start

    def last_beat(self) -> float:
        """When its watch was last awake, by the clock of the host."""
        return float(notes.PULSE.unpack_from(self.memory, notes.PULSE_AT)[0])

    def progress(self) -> tuple[int, int]:
        """Rises as long as the rank gets on."""
        return notes.read(self.memory).count, notes.PULSE.unpack_from(self.memory, notes.PULSE_AT)[1]

    def condition(self) -> str:
        """What is wrong with its process, if anything is seen from outside."""
        if self.start is not None and not self.lives():
            return "gone"
        with suppress(OSError, IndexError):
            state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
            if state in PROCESS_STATES:
                return PROCESS_STATES[state]
        silent = time.monotonic() - self.last_beat()
        return f"its threads have had no turn for {silent:.0f} s" if silent > SILENT else ""


class Board:
    """Notes of all ranks of this node, in memory that they share; `close` gives it back."""

    def __init__(self, world: Comm) -> None:
        """Hang it up, and write this rank's notes there from here on (collective)."""
        self.node = Comm(world.Split_type(MPI.COMM_TYPE_SHARED))
        self._window = MPI.Win.Allocate_shared(notes.SIZE, 1, comm=self.node)
        memories = [self._window.Shared_query(rank)[0] for rank in range(self.node.size)]
        # A file without a name, which others of the node open by the number that it has in this process.
        self._stacks = os.fdopen(os.memfd_create("stacks"), "w+")
        faulthandler.register(STACK_SIGNAL, self._stacks, all_threads=True)
        pid = os.getpid()
        everyone = collect(self.node, [world.rank, pid, start_of(pid), self._stacks.fileno()])
        self.ranks = [
            Rank(number, pid, start, stacks, memory)
            for (number, pid, start, stacks), memory in zip(everyone, memories, strict=True)
        ]
        self.own = self.ranks[self.node.rank]
        self._pulse = 0
        notes.attach(self.own.memory)
        self.beat(alive=False)
        self.node.Barrier()

    def beat(self, *, alive: bool) -> None:
        """This rank's watch is awake; `alive` counts as progress."""
        self._pulse += alive
        notes.PULSE.pack_into(self.own.memory, notes.PULSE_AT, time.monotonic(), self._pulse)

    def speaks(self) -> bool:
        """Whether this rank is the one to speak for the node: the first whose watch is awake."""
        awake = (rank for rank in self.ranks if time.monotonic() - rank.last_beat() < SILENT)
        return next(awake, None) is self.own

    def close(self) -> None:
        """Take it down (collective)."""
        notes.detach()
        faulthandler.unregister(STACK_SIGNAL)
        self._stacks.close()
        self.ranks = [self.own]
        self._window.Free()
        self.node.Free()


def call_the_roll(ranks: list[Rank]) -> str:
    """Where most of them are, and where each one is."""
    found = [notes.read(rank.memory) for rank in ranks]
    most, number = Counter(note.phase for note in found).most_common(1)[0]
    # Who is elsewhere, or does not answer, comes first.
    answers = sorted(zip(ranks, found, strict=True), key=lambda each: each[1].phase == most and not each[0].condition())
    said = _grouped([(rank.number, f"{note}{_in_brackets(rank)}") for rank, note in answers])
    lines = [f"{number} of {len(ranks)} ranks on {platform.node()} are at: {most}"]
    return "\n".join([*lines, *(f"  {who}: {text}" for who, text in said)])


def _in_brackets(rank: Rank) -> str:
    condition = rank.condition()
    return f" (process {rank.pid}: {condition})" if condition else ""


def _grouped(texts: list[tuple[int, str]]) -> list[tuple[str, str]]:
    """Who says the same, in the order in which it is first said."""
    who: dict[str, list[int]] = {}
    for number, text in texts:
        who.setdefault(text, []).append(number)
    return [
        (f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, sorted(numbers)))}", text)
        for text, numbers in who.items()
    ]


def describe_stacks(ranks: list[Rank]) -> str:
    """What the threads of each rank do; equal stacks once."""
    stacks = zip(ranks, take_stacks(ranks), strict=True)
    lines = []
    for who, stack in _grouped([(rank.number, stack) for rank, stack in stacks]):
        lines += [f"stacks of {who}:", *(f"  {line}" for line in stack.splitlines() or ["none could be had"])]
    return "\n".join(lines)


def take_stacks(ranks: list[Rank]) -> list[str]:
    """Of each rank, by a signal whose handler needs no turn of Python's. Who was stopped goes on by this."""
    alive = [rank for rank in ranks if rank.lives()]
    for rank in alive:
        for number in (STACK_SIGNAL, signal.SIGCONT):
            with suppress(OSError):
                os.kill(rank.pid, number)
    limit, before = time.monotonic() + SECONDS_FOR_STACKS, [""]
    while (stacks := [_stack_of(rank) if rank in alive else "" for rank in ranks]) != before or not all(stacks):
        if time.monotonic() > limit:
            break
        before = stacks
        time.sleep(0.1)
    return stacks


def _stack_of(rank: Rank) -> str:
    try:
        text = Path(f"/proc/{rank.pid}/fd/{rank.stacks}").read_text(errors="replace")
    except OSError:
        return ""
    threads = re.sub(r"(Current thread|Thread) 0x[0-9a-f]+", "Thread", text).split("\n\n")
    return "\n".join(thread.rstrip() for thread in threads if "mpitrain/runtime/watchdog.py" not in thread)
