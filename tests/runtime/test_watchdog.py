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

from mpitrain.runtime import launch, watchdog
from mpitrain.runtime.watchdog import Watch

pytestmark = pytest.mark.mpi(min_size=2)


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
    limit = time.monotonic() + 20
    while watchers() and time.monotonic() < limit:
        time.sleep(0.01)
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
    assert watchers() == []
    watch.end()
    MPI.COMM_WORLD.Barrier()


def test_a_process_is_known_by_its_start():
    assert launch.start_of(os.getpid()) == launch.start_of(os.getpid()) > 0
    assert launch.start_of(2**22 + 1) is None
