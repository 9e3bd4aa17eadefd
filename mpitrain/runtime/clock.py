"""One clock for all ranks: how far each host's is from that of rank 0."""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np

from mpitrain.observe.trace import now
from mpitrain.runtime.agree import Comm, collect

ROUND_TRIPS = 16


def offset_to_root(comm: Comm) -> int:
    """What to add to this rank's `now()` for rank 0's, in ns (collective).

    Ranks of one host share a clock. The first rank of each other host asks rank 0 for the time, and takes the answer
    that came back soonest to have been given halfway (Cristian, "Probabilistic clock synchronization", 1989).
    """
    boots = collect(comm, boot_id())
    leaders = sorted({boots.index(boot) for boot in boots} - {0})
    offset = 0
    if comm.rank == 0:
        for leader in leaders:
            _answer(comm, leader)
    elif comm.rank in leaders:
        offset = _ask(comm)
    offsets: list[int] = collect(comm, offset)
    return offsets[boots.index(boots[comm.rank])]


def boot_id() -> str:
    """The same for all processes of a host, until it is started again (proc(5)); its name where that is not told."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return platform.node()


def _answer(comm: Comm, leader: int) -> None:
    for _ in range(ROUND_TRIPS):
        comm.Recv(np.empty(0), leader)
        comm.Send(np.array([now()]), leader)


def _ask(comm: Comm) -> int:
    found, time = [], np.empty(1, np.int64)
    for _ in range(ROUND_TRIPS):
        began = now()
        comm.Send(np.empty(0), 0)
        comm.Recv(time, 0)
        stopped = now()
        found.append((stopped - began, int(time[0]) - (began + stopped) // 2))
    return min(found)[1]
