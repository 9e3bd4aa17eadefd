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
SECONDS_FOR_STACKS = 2.5  # in which a watch that is awake looks at least once
SECONDS_FOR_SIGNALS = 1.0
SILENT = 8.0  # seconds after which a watch is taken to be held up: it beats once a second, unless it calls the roll
PROCESS_STATES = {"T": "stopped by a signal", "t": "stopped by a debugger", "D": "waits for a disk or a file server"}


@dataclass(frozen=True)
class Rank:
    """A rank of this node, as the others see it.

    Attributes:
        number: in the world.
        start: of its process, by which it is known (`launch.start_of`); None where processes cannot be seen.
        stacks: descriptor, in its process, of a file that its stacks are written to when it is asked for them.
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
        signal.signal(STACK_SIGNAL, signal.SIG_IGN)  # what comes after `close` must not kill
        faulthandler.register(STACK_SIGNAL, self._stacks, all_threads=True)
        pid = os.getpid()
        everyone = collect(self.node, [world.rank, pid, start_of(pid), self._stacks.fileno()])
        self.ranks = [
            Rank(number, pid, start, stacks, memory)
            for (number, pid, start, stacks), memory in zip(everyone, memories, strict=True)
        ]
        self.own = self.ranks[self.node.rank]
        self._pulse = 0
        self.own.memory[notes.ASKED_AT] = 0
        notes.attach(self.own.memory)
        self.beat(alive=False)
        self.node.Barrier()

    def beat(self, *, alive: bool) -> None:
        """This rank's watch is awake; `alive` counts as progress."""
        self._pulse += alive
        notes.PULSE.pack_into(self.own.memory, notes.PULSE_AT, time.monotonic(), self._pulse)

    def answer(self) -> None:
        """Write this rank's stacks if somebody asks for them: by the watch, while no other thread gets a turn."""
        if self.own.memory[notes.ASKED_AT]:
            self.own.memory[notes.ASKED_AT] = 0
            faulthandler.dump_traceback(self._stacks, all_threads=True)

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


def describe_stacks(board: Board) -> str:
    """What the threads of each rank do; equal stacks once."""
    take_stacks(board)
    lines = []
    for who, stack in _grouped([(rank.number, _stack_of(rank)) for rank in board.ranks]):
        lines += [f"stacks of {who}:", *(f"  {line}" for line in stack.splitlines() or ["none could be had"])]
    return "\n".join(lines)


def take_stacks(board: Board) -> None:
    """Have each rank write its stacks. Who was stopped goes on by this, and is late by no more than that.

    Whose watch has no turn, because some thread does not give Python's lock back, is asked by a signal: its handler
    needs no turn. It would not be safe where threads still run.
    """
    alive = [rank for rank in board.ranks if rank.lives()]
    for rank in alive:
        rank.memory[notes.ASKED_AT] = 1
        with suppress(OSError):
            os.kill(rank.pid, signal.SIGCONT)
    board.answer()
    _wait_for_stacks(alive, SECONDS_FOR_STACKS)
    for rank in alive:
        if not _stack_of(rank):
            with suppress(OSError):
                os.kill(rank.pid, STACK_SIGNAL)
    _wait_for_stacks(alive, SECONDS_FOR_SIGNALS)


def _wait_for_stacks(ranks: list[Rank], seconds: float) -> None:
    limit, before = time.monotonic() + seconds, [""]
    while (stacks := [_stack_of(rank) for rank in ranks]) != before or not all(stacks):
        if time.monotonic() > limit:
            return
        before = stacks
        time.sleep(0.1)


def _stack_of(rank: Rank) -> str:
    """What it has written; nothing if its process cannot be seen."""
    try:
        text = Path(f"/proc/{rank.pid}/fd/{rank.stacks}").read_text(errors="replace")
    except OSError:
        return ""
    threads = re.sub(r"(Current thread|Thread) 0x[0-9a-f]+", "Thread", text).split("\n\n")
    return "\n".join(thread.rstrip() for thread in threads if "mpitrain/runtime/watchdog.py" not in thread)
