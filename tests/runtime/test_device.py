"""What all ranks must believe alike, though their nodes differ."""

from __future__ import annotations

import os

import pytest
import torch

from mpitrain.runtime.agree import collect
from mpitrain.runtime.device import share_cores


@pytest.mark.mpi(min_size=3)
def test_ranks_are_crowded_everywhere_if_they_are_anywhere(comm, monkeypatch):
    """Rings cut chunks by it, and both ends must cut alike."""
    threads = torch.get_num_threads()
    mask = {7} if comm.rank == 0 else {0}  # one core for the first rank, one for all others
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: mask)
    _, crowded = share_cores(comm, 1)
    torch.set_num_threads(threads)
    assert collect(comm, crowded) == [True] * comm.size
