"""A rank notices that the next one of its node is gone, and takes nothing else for it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from mpi4py import MPI

from mpitrain.runtime import launch, notes, watchdog
from mpitrain.runtime.agree import collect
from mpitrain.runtime.notes import State
from mpitrain.runtime.rollcall import Board
from mpitrain.runtime.watchdog import Watch

pytestmark = pytest.mark.mpi(min_size=2, max_size=4)


@pytest.fixture
def child(monkeypatch) -> Iterator[subprocess.Popen[bytes]]:
    """A process in this rank's stead, and little patience."""
    monkeypatch.setattr(watchdog, "LOOK_EVERY", 0.02)
    monkeypatch.setattr(watchdog, "GRACE", 0.2)
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    monkeypatch.setattr(os, "getpid", lambda: process.pid)
    yield process
    process.kill()
    process.wait()
    MPI.COMM_WORLD.Barrier()


def watchers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "watch"]


def wait_until_all_look(world: MPI.Intracomm, *, collected: bool, child: subprocess.Popen[bytes]) -> None:
    """Rank 1's child dies when all have begun; its parent leaves it as a zombie, or does not."""
    world.Barrier()
    if world.rank == 1:
        child.kill()
        if collected:
            child.wait()
    world.Barrier()


@pytest.mark.parametrize("collected", [True, False])
def test_who_stands_before_the_dead_names_it_and_nobody_else_does(child, collected):
    world, said = MPI.COMM_WORLD, []
    watch = Watch(world, said.append)
    wait_until_all_look(world, collected=collected, child=child)
    limit = time.monotonic() + 20
    while world.rank == 0 and not said and time.monotonic() < limit:
        time.sleep(0.01)
    world.Barrier()
    time.sleep(0.5)
    watch.end()
    texts = ["rank 1 (process " in str(error) and "is gone" in str(error) for error in said]
    assert texts == ([True] if world.rank == 0 else [])


def test_who_has_ended_the_watch_hears_of_no_death(child):
    world, said = MPI.COMM_WORLD, []
    watch = Watch(world, said.append)
    assert len(watchers()) == 1
    watch.end()
    wait_until_all_look(world, collected=True, child=child)
    assert (watchers(), said) == ([], [])


def test_a_launcher_that_acts_in_time_has_the_word(child, monkeypatch):
    world, said = MPI.COMM_WORLD, []
    monkeypatch.setattr(watchdog, "GRACE", 60)
    watch = Watch(world, said.append)
    wait_until_all_look(world, collected=True, child=child)
    time.sleep(0.5)
    assert len(watchers()) == 1
    watch.end()
    time.sleep(0.1)
    assert said == []


def test_a_neighbour_that_cannot_be_seen_is_not_taken_for_dead(child, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 2**22 + 1)  # more than Linux gives
    said = []
    watch = Watch(MPI.COMM_WORLD, said.append)
    wait_until_all_look(MPI.COMM_WORLD, collected=True, child=child)
    time.sleep(0.5)
    watch.end()
    assert said == []


class Hang:
    """A watch that loses patience soon, and what it has said."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, gossip: bool) -> None:
        monkeypatch.setattr(watchdog, "LOOK_EVERY", 0.05)
        monkeypatch.setattr(watchdog, "GRACE", 60)
        notes.begin_step(0)
        if gossip:  # as if each rank had a host of its own
            monkeypatch.setattr(watchdog, "Board", lambda world: Board(MPI.COMM_SELF))
        self.said: list[str] = []
        self.watch = Watch(MPI.COMM_WORLD, lambda error: self.said.append(str(error)))
        self.watch.hang_timeout = 1.0

    def end(self) -> list[str]:
        """What all ranks have said."""
        MPI.COMM_WORLD.Barrier()
        self.watch.end()
        return [text for said in collect(MPI.COMM_WORLD, self.said) for text in said]


@pytest.mark.parametrize("gossip", [False, True])
def test_as_long_as_one_rank_notes_something_nobody_hangs(monkeypatch, gossip):
    hang, last = Hang(monkeypatch, gossip=gossip), MPI.COMM_WORLD.size - 1
    limit = time.monotonic() + 2.5
    while time.monotonic() < limit:
        if MPI.COMM_WORLD.rank == last:
            notes.note(b"busy")
        time.sleep(0.1)
    assert hang.end() == []


@pytest.mark.parametrize("gossip", [False, True])
def test_when_no_rank_notes_anything_each_node_calls_its_roll(monkeypatch, gossip):
    hang, rank = Hang(monkeypatch, gossip=gossip), MPI.COMM_WORLD.rank
    notes.note(b"this" if rank == 1 else b"that", peer=0 if rank == 1 else -1)
    time.sleep(2)
    said = hang.end()
    assert len(said) == (MPI.COMM_WORLD.size if gossip else 1), said
    assert all("no rank has made progress for 1 s" in text for text in said)
    assert sum(": this, with rank 0" in text for text in said) == 1, said


def test_the_alarm_of_one_node_has_all_nodes_call_their_rolls(monkeypatch):
    hang, rank = Hang(monkeypatch, gossip=True), MPI.COMM_WORLD.rank
    if rank > 0:
        hang.watch.hang_timeout = 60.0
    notes.note(b"waiting")
    time.sleep(2)
    said = hang.end()
    assert len(said) == MPI.COMM_WORLD.size, said


@pytest.mark.parametrize(
    "state, works, hangs",
    [
        (State.WORKING, True, False),
        (State.WORKING, False, True),
        (State.MOVING, True, True),
        (State.LISTENING, False, False),
    ],
)
def test_what_counts_as_progress(monkeypatch, state, works, hangs):
    hang = Hang(monkeypatch, gossip=False)
    notes.note(b"long", state=state)
    limit = time.monotonic() + 2
    while time.monotonic() < limit:
        if not works:
            time.sleep(2)
    assert bool(hang.end()) == hangs


def test_a_process_is_known_by_its_start():
    assert launch.start_of(os.getpid()) == launch.start_of(os.getpid()) > 0
    assert launch.start_of(2**22 + 1) is None
