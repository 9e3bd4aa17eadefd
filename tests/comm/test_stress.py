"""Every way of ours to sum, against sums in float64: hard numbers, odd sizes, parts of the world, no buffered sends."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
from communicators import Unbuffered, forbid_buffering
from mpi4py import MPI
from sums import WAYS, Way, complaint, hard_numbers, sum_by

from mpitrain.comm import exchange, node, ring
from mpitrain.comm.buffers import memory
from mpitrain.runtime.agree import collect, share
from mpitrain.split import UNIT

pytestmark = pytest.mark.mpi(min_size=1)
# Color and key of a rank: sub-communicators of 1 to 7 ranks which work at the same time, and one turned round.
SPLITS: dict[str, Callable[[int], tuple[int, int]]] = {
    "everyone": lambda rank: (0, rank),
    "everyone reversed": lambda rank: (0, -rank),
    "odd and even": lambda rank: (rank % 2, rank),
    "the first and the rest": lambda rank: (min(rank, 1), rank),
    "two reversed and the rest": lambda rank: (int(rank < 2), -rank),
    "three and the rest": lambda rank: (int(rank < 3), rank),
}


def sizes_for(num_ranks: int) -> list[int]:
    """Around the number of ranks and of whole units on each rank, primes, and beyond the eager limit of any MPI."""
    around = [count + more for count in (num_ranks, UNIT * num_ranks) for more in (-1, 0, 1)]
    return sorted({0, 1, 2, *around, 997, 40009})


def complaints(comm: MPI.Intracomm, way: Way, lengths: list[int] | None = None) -> list[str]:
    """What is wrong, here or on another rank, with sums of tensors of many lengths (collective)."""
    members = collect(comm, MPI.COMM_WORLD.rank)
    lengths = lengths or sizes_for(comm.size)
    terms = [[hard_numbers(rank, length, way.dtype, way.wire) for rank in members] for length in lengths]
    sums = sum_by(way, comm, [term[comm.rank] for term in terms])
    found = [complaint(values, term, way) for values, term in zip(sums, terms, strict=True)]
    bits = hashlib.sha256(b"".join(bytes(memory(values)) for values in sums)).hexdigest()
    if len(set(collect(comm, bits))) > 1:
        found.append(f"{way}: ranks differ in their bits")
    return [text for texts in collect(comm, found) for text in texts if text]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_sum_is_the_float64_sum_within_its_roundings_and_has_the_same_bits_on_all_ranks(comm, way, split):
    group = MPI.Intracomm(comm.Split(*SPLITS[split](comm.rank)))
    assert complaints(group, way) == []
    group.Free()


@pytest.mark.parametrize("way", [way for way in WAYS if way.name != "native"], ids=str)
def test_no_way_rests_on_sends_that_mpi_buffers(comm, monkeypatch, way):
    forbid_buffering(monkeypatch)
    assert complaints(Unbuffered(comm), way) == []


class Losing(MPI.Intracomm):
    """A communicator on which one of this rank's long sends, by its number, brings zeros: that hop is lost."""

    lost: int | None = None
    sent: ClassVar[list[bytes]] = []

    def Isend(self, buffer, *where):
        if len(buffer[0]) > LONG:
            self.sent.append(bytes(len(buffer[0])))
            if len(self.sent) - 1 == self.lost:
                buffer = [self.sent[-1], *buffer[1:]]
        return super().Isend(buffer, *where)


LONG = 8000  # bytes; only messages of the largest size are longer, even in bf16 on 8 ranks
MUTANTS = [Way("all_reduce"), Way("all_reduce", wire=torch.bfloat16), Way("ring"), Way("node", hosts="hosts of two")]


@pytest.mark.mpi(min_size=3)
@pytest.mark.parametrize("way", MUTANTS, ids=str)
def test_a_hop_lost_by_one_rank_is_caught(comm, monkeypatch, way):
    for module in (exchange, node):
        monkeypatch.setattr(module, "Comm", Losing)
    monkeypatch.setattr(Losing, "sent", [])
    assert complaints(Losing(comm), way) == []
    for lost in (0, share(comm, len(Losing.sent)) - 1):  # while sums are made, and while they are spread
        Losing.sent.clear()
        monkeypatch.setattr(Losing, "lost", lost if comm.rank == 0 else None)
        assert complaints(Losing(comm), way), f"send {lost}"


@pytest.mark.mpi(min_size=3)
@pytest.mark.parametrize("way", MUTANTS, ids=str)
def test_two_chunks_swapped_by_one_rank_are_caught(comm, monkeypatch, way):
    bounds = ring.aligned_part
    if comm.rank == 0:
        monkeypatch.setattr(ring, "aligned_part", lambda index, *whole: bounds({0: 1, 1: 0}.get(index, index), *whole))
    assert complaints(comm, way, [30 * UNIT * comm.size])  # chunks of one length, or MPI itself would object
