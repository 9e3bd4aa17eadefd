"""On a GPU, shared by all ranks if there is one: the numbers of a CPU, and of any mesh."""

from __future__ import annotations

import sys
from itertools import product

import pytest
import torch
from mpi4py import MPI
from small import small_card, train_small

from mpitrain.checkpoint.load import fill, verify
from mpitrain.checkpoint.manifest import Progress
from mpitrain.checkpoint.saver import Saver
from mpitrain.comm import gpu, ring, segments
from mpitrain.comm.buckets import StateSlice
from mpitrain.comm.buffers import Transport

pytestmark = [pytest.mark.mpi(min_size=1), pytest.mark.gpu]

MESHES = {1: [(1, 1)], 2: [(2, 1), (1, 2)], 4: [(2, 2), (1, 4), (4, 1)]}


@pytest.fixture(scope="module")
def ways() -> list[bool]:
    """Staged, and direct where this MPI takes device memory; `direct` as it is given to Transport."""
    device = torch.device("cuda", torch.cuda.current_device())
    direct, why = gpu.decide(MPI.COMM_WORLD, device, "auto")
    print(f"direct: {direct} ({why})")
    return [False, True] if direct else [False]


def on_this_gpu(direct: bool) -> Transport:
    return Transport(torch.device("cuda", torch.cuda.current_device()), direct, patient=True)


def test_a_gpu_gives_the_numbers_of_a_cpu_without_dropout(comm):
    # With dropout they differ: each kind of device has random numbers of its own.
    card = small_card(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    on_cpu, on_gpu = (train_small(MPI.COMM_SELF, 1, 1, 10, card=card, device=kind) for kind in ("cpu", "cuda"))
    assert on_gpu.losses == pytest.approx(on_cpu.losses, rel=1e-4)
    assert on_gpu.grad_norms == pytest.approx(on_cpu.grad_norms, rel=1e-3)


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-4), ("bf16", 3e-2)])
def test_any_mesh_on_gpus_gives_the_numbers_of_one_rank_with_dropout(comm, ways, precision, tolerance):
    reference = train_small(MPI.COMM_SELF, 1, 1, 10, device="cuda", precision=precision)
    for (data, pipe), direct in product(MESHES[comm.size], ways):
        run = train_small(comm, data, pipe, 10, device="cuda", precision=precision, direct=direct)
        assert run.losses == pytest.approx(reference.losses, rel=tolerance)
        assert run.grad_norms == pytest.approx(reference.grad_norms, rel=10 * tolerance)


def test_fp16_finds_a_loss_scale_and_learns(comm):
    run = train_small(comm, comm.size, 1, 12, device="cuda", precision="fp16")
    assert run.updated[-1]
    assert run.losses[-1] < run.losses[0]
    assert torch.cuda.memory_allocated() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("length", [0, 1, 97, 70001])
@pytest.mark.parametrize("segment", [1000, 1 << 18])
def test_the_ring_sums_tensors_that_live_on_a_gpu(comm, monkeypatch, ways, length, dtype, segment):
    monkeypatch.setattr(ring, "SEGMENT", segment)
    for direct in ways:
        flat = torch.full((length,), float(comm.rank + 1), dtype=dtype, device="cuda")
        ring.AllReduce(comm, flat, on_this_gpu(direct))()
        assert torch.equal(flat.cpu(), torch.full((length,), comm.size * (comm.size + 1) / 2, dtype=dtype))


@pytest.mark.parametrize("wire", [None, torch.bfloat16])
def test_the_ring_waits_for_kernels_that_still_write_and_gives_what_the_next_ones_read(comm, ways, wire):
    length = 1 << 22
    for direct in ways:
        flat = torch.zeros(length, device="cuda")
        for turn in range(1, 4):
            torch.cuda._sleep(50_000_000)  # cycles: longer than it takes to come to the first message
            flat.copy_(torch.arange(length, device="cuda").remainder(8) + turn)
            ring.AllReduce(comm, flat, on_this_gpu(direct), wire)()
            doubled = flat * 2
            flat.zero_()  # must not be overtaken by what is still sent
            expected = (torch.arange(length).remainder(8) + turn) * 2.0 * comm.size
            assert torch.equal(doubled.cpu(), expected)


def test_a_parcel_carries_what_the_last_kernel_wrote(comm, ways):
    for direct in ways:
        transport = on_this_gpu(direct)
        torch.cuda._sleep(50_000_000)
        sent = torch.arange(1 << 20, dtype=torch.bfloat16, device="cuda").remainder(64) + comm.rank
        left, right = (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size
        arriving = transport.post(comm, (1 << 20,), torch.bfloat16, left, 3)
        leaving = transport.send(comm, sent, right, 3)
        assert torch.equal(arriving.received() - left, sent - comm.rank)
        leaving.sent()


def test_the_ring_pins_its_buffers_once(comm):
    flat = torch.ones(1 << 22, device="cuda")
    pinned = []
    for _ in range(10):
        ring.AllReduce(comm, flat, on_this_gpu(False))()
        torch.cuda.synchronize()
        pinned.append(torch.cuda.host_memory_stats()["num_host_alloc"])
    assert pinned[-1] - pinned[0] <= segments.SENDS_AHEAD, "a block or two more may be in use at an unlucky moment"


def test_the_check_passes_for_memory_of_the_cpu_and_decides_for_the_gpu_without_harm(comm, ways):
    assert gpu.try_out([sys.executable, "-m", gpu.__name__, "cpu"]) == ""
    found = gpu.try_out([sys.executable, "-m", gpu.__name__, "cuda:0"])
    assert not (found and True in ways), found


def test_a_checkpoint_of_tensors_on_a_gpu_loads_with_the_same_bits(comm, mpi_tmp_path):
    values = torch.arange(10.0, device="cuda") / 3 + comm.rank
    name = f"bert.part{comm.rank}"
    made = StateSlice("weight", name, (10,), 0, 10, values)
    progress = Progress(step=1)
    saver = Saver(comm, mpi_tmp_path, asynchronous=True)
    place = saver.save([made], progress=progress, mesh={}, identity={}, documents={}, keep=1)
    saver.finish()
    saver.close()
    loaded = StateSlice("weight", name, (10,), 0, 10, torch.zeros(10, device="cuda"))
    fill(comm, place, verify(comm, place), [loaded])
    assert torch.equal(loaded.values, values)
