"""Stages that work together give the numbers of one, with sends that wait for their receives as well."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from communicators import forbid_buffering
from small import NUM_LABELS, small_card, small_split, train_small

from mpitrain.comm.buffers import Transport
from mpitrain.evaluate import load_inference
from mpitrain.model.bert import BertStage, num_blocks
from mpitrain.model.cost import block_costs
from mpitrain.model.initial import initialize
from mpitrain.pipeline.balance import split_blocks
from mpitrain.pipeline.executor import Executor
from mpitrain.pipeline.schedule import program
from mpitrain.runtime import mesh as meshes
from mpitrain.runtime.agree import share

pytestmark = pytest.mark.mpi(min_size=2)
MESHES = {2: [(1, 2), (2, 1)], 3: [(1, 3)], 4: [(2, 2), (1, 4)], 8: [(4, 2), (2, 4)]}


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_nothing_rests_on_sends_that_mpi_buffers(comm, monkeypatch, schedule):
    for data, pipe in MESHES.get(comm.size, []):
        buffered = train_small(comm, data, pipe, 3, schedule=schedule)
        with monkeypatch.context() as patch:
            forbid_buffering(patch)
            unbuffered = train_small(comm, data, pipe, 3, schedule=schedule)
        assert (unbuffered.losses, unbuffered.grad_norms) == (buffered.losses, buffered.grad_norms)


def executor_on(comm, pipe: int) -> tuple[meshes.Mesh, Executor, BertStage]:
    card = small_card()
    mesh = meshes.build(comm, comm.size // pipe, pipe)
    stage = BertStage(card, NUM_LABELS, *split_blocks(block_costs(card, NUM_LABELS, 20.0), pipe)[mesh.stage])
    initialize(stage, card, 0)
    return mesh, Executor(stage, mesh, Transport(patient=True), card.hidden_size), stage


@pytest.mark.parametrize("num_micro_batches", [0, 1, 5])
def test_inference_gives_the_logits_of_one_rank_on_the_last_stage_and_nothing_elsewhere(comm, num_micro_batches):
    split = small_split()
    parts = [np.arange(3 * number, 3 * number + 1 + number) for number in range(num_micro_batches)]
    alone = BertStage(small_card(), NUM_LABELS, 0, num_blocks(small_card()))
    initialize(alone, small_card(), 0)
    mesh, executor, _ = executor_on(comm, min(comm.size, 4))
    batches = [load_inference(split, part, mesh, torch.device("cpu")) for part in parts]
    found = executor.infer(program("1f1b", mesh.stage, mesh.num_stages, len(parts), train=False), batches)
    assert len(found) == (len(parts) if mesh.is_last else 0)
    for part, batch, logits in zip(parts, batches, found, strict=False):
        with torch.no_grad():
            expected = alone(torch.from_numpy(split.read("tokens", part)), batch.layout)
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)
    mesh.free()


def test_waiting_is_told_from_computing(comm):
    mesh, executor, _ = executor_on(comm, min(comm.size, 4))
    part = np.arange(4)
    batches = [load_inference(small_split(), part, mesh, torch.device("cpu"))]
    comm.Barrier()
    if mesh.is_first:
        time.sleep(1)  # longer than a busy machine may keep the others from starting
    executor.infer(program("1f1b", mesh.stage, mesh.num_stages, 1, train=False), batches)
    waited = share(mesh.pipe_axis, executor.seconds_waited, mesh.num_stages - 1)
    assert waited > 0.25
    assert not mesh.is_first or executor.seconds_waited < waited
    mesh.free()
