"""Rows gathered and sums scattered by the ranks of a tensor group, in shared memory and in messages."""

from __future__ import annotations

import pytest
import torch
from communicators import on_hosts

from mpitrain.comm import group as groups
from mpitrain.comm.buffers import Transport
from mpitrain.comm.group import MemoryGroup, MessageGroup, add_up, open_group
from mpitrain.split import part

pytestmark = pytest.mark.mpi(min_size=1)
KINDS = pytest.mark.parametrize("kind", [MessageGroup, MemoryGroup])


def rows_of(rank: int, num_rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(num_rows, width, generator=generator).to(dtype)


@pytest.fixture(params=[1 << 20, 1280], ids=["one round", "many rounds"])
def slab(request, monkeypatch):
    monkeypatch.setattr(groups, "SLAB", request.param)


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_gathered_and_sums_scattered(comm, kind, dtype, slab):
    group = kind(comm, Transport(patient=True))
    for num_rows, width in [(0, 3), (1, 5), (7, 3), (64, 16), (13, 1), (2, 40)]:
        mine = slice(*part(comm.rank, num_rows, comm.size))
        whole = rows_of(99, num_rows, width, dtype)
        assert torch.equal(group.gather_rows(whole[mine].clone(), num_rows), whole)
        assert torch.equal(group.gather_rows(whole.t().contiguous().t()[mine], num_rows), whole), "strided"
        everyone = [rows_of(rank, num_rows, width, dtype) for rank in range(comm.size)]
        found = group.scatter_sum(everyone[comm.rank].clone())
        exact = torch.zeros(num_rows, width)
        for each in everyone:  # in the order of ranks
            exact += each.float()
        assert torch.equal(found, exact.to(dtype)[mine])
    assert group.seconds > 0
    group.close()


@KINDS
def test_gathered_rows_may_be_changed_at_once_and_what_came_stays(comm, kind, slab):
    group, found = kind(comm, Transport(patient=True)), []
    for number in range(50):
        own = torch.full((2, 8), float(number * comm.size + comm.rank))
        found.append(group.gather_rows(own, 2 * comm.size))
        own.fill_(-1)
        found.append(group.scatter_sum(torch.full((comm.size, 8), float(number))))
    for number, (gathered, summed) in enumerate(zip(found[::2], found[1::2], strict=True)):
        ranks = torch.arange(comm.size, dtype=torch.float32) + number * comm.size
        assert torch.equal(gathered, ranks.repeat_interleave(2)[:, None].expand(-1, 8))
        assert torch.equal(summed, torch.full((1, 8), float(number * comm.size)))
    group.close()


def test_a_group_shares_memory_only_on_one_host_with_room(comm, monkeypatch):
    transport = Transport(patient=True)

    def kind_of(axis):
        group = open_group(comm, axis, transport)
        group.close()
        return type(group)

    assert kind_of(comm) is (MemoryGroup if comm.size > 1 else MessageGroup)
    assert kind_of(on_hosts(comm, "one and the rest")) is MessageGroup
    # One rank alone has no room: all of its group send.
    monkeypatch.setattr(groups, "free_shared_memory", lambda: 0 if comm.rank == comm.size - 1 else None)
    assert kind_of(comm) is MessageGroup


def test_sums_are_rounded_once():
    parts = [torch.tensor([256.0, 1.0]).bfloat16(), torch.tensor([1.0, 1.0]).bfloat16(), torch.ones(2).bfloat16()]
    add_up(parts, parts[1])
    assert parts[1].tolist() == [258.0, 3.0]
