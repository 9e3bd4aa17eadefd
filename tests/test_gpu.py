"""On a GPU, shared by all ranks if there is one: the numbers of a CPU, and of any mesh."""

from __future__ import annotations

import pytest
import torch
from mpi4py import MPI
from small import small_card, train_small

from mpitrain.checkpoint.load import fill, verify
from mpitrain.checkpoint.manifest import Progress
from mpitrain.checkpoint.save import save
from mpitrain.comm import ring
from mpitrain.comm.buckets import StateSlice
from mpitrain.comm.buffers import Transport

pytestmark = [pytest.mark.mpi(min_size=1), pytest.mark.gpu]

MESHES = {1: [(1, 1)], 2: [(2, 1), (1, 2)], 4: [(2, 2), (1, 4), (4, 1)]}


def test_a_gpu_gives_the_numbers_of_a_cpu_without_dropout(comm):
    # With dropout they differ: each kind of device has random numbers of its own.
    card = small_card(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    on_cpu, on_gpu = (train_small(MPI.COMM_SELF, 1, 1, 10, card=card, device=kind) for kind in ("cpu", "cuda"))
    assert on_gpu.losses == pytest.approx(on_cpu.losses, rel=1e-4)
    assert on_gpu.grad_norms == pytest.approx(on_cpu.grad_norms, rel=1e-3)


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-4), ("bf16", 3e-2)])
def test_any_mesh_on_gpus_gives_the_numbers_of_one_rank_with_dropout(comm, precision, tolerance):
    reference = train_small(MPI.COMM_SELF, 1, 1, 10, device="cuda", precision=precision)
    for data, pipe in MESHES[comm.size]:
        run = train_small(comm, data, pipe, 10, device="cuda", precision=precision)
        assert run.losses == pytest.approx(reference.losses, rel=tolerance)
        assert run.grad_norms == pytest.approx(reference.grad_norms, rel=10 * tolerance)


def test_fp16_finds_a_loss_scale_and_learns(comm):
    run = train_small(comm, comm.size, 1, 12, device="cuda", precision="fp16")
    assert run.updated[-1]
    assert run.losses[-1] < run.losses[0]
    assert torch.cuda.memory_allocated() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("length", [0, 1, 97, 70001])
def test_the_ring_sums_tensors_that_live_on_a_gpu(comm, length, dtype):
    flat = torch.full((length,), float(comm.rank + 1), dtype=dtype, device="cuda")
    ring.all_reduce(comm, flat, Transport(torch.device("cuda", torch.cuda.current_device())))
    assert torch.equal(flat.cpu(), torch.full((length,), comm.size * (comm.size + 1) / 2, dtype=dtype))


def test_a_checkpoint_of_tensors_on_a_gpu_loads_with_the_same_bits(comm, mpi_tmp_path):
    values = torch.arange(10.0, device="cuda") / 3 + comm.rank
    name = f"bert.part{comm.rank}"
    made = StateSlice("weight", name, (10,), 0, 10, values)
    progress = Progress(step=1)
    place = save(comm, mpi_tmp_path, [made], progress=progress, mesh={}, identity={}, documents={})
    loaded = StateSlice("weight", name, (10,), 0, 10, torch.zeros(10, device="cuda"))
    fill(comm, place, verify(comm, place), [loaded])
    assert torch.equal(loaded.values, values)
