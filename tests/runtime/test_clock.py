"""Hosts whose clocks differ agree on one of them."""

from __future__ import annotations

import pytest

from mpitrain.observe.trace import now
from mpitrain.runtime import clock
from mpitrain.runtime.agree import collect

pytestmark = pytest.mark.mpi(min_size=1)
MS = 1_000_000


def test_ranks_of_one_host_have_one_clock(comm):
    assert clock.offset_to_root(comm) == 0
    assert set(collect(comm, clock.boot_id())) == {clock.boot_id()}


@pytest.mark.parametrize("ranks_per_host", [1, 2])
def test_the_clock_of_another_host_is_off_by_as_much_as_it_is(comm, monkeypatch, ranks_per_host):
    host = comm.rank // ranks_per_host
    skew = host * 10**15 - host * 500 * MS
    monkeypatch.setattr(clock, "boot_id", lambda: f"host {host}")
    monkeypatch.setattr(clock, "now", lambda: now() + skew)
    found = clock.offset_to_root(comm)
    assert found == pytest.approx(-skew, abs=100 * MS)
    assert all(others == found for rank, others in enumerate(collect(comm, found)) if rank // ranks_per_host == host)
