"""How fast messages are between pairs of ranks: a tensor goes back and forth, on the way that training takes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from time import perf_counter
from typing import Any

import torch

from mpitrain.comm.buffers import Transport
from mpitrain.runtime.agree import Comm, collect
from mpitrain.runtime.notes import note

SHORT, LONG = 2, 1 << 20  # elements of 4 bytes
TURNS = {SHORT: 100, LONG: 8}
WARM_UP = 3


def neighbours(leaders: list[int]) -> list[list[tuple[int, int]]]:
    """Each with the next one, in two rounds in which nobody takes part twice."""
    pairs = list(pairwise(leaders))
    return [pairs[::2], pairs[1::2]]


def ping_pong(comm: Comm, pairs: Sequence[tuple[int, int]], transport: Transport) -> list[dict[str, Any]]:
    """Of each pair, all at once: ranks, latency in seconds, bandwidth in bytes a second, right (collective).

    Args:
        comm: all ranks, those that are in no pair too.
        pairs: no rank is in two of them.
        transport: how to wait, and how device memory travels.
    """
    mine = None
    for pair in pairs:
        if comm.rank in pair:
            (latency, short), (each, long) = (_turns(comm, pair, transport, size) for size in (SHORT, LONG))
            mine = {"ranks": list(pair), "latency": latency, "bandwidth": 4 * LONG / each, "right": short and long}
    note(b"waiting for messages of others")
    transport.wait([comm.Ibarrier()])  # asleep, where cores are few: not to disturb them
    found = collect(comm, mine)
    return [found[first] | {"right": found[first]["right"] and found[second]["right"]} for first, second in pairs]


def _turns(comm: Comm, pair: tuple[int, int], transport: Transport, size: int) -> tuple[float, bool]:
    """Seconds of a way, half of the quickest turn, and whether what has come at last is what was sent at first."""
    first, peer = comm.rank == pair[0], pair[0] if comm.rank == pair[1] else pair[1]
    whole = torch.arange(size, dtype=torch.int32, device=transport.device)
    seconds, received = [], whole
    for turn in range(-WARM_UP, TURNS[size]):
        note(b"message back and forth", peer=peer)
        began = perf_counter()
        arriving = transport.post(comm, (size,), torch.int32, peer, 0)
        if not first:
            received = arriving.received()
        leaving = transport.send(comm, whole if first else received, peer, 0)
        if first:
            received = arriving.received()
        leaving.sent()
        transport.synchronize()
        if turn >= 0:
            seconds.append(perf_counter() - began)
    return min(seconds) / 2, torch.equal(received, whole)
