"""What all ranks must believe alike, though their nodes differ."""

from __future__ import annotations

import os

import pytest
import torch

from mpitrain.runtime.agree import collect
from mpitrain.runtime.device import processors_of_node, share_cores


@pytest.fixture(autouse=True)
def _threads_of_others(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    yield
    torch.set_num_threads(before)


# Masks of the first rank and of the others; on two ranks: threads of each, ranks with too many where 2 are asked for.
MASKS = {
    "all on all": ({0, 1, 2, 3}, {0, 1, 2, 3}, (2, 2), 0),
    "apart": ({0, 1}, {2, 4}, (2, 2), 0),
    "overlapping": ({0, 1, 2}, {2, 3}, (2, 1), 1),
    "one core for all": ({7}, {7}, (1, 1), 2),
}


@pytest.mark.mpi(min_size=2, max_size=2)
@pytest.mark.parametrize("name", MASKS)
def test_ranks_share_the_cores_that_they_have_in_common(comm, monkeypatch, name):
    first, second, threads, excess = MASKS[name]
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: second if comm.rank else first)
    assert processors_of_node(comm, torch.device("cpu")) == len(first | second)
    cores = share_cores(comm, None)
    assert cores.num_threads == torch.get_num_threads() == threads[comm.rank]
    assert (cores.excess, cores.crowded) == (0, name == "one core for all")  # a core for each, however they share
    assert share_cores(comm, 2).excess == excess
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert share_cores(comm, None).num_threads == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "3,1")
    assert share_cores(comm, None).num_threads == 3
    for wrong in ("abc", "0", "-2", "99999"):
        monkeypatch.setenv("OMP_NUM_THREADS", wrong)
        assert share_cores(comm, None).misread == wrong


@pytest.mark.mpi(min_size=1)
def test_cores_are_named(comm, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 5, 8, 9} | ({11} if comm.rank else set()))
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    others = ", others on others" if comm.size > 1 else ""
    if comm.rank == 0:
        assert share_cores(comm, 1).binding == f"on core(s) 0-2, 5, 8-9 of 12{others}"
    else:
        share_cores(comm, 1)


@pytest.mark.mpi(min_size=3)
def test_ranks_on_one_core_are_crowded_though_others_have_cores_to_spare(comm, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(1, 99)) if comm.rank == 0 else {0})
    assert collect(comm, share_cores(comm, 1).crowded) == [True] * comm.size


@pytest.mark.mpi(min_size=3)
def test_ranks_are_crowded_everywhere_if_they_are_anywhere(comm, monkeypatch):
    """Rings cut chunks by it, and both ends must cut alike."""
    mask = {7} if comm.rank == 0 else {0}  # one core for the first rank, one for all others
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: mask)
    assert collect(comm, share_cores(comm, 1).crowded) == [True] * comm.size
