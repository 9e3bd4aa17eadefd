"""Messages back and forth: every pair is timed, and what comes back is what was sent."""

from __future__ import annotations

import time

import pytest

from mpitrain.comm.buffers import Parcel, Transport
from mpitrain.comm.pingpong import LONG, TURNS, ping_pong


@pytest.mark.mpi(min_size=1)
@pytest.mark.parametrize("patient", [False, True])
def test_every_pair_is_timed_and_all_ranks_are_told(comm, patient):
    pairs = [(0, comm.size - 1)] if comm.size > 1 else []
    began = time.perf_counter()
    links = ping_pong(comm, pairs, Transport(patient=patient))
    elapsed = time.perf_counter() - began
    assert [link["ranks"] for link in links] == [list(pair) for pair in pairs]
    for link in links:
        assert link["right"] and 0 < link["latency"] < elapsed
        assert 2 * TURNS[LONG] * 4 * LONG / link["bandwidth"] < elapsed


@pytest.mark.mpi(min_size=4)
def test_pairs_do_not_meet_each_others_messages(comm):
    links = ping_pong(comm, [(2, 3), (1, 0)], Transport())
    assert [link["ranks"] for link in links] == [[2, 3], [1, 0]] and all(link["right"] for link in links)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("culprit", [0, 1])
def test_what_comes_changed_is_noticed(comm, monkeypatch, culprit):
    received = Parcel.received

    def spoilt(self):
        found = received(self)
        return found + (len(found) == LONG) if comm.rank == culprit else found

    monkeypatch.setattr(Parcel, "received", spoilt)
    assert [link["right"] for link in ping_pong(comm, [(0, 1)], Transport())] == [False]
