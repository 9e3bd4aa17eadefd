"""Stages that work together give the numbers of one, with sends that wait for their receives as well."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from communicators import forbid_buffering
from small import NUM_LABELS, small_arrangement, small_card, small_split, train_small

from mpitrain.comm.buffers import Transport
from mpitrain.evaluate import load_inference
from mpitrain.model.bert import BertStage, num_blocks
from mpitrain.model.card import ModelCard
from mpitrain.model.initial import initialize
from mpitrain.pipeline.executor import Executor
from mpitrain.pipeline.schedule import SCHEDULES
from mpitrain.runtime import mesh as meshes
from mpitrain.runtime.agree import share

pytestmark = pytest.mark.mpi(min_size=2)
MESHES = {2: [(1, 2), (2, 1)], 3: [(1, 3)], 4: [(2, 2), (1, 4)], 8: [(4, 2), (2, 4)]}


def deep_card() -> ModelCard:
    """Layers for four stages of two chunks each."""
    return small_card().model_copy(update={"num_hidden_layers": 7})


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_nothing_rests_on_sends_that_mpi_buffers(comm, monkeypatch, schedule):
    for data, pipe in MESHES.get(comm.size, []):
        buffered = train_small(comm, data, pipe, 3, schedule=schedule, card=deep_card())
        with monkeypatch.context() as patch:
            forbid_buffering(patch)
            unbuffered = train_small(comm, data, pipe, 3, schedule=schedule, card=deep_card())
        assert (unbuffered.losses, unbuffered.grad_norms) == (buffered.losses, buffered.grad_norms)


def executor_on(comm, pipe: int, schedule: str = "1f1b") -> tuple[meshes.Mesh, Executor]:
    card = deep_card()
    mesh = meshes.build(comm, comm.size // pipe, pipe)
    arrangement = small_arrangement(card, mesh.num_replicas, pipe, schedule)
    stage = BertStage(card, NUM_LABELS, arrangement.stages[mesh.stage])
    initialize(stage, card, 0)
    return mesh, Executor(stage, mesh, Transport(patient=True), arrangement.schedule)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("num_micro_batches", [0, 1, 5])
def test_inference_gives_the_logits_of_one_rank_where_the_head_is_and_nothing_elsewhere(
    comm, num_micro_batches, schedule
):
    split = small_split()
    parts = [np.arange(3 * number, 3 * number + 1 + number) for number in range(num_micro_batches)]
    alone = BertStage(deep_card(), NUM_LABELS, [(0, num_blocks(deep_card()))])
    initialize(alone, deep_card(), 0)
    mesh, executor = executor_on(comm, min(comm.size, 4), schedule)
    batches = [load_inference(split, part, executor.stage, torch.device("cpu")) for part in parts]
    found = executor.infer(batches)
    assert len(found) == (len(parts) if executor.stage.has_head else 0)
    for part, batch, logits in zip(parts, batches, found, strict=False):
        with torch.no_grad():
            expected = alone(torch.from_numpy(split.read("tokens", part)), batch.layout)
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)
    mesh.free()


def test_waiting_is_told_from_computing(comm):
    mesh, executor = executor_on(comm, min(comm.size, 4))
    part = np.arange(4)
    batches = [load_inference(small_split(), part, executor.stage, torch.device("cpu"))]
    comm.Barrier()
    if executor.stage.has_embeddings:
        time.sleep(1)  # longer than a busy machine may keep the others from starting
    executor.infer(batches)
    waited = share(mesh.pipe_axis, executor.seconds_waited, mesh.num_stages - 1)
    assert waited > 0.25
    assert not executor.stage.has_embeddings or executor.seconds_waited < waited
    mesh.free()
