"""Our own all-reduce against sums that NumPy makes, and the same bits on every rank."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from mpitrain.comm import ring
from mpitrain.comm.buffers import Transport, memory
from mpitrain.comm.wire import Wire
from mpitrain.runtime.agree import collect
from mpitrain.split import aligned_part

pytestmark = pytest.mark.mpi(min_size=1)
WAYS = {"direct": Transport(), "patient": Transport(patient=True), "staged": Transport(direct=False)}
WAYS["one host"] = Transport(one_host=True)
WAYS["patient and staged"] = Transport(direct=False, patient=True)
LENGTHS = [0, 1, 63, 64, 65, 3 * 64 - 1, 8 * 64, 8 * 64 + 1, 4099, 70001]


def contribution(rank: int, length: int, dtype: torch.dtype) -> torch.Tensor:
    values = np.random.Generator(np.random.Philox(key=[rank, length])).standard_normal(length)
    return torch.from_numpy(values).to(dtype)


@pytest.fixture(params=WAYS)
def transport(request) -> Transport:
    return WAYS[request.param]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("length", LENGTHS)
def test_all_reduce_is_the_sum_with_the_same_bits_on_every_rank(comm, length, dtype, transport):
    flat = contribution(comm.rank, length, dtype)
    ring.AllReduce(comm, flat, transport)()
    expected = sum(contribution(rank, length, dtype).double() for rank in range(comm.size))
    precision = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    torch.testing.assert_close(flat.double(), expected, rtol=precision, atol=precision * comm.size)
    bits = hashlib.sha256(bytes(memory(flat))).hexdigest()
    assert len(set(collect(comm, bits))) == 1


@pytest.mark.parametrize("length", LENGTHS)
def test_reduce_scatter_leaves_the_sum_in_the_own_chunk(comm, length, transport):
    flat = contribution(comm.rank, length, torch.float32)
    ring.ReduceScatter(comm, flat, transport)()
    own = slice(*aligned_part(comm.rank, length, comm.size))
    expected = sum(contribution(rank, length, torch.float32) for rank in range(comm.size))
    torch.testing.assert_close(flat[own], expected[own], rtol=1e-5, atol=1e-5)


def test_a_bf16_wire_sums_in_fp32(comm, transport):
    # 256 + 1 is 256 in bf16: only a sum that is kept in fp32 between hops can see the ones of its own rank.
    flat = torch.full((1000,), 1.0) if comm.rank else torch.full((1000,), 0.5)
    ring.ReduceScatter(comm, flat, transport, Wire(torch.bfloat16))()
    own = slice(*aligned_part(comm.rank, 1000, comm.size))
    assert torch.equal(flat[own], torch.full_like(flat[own], comm.size - 0.5))


def test_minus_zero_and_denormals_survive(comm):
    flat = torch.tensor([-0.0, 1e-42, 0.0])
    ring.AllReduce(comm, flat, Transport())()
    assert torch.equal(flat, torch.tensor([-0.0, 1e-42, 0.0]) * comm.size)
    assert torch.signbit(flat[0])


@pytest.mark.parametrize("wire", [None, torch.bfloat16])
@pytest.mark.parametrize("segment", [1, 7, 100])
def test_chunks_of_many_segments_are_summed_and_gathered_in_order(comm, monkeypatch, segment, wire, transport):
    monkeypatch.setattr(ring, "SEGMENT", segment)
    monkeypatch.setattr(ring, "MAX_MESSAGE", 8 * segment)
    for length in (5, 401):
        flat = torch.arange(length, dtype=torch.float32).remainder(16) + comm.rank
        ring.AllReduce(comm, flat, transport, wire)()
        size = comm.size
        assert torch.equal(flat, torch.arange(length).remainder(16) * float(size) + size * (size - 1) / 2)


def test_nothing_rests_on_messages_that_mpi_buffers(comm, monkeypatch, transport):
    """Synchronous sends end only when they are received: a ring that sent before it posted receives would hang."""

    class Synchronous:
        rank, size, Irecv, Isend = comm.rank, comm.size, comm.Irecv, comm.Issend

    monkeypatch.setattr(ring, "SEGMENT", 64)
    monkeypatch.setattr(ring, "MAX_MESSAGE", 512)
    flat = torch.full((1000,), comm.rank + 1.0)
    ring.AllReduce(Synchronous(), flat, transport)()
    assert torch.equal(flat, torch.full((1000,), comm.size * (comm.size + 1) / 2))


def test_a_view_with_gaps_is_refused(comm):
    with pytest.raises(ValueError, match="flat contiguous"):
        ring.AllReduce(comm, torch.zeros(10)[::2], Transport())()
