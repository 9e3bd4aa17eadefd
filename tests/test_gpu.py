"""On a GPU, shared by all ranks if there is one: the numbers of a CPU, and of any mesh."""

from __future__ import annotations

import pytest
import torch
from mpi4py import MPI
from small import small_card, train_small

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
