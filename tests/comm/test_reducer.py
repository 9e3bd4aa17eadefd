"""Gradients summed over replicas: the plain sum, started while backward still runs, and a failed thread is heard of."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from communicators import HOSTS
from reducing import check_squares, reducing

from mpitrain.comm.buckets import Bucket, fill_buckets
from mpitrain.model import linear
from mpitrain.optim import ShardedAdamW
from mpitrain.runtime.agree import collect
from mpitrain.sections import Train

pytestmark = pytest.mark.mpi(min_size=1)
ALGORITHMS = ["ring", "node", *HOSTS]
WAYS = [("native", None), *((algorithm, wire) for algorithm in ALGORITHMS for wire in (None, torch.bfloat16))]


def model_of(rank: int) -> torch.nn.Sequential:
    torch.manual_seed(rank)
    return torch.nn.Sequential(*(torch.nn.Linear(7, 7) for _ in range(4)))


def backward_twice(module: torch.nn.Module, rank: int) -> None:
    """Two micro-batches."""
    for number in range(2):
        generator = torch.Generator().manual_seed(10 * rank + number)
        module(torch.rand(3, 7, generator=generator)).square().sum().backward()


def sum_without_reducer(size: int) -> dict[str, torch.Tensor]:
    """All gradients of all ranks added up in fp64, by parameter."""
    total: dict[str, torch.Tensor] = {}
    for rank in range(size):
        module = model_of(0)
        for number in range(2):
            generator = torch.Generator().manual_seed(10 * rank + number)
            module(torch.rand(3, 7, generator=generator)).square().sum().backward()
        for name, parameter in module.named_parameters():
            total[name] = total.get(name, 0) + parameter.grad.double()
    return total


@pytest.mark.parametrize("algorithm, wire", WAYS)
@pytest.mark.parametrize("bucket_bytes", [1, 300, 10**6])
def test_the_own_part_of_every_bucket_holds_the_sum_of_all_micro_batches_of_all_ranks(
    comm, algorithm, wire, bucket_bytes
):
    module = model_of(0)
    expected = sum_without_reducer(comm.size)
    tolerance = 3e-2 if wire else 1e-5
    with reducing(comm, buckets := fill_buckets(module, bucket_bytes), algorithm, wire) as (reducer, _):
        for _ in range(2):  # the second step must not see the first one's gradients
            reducer.start_step(2)
            backward_twice(module, comm.rank)
            reducer.finish()
            comm.Barrier()  # as the vote of a step
        check_squares(buckets, algorithm)
        pieces = [piece for bucket in buckets for piece in bucket.pieces]
        for piece in pieces:
            wanted = expected[piece.name].reshape(-1)[piece.start : piece.stop]
            torch.testing.assert_close(piece.gradients.double(), wanted, rtol=tolerance, atol=tolerance * 10)
        owned = collect(comm, [[piece.name, piece.start, piece.stop] for piece in pieces])
    for name, values in expected.items():
        found = sorted(part[1:] for parts in owned for part in parts if part[0] == name)
        assert [index for start, stop in found for index in range(start, stop)] == list(range(values.numel())), "once"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_norm_of_millions_of_numbers_is_right(comm, algorithm):
    """torch's own norm of as many in fp32 is 2e-5 off."""
    size, generator = 1_500_000, torch.Generator().manual_seed(comm.rank)
    bucket = Bucket([("values", torch.nn.Parameter(torch.zeros(size)))])
    with reducing(comm, [bucket], algorithm) as (reducer, _):
        reducer.start_step(1)
        (bucket.members[0].parameter * torch.randn(size, generator=generator)).sum().backward()
        reducer.finish()
        found = sum(collect(comm, ShardedAdamW([bucket], Train()).squared_norm()))
        expected = sum(collect(comm, float(bucket.reduced.double().square().sum())))
    assert found == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_replica_without_micro_batches_joins_in_with_zeros(comm, algorithm):
    module = model_of(0)
    with reducing(comm, buckets := fill_buckets(module, 300), algorithm) as (reducer, _):
        reducer.start_step(2 if comm.rank == 0 else 0)
        if comm.rank == 0:
            backward_twice(module, 0)
        reducer.finish()
        total = torch.cat([bucket.reduced for bucket in buckets]).double().sum()
    expected = sum(float(values.sum()) for values in sum_without_reducer(1).values())
    assert sum(collect(comm, float(total))) == pytest.approx(expected, rel=1e-5)


