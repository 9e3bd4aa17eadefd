"""Which exchange a run takes, and what it says when memory cannot be shared."""

from __future__ import annotations

import pytest
import torch

from mpitrain.comm import choice
from mpitrain.comm.buckets import fill_buckets
from mpitrain.comm.buffers import Transport
from mpitrain.comm.choice import choose_exchange
from mpitrain.comm.exchange import MessageExchange
from mpitrain.comm.node import NodeExchange
from mpitrain.comm.window import Layout
from mpitrain.errors import UsageError

pytestmark = pytest.mark.mpi(min_size=1)


def chosen(comm, **options) -> tuple[type, str]:
    buckets = fill_buckets(torch.nn.Linear(100, 100), 10**6)
    exchange, why = choose_exchange(comm, comm, Transport(), buckets, torch.float32, **options)
    exchange.close()
    return type(exchange), why


def test_replicas_that_share_a_node_share_memory(comm):
    kind, why = chosen(comm)
    assert (kind is NodeExchange) == (comm.size > 1)
    assert why.startswith("node: ") if comm.size > 1 else why == "", "one replica has nothing to exchange"


@pytest.mark.parametrize("algorithm, words", [("ring", "ring: messages"), ("native", "native: MPI's own")])
def test_what_is_asked_for_is_taken(comm, algorithm, words):
    kind, why = chosen(comm, algorithm=algorithm)
    assert kind is MessageExchange and why.startswith(words)


def test_the_wire_is_named(comm):
    assert "in bfloat16" in chosen(comm, algorithm="ring", wire_dtype=torch.bfloat16)[1]


@pytest.mark.mpi(min_size=2)
def test_too_little_shared_memory_on_one_rank_is_known_to_all(comm, monkeypatch):
    if comm.rank == comm.size - 1:
        monkeypatch.setattr(choice, "free_shared_memory", lambda: 70 << 20)
    monkeypatch.setattr(choice, "HEADROOM", 70 << 20)
    kind, why = chosen(comm)
    assert kind is MessageExchange
    assert "/dev/shm has 70 MiB free, 0 MiB are needed" in why
    with pytest.raises(
        UsageError, match=r"--comm.algorithm node: /dev/shm has 70 MiB free.*auto or ring would work"
    ) as e:
        chosen(comm, algorithm="node")
    assert e.value.agreed


@pytest.mark.mpi(min_size=2)
def test_buckets_fill_the_window_without_overlap(comm):
    layout = Layout(comm.size, (900, 100), (10, 0), 2)
    segments = [layout.segment(rank) for rank in range(comm.size)]
    assert [start for start, _ in segments] == [0, *(stop for _, stop in segments[:-1])]
    assert layout.weights >= 2 * 64 * comm.size and layout.gradients >= layout.weights + 2000
    assert all(stop - start >= 4000 + 4 * 12 for start, stop in segments)
    assert all(bound % 4096 == 0 for segment in segments for bound in segment)
