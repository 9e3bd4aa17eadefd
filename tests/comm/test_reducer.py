"""Gradients summed over replicas: the plain sum, started while backward still runs, and a failed thread is heard of."""

from __future__ import annotations

import threading

import pytest
import torch

from mpitrain.comm.buckets import Bucket, fill_buckets
from mpitrain.comm.buffers import Transport
from mpitrain.comm.reducer import GradientReducer
from mpitrain.runtime.agree import collect
from mpitrain.split import part

pytestmark = pytest.mark.mpi(min_size=1)


def model_of(rank: int) -> torch.nn.Sequential:
    torch.manual_seed(rank)
    return torch.nn.Sequential(*(torch.nn.Linear(7, 7) for _ in range(4)))


def backward_twice(module: torch.nn.Module, rank: int, reducer: GradientReducer) -> None:
    """Two micro-batches, of which the second is the last of its step."""
    for number in range(2):
        if number == 1:
            reducer.arm()
        generator = torch.Generator().manual_seed(10 * rank + number)
        module(torch.rand(3, 7, generator=generator)).square().sum().backward()


def sum_without_reducer(size: int) -> list[torch.Tensor]:
    """All gradients of all ranks added up in fp64, in the order of the buckets."""
    total = None
    for rank in range(size):
        module = model_of(0)
        for number in range(2):
            generator = torch.Generator().manual_seed(10 * rank + number)
            module(torch.rand(3, 7, generator=generator)).square().sum().backward()
        flat = torch.cat([p.grad.reshape(-1).double() for p in reversed(list(module.parameters()))])
        total = flat if total is None else total + flat
    return total


@pytest.mark.parametrize(
    "algorithm, wire, tolerance", [("ring", None, 1e-5), ("native", None, 1e-5), ("ring", torch.bfloat16, 3e-2)]
)
@pytest.mark.parametrize("bucket_bytes", [1, 300, 10**6])
def test_the_own_chunk_of_every_bucket_holds_the_sum_of_all_micro_batches_of_all_ranks(
    comm, algorithm, wire, tolerance, bucket_bytes
):
    module = model_of(0)
    buckets = fill_buckets(module, bucket_bytes)
    reducer = GradientReducer(comm, buckets, Transport(), algorithm=algorithm, wire_dtype=wire)
    for _ in range(2):  # the second step must not see the first one's gradients
        reducer.start_step()
        backward_twice(module, comm.rank, reducer)
        reducer.finish()
    reducer.close()
    expected, start = sum_without_reducer(comm.size), 0
    for bucket in buckets:
        own = slice(*part(comm.rank, len(bucket.gradients), comm.size))
        wanted = expected[start : start + len(bucket.gradients)]
        torch.testing.assert_close(bucket.gradients[own].double(), wanted[own], rtol=tolerance, atol=tolerance * 10)
        start += len(bucket.gradients)
    assert start == len(expected)


def test_a_replica_without_micro_batches_joins_in_with_zeros(comm):
    module = model_of(0)
    reducer = GradientReducer(comm, buckets := fill_buckets(module, 300), Transport())
    reducer.start_step()
    if comm.rank == 0:
        backward_twice(module, 0, reducer)
    reducer.finish()
    reducer.close()
    total = (
        torch.cat([bucket.gradients[slice(*bucket.chunk(comm.rank, comm.size))] for bucket in buckets]).double().sum()
    )
    assert sum(collect(comm, float(total))) == pytest.approx(float(sum_without_reducer(1).sum()), rel=1e-5)


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


def test_full_buckets_travel_while_the_last_backward_still_runs_and_not_before(comm, monkeypatch):
    first, last = torch.nn.Linear(7, 7), torch.nn.Linear(7, 7)
    reducer = GradientReducer(comm, fill_buckets(torch.nn.Sequential(first, last), 1), Transport())
    reduce, begun, at_arming = reducer._reduce, threading.Event(), []
    monkeypatch.setattr(reducer, "_reduce", lambda gradients: (reduce(gradients), begun.set()))
    reducer.start_step()
    last(first(torch.rand(3, 7))).sum().backward()
    at_arming.append(begun.is_set())
    reducer.arm()
    last(Wait.apply(first(torch.rand(3, 7)), begun)).sum().backward()
    reducer.finish()
    reducer.close()
    assert at_arming == [False]
    assert begun.is_set()


def test_buckets_travel_in_the_same_order_on_all_ranks_whatever_the_order_of_gradients(comm, monkeypatch):
    layers = [torch.nn.Linear(3, 3, bias=False) for _ in range(4)]
    buckets = [Bucket([(str(number), layer.weight)]) for number, layer in enumerate(layers)]
    reducer = GradientReducer(comm, buckets, Transport())
    reduce, order = reducer._reduce, []
    monkeypatch.setattr(reducer, "_reduce", lambda gradients: (order.append(gradients.data_ptr()), reduce(gradients)))
    reducer.start_step()
    reducer.arm()
    for layer in layers if comm.rank % 2 else reversed(layers):
        layer(torch.ones(1, 3)).sum().backward()
    reducer.finish()
    reducer.close()
    assert order == [bucket.gradients.data_ptr() for bucket in buckets]
    for bucket in buckets:
        own = slice(*bucket.chunk(comm.rank, comm.size))
        assert torch.equal(bucket.gradients[own], torch.full_like(bucket.gradients[own], float(comm.size)))


def test_what_fails_in_the_thread_is_raised_by_finish(comm, monkeypatch):
    module = model_of(0)
    reducer = GradientReducer(comm, fill_buckets(module, 10**6), Transport())

    def fail(gradients: torch.Tensor) -> None:
        raise ZeroDivisionError("in the thread")

    monkeypatch.setattr(reducer, "_reduce", fail)
    reducer.start_step()
    backward_twice(module, comm.rank, reducer)
    with pytest.raises(ZeroDivisionError, match="in the thread"):
        reducer.finish()
    reducer.close()
    assert not reducer._thread.is_alive()


@pytest.mark.parametrize("algorithm", ["ring", "native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_rank_gets_the_weights_of_every_owner(comm, algorithm, dtype):
    bucket = Bucket([("a", torch.nn.Parameter(torch.zeros(11))), ("b", torch.nn.Parameter(torch.zeros(2, 3)))])
    bucket.cast(dtype)
    reducer = GradientReducer(comm, [bucket], Transport(), algorithm=algorithm)
    bucket.weights[slice(*bucket.chunk(comm.rank, comm.size))] = comm.rank + 1
    reducer.gather_weights()
    reducer.close()
    owners = [rank + 1 for rank in range(comm.size) for _ in range(*part(rank, 17, comm.size))]
    assert bucket.weights.tolist() == owners
    assert bucket.places[1].parameter.flatten().tolist() == owners[11:]