class Wait(torch.autograd.Function):
    """In backward, wait until an event is set."""

    @staticmethod
    def forward(context, inputs, event):
        context.event = event
        return inputs.clone()

    @staticmethod
    def backward(context, gradient):
        assert context.event.wait(20), "no bucket was reduced while backward ran"
        return gradient, None


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_full_buckets_travel_while_the_last_backward_still_runs_and_not_before(comm, monkeypatch, algorithm):
    first, last = torch.nn.Linear(7, 7), torch.nn.Linear(7, 7)
    begun, at_first = threading.Event(), []
    with reducing(comm, fill_buckets(torch.nn.Sequential(first, last), 1), algorithm) as (reducer, exchange):
        reduce = exchange.reduce
        monkeypatch.setattr(exchange, "reduce", lambda number: (reduce(number), begun.set()))
        reducer.start_step(2)
        last(first(torch.rand(3, 7))).sum().backward()
        at_first.append(begun.is_set())
        last(Wait.apply(first(torch.rand(3, 7)), begun)).sum().backward()
        reducer.finish()
    assert at_first == [False]
    assert begun.is_set()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_gradients_that_are_put_off_are_summed_and_travel_as_they_come(comm, monkeypatch, algorithm):
    layers = [torch.nn.Linear(7, 7) for _ in range(2)]
    work, early, orders = [], threading.Event(), []
    with reducing(comm, fill_buckets(torch.nn.Sequential(*layers), 1), algorithm) as (reducer, exchange):
        reduce = exchange.reduce
        monkeypatch.setattr(exchange, "reduce", lambda number: (reduce(number), orders.append(number), early.set()))
        reducer.start_step(1)
        x = torch.ones(3, 7)
        for layer in layers:
            x = linear.linear(x, layer.weight, layer.bias)
        with linear.postponed(work):
            x.sum().backward()
        assert len(work) == 2
        assert not orders
        work[0]()  # of the last layer, whose buckets are the first
        assert early.wait(20), "no bucket was reduced before the last product"
        work[1]()
        reducer.finish()
        assert orders == [0, 1, 2, 3]
        bias = next(bucket for bucket in exchange.buckets if bucket.members[0].name == "1.bias")
        assert sum(collect(comm, float(bias.reduced.sum()))) == pytest.approx(3 * 7 * comm.size)


def test_where_ranks_share_cores_and_memory_nothing_is_summed_beside_the_backward_pass(comm, monkeypatch):
    layers, early = torch.nn.Sequential(torch.nn.Linear(7, 7), torch.nn.Linear(7, 7)), []
    with reducing(comm, fill_buckets(layers, 1), "node", patient=True) as (reducer, exchange):
        reduce, ended = exchange.reduce, threading.Event()
        monkeypatch.setattr(exchange, "reduce", lambda number: (early.append(not ended.is_set()), reduce(number)))
        reducer.start_step(1)
        layers(torch.rand(3, 7)).sum().backward()
        time.sleep(0.1)
        ended.set()
        reducer.finish()
    assert early == [False] * 4


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_buckets_travel_in_the_same_order_on_all_ranks_whatever_the_order_of_gradients(comm, monkeypatch, algorithm):
    layers = [torch.nn.Linear(3, 3, bias=False) for _ in range(4)]
    buckets = [Bucket([(str(number), layer.weight)]) for number, layer in enumerate(layers)]
    order = []
    with reducing(comm, buckets, algorithm) as (reducer, exchange):
        reduce = exchange.reduce
        monkeypatch.setattr(exchange, "reduce", lambda number: (order.append(number), reduce(number)))
        reducer.start_step(1)
        for layer in layers if comm.rank % 2 else reversed(layers):
            layer(torch.ones(1, 3)).sum().backward()
        reducer.finish()
        for bucket in buckets:
            for piece in bucket.pieces:
                assert torch.equal(piece.gradients, torch.full_like(piece.gradients, float(comm.size)))
    assert order == [0, 1, 2, 3]


def test_what_fails_in_the_thread_is_raised_by_finish(comm, monkeypatch):
    module = model_of(0)
    with reducing(comm, fill_buckets(module, 10**6)) as (reducer, exchange):

        def fail(number: int) -> None:
            raise ZeroDivisionError("in the thread")

        monkeypatch.setattr(exchange, "reduce", fail)
        reducer.start_step(2)
        backward_twice(module, comm.rank)
        with pytest.raises(ZeroDivisionError, match="in the thread"):
            reducer.finish()
    assert not reducer._thread.is_alive()


@pytest.mark.parametrize("algorithm", ["native", *ALGORITHMS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_rank_sees_the_weights_of_every_owner(comm, algorithm, dtype):
    bucket = Bucket([("a", torch.nn.Parameter(torch.zeros(1100))), ("b", torch.nn.Parameter(torch.zeros(2, 300)))])
    with reducing(comm, [bucket], algorithm, dtype=dtype) as (_, exchange):
        assert not any(member.parameter.any() for member in bucket.members)
        comm.Barrier()  # as the vote of a step
        for piece in bucket.pieces:
            piece.weights.fill_(comm.rank + 1)
        exchange.spread()
        owned = enumerate(collect(comm, [[piece.name, piece.start, piece.stop] for piece in bucket.pieces]))
        owners = {name: {start: (stop, rank + 1)} for rank, pieces in owned for name, start, stop in pieces}
        for member in bucket.members:
            for start, (stop, owner) in owners[member.name].items():
                assert set(member.parameter.flatten()[start:stop].tolist()) == {owner}
        assert all(member.parameter.all() for member in bucket.members), "no element without an owner"


def test_on_a_node_there_is_one_copy_of_the_weights(comm):
    module = model_of(0)
    with reducing(comm, buckets := fill_buckets(module, 300), "node"):
        comm.Barrier()
        if comm.rank == comm.size - 1:
            buckets[0].weights.fill_(7.0)
        comm.Barrier()
        assert set(buckets[0].weights.tolist()) == {7.0}
    assert next(module.parameters()).numel() == 0, "shared memory is gone, and nobody reads it any more"
