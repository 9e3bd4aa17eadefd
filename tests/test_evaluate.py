"""Exact evaluation: each sentence once and the same numbers on any mesh, however few sentences there are."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI
from seqeval.metrics import f1_score
from small import NUM_LABELS, small_arrangement, small_card, small_split

from mpitrain import evaluate as module
from mpitrain.comm.buffers import Transport
from mpitrain.comm.group import open_group
from mpitrain.dataset.batches import evaluation_plan
from mpitrain.dataset.sequences import MemorySplit
from mpitrain.evaluate import evaluate, infer, words_per_sentence
from mpitrain.model.bert import BertStage
from mpitrain.model.initial import initialize
from mpitrain.pipeline.executor import Executor
from mpitrain.place import Place
from mpitrain.problem import Problem
from mpitrain.runtime import mesh as meshes
from mpitrain.runtime.agree import collect

LABELS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
MESHES = {
    1: [(1, 1)],
    2: [(2, 1), (1, 2), (1, 1, 2)],
    3: [(3, 1), (1, 3)],
    4: [(2, 2), (4, 1), (1, 4), (1, 2, 2), (1, 1, 4)],
    8: [(4, 2), (8, 1), (2, 2, 2)],
}

pytestmark = pytest.mark.mpi(min_size=1)


@pytest.fixture(autouse=True)
def _many_micro_batches(monkeypatch) -> None:
    monkeypatch.setattr(module, "TOKENS_PER_MICRO_BATCH", 40)
    monkeypatch.setattr(module, "MICRO_BATCHES_AT_ONCE", 2)


def labelled_split(num_sequences: int, windows: int = 1) -> MemorySplit:
    """Every token but the first is a word; `windows` sequences each are one sentence."""
    split = small_split(num_sequences)
    index = split.index
    starts = np.cumsum(index.lengths) - index.lengths
    labels = split._fields["tokens"] % NUM_LABELS
    labels[starts] = -100
    fields = {"tokens": split._fields["tokens"], "word_starts": labels >= 0, "labels": labels}
    return MemorySplit(fields, index.lengths, index.lengths - 1, np.arange(num_sequences) // windows)


def place_on(comm: Any, data: int, pipe: int, tensor: int = 1) -> tuple[Place, Executor]:
    card = small_card()
    mesh, transport = meshes.build(comm, data, pipe, tensor), Transport(patient=True)
    arrangement, group = small_arrangement(card, data, pipe), open_group(mesh.world, mesh.tensor_axis, transport)
    stage = BertStage(card, NUM_LABELS, arrangement.stages[mesh.stage], group=group)
    initialize(stage, card, 0)
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.mul_(3)  # so that random weights predict more than one label
    place = Place(mesh, transport, arrangement, group)
    return place, Executor(stage, mesh, transport, arrangement.schedule)


def evaluated(comm: Any, split: MemorySplit, *shape: int) -> tuple[str, list[dict[str, Any]]]:
    """The report as text, bit for bit, and those of the replicas."""
    place, executor = place_on(comm, *shape)
    report, replicas = evaluate(executor, place, Problem(small_card(), LABELS, None), split)
    place.close()
    return json.dumps(report), replicas


@pytest.mark.parametrize("num_sequences, windows", [(61, 1), (61, 3), (2, 1), (1, 1)])
def test_scores_are_the_same_text_on_any_mesh_and_count_each_sentence_once(comm, num_sequences, windows):
    split = labelled_split(num_sequences, windows)
    expected = json.loads(evaluated(MPI.COMM_SELF, split, 1, 1)[0])
    assert expected["sentences"] == -(-num_sequences // windows)
    assert expected["words"] == split.index.words.sum()
    for shape in MESHES.get(comm.size, []):
        text, replicas = evaluated(comm, split, *shape)
        assert set(collect(comm, text)) == {text}
        report = json.loads(text)
        assert report.pop("loss") == pytest.approx(expected["loss"], rel=1e-6)
        assert json.dumps(report) == json.dumps({key: value for key, value in expected.items() if key != "loss"})
        assert len(replicas) == shape[0]
        assert sum(replica["sentences"] for replica in replicas) == expected["sentences"]


def test_scores_are_those_of_seqeval_and_of_torch_on_the_same_logits(comm):
    split = labelled_split(40)
    place, executor = place_on(MPI.COMM_SELF, 1, 1)
    gold, predicted, loss = [], [], 0.0
    for sequences, logits in infer(
        executor, place.mesh, [np.array([n]) for n in range(40)], split, torch.device("cpu")
    ):
        labels = torch.from_numpy(split.read("labels", sequences))
        gold.append([LABELS[label] for label in labels[1:]])
        predicted.append([LABELS[label] for label in logits.argmax(dim=-1)])
        loss += torch.nn.functional.cross_entropy(logits.double(), labels[1:], reduction="sum").item()
    place.close()
    report = json.loads(evaluated(MPI.COMM_SELF, split, 1, 1)[0])
    assert len({tag for tags in predicted for tag in tags}) > 1
    assert report["f1_conlleval"] == pytest.approx(f1_score(gold, predicted))
    assert report["loss"] == pytest.approx(loss / sum(map(len, gold)), rel=1e-5)


def test_every_sequence_is_inferred_once_whatever_the_mesh(comm):
    split = labelled_split(37, windows=2)
    plan = evaluation_plan(split.index.lengths, split.index.sentences, 40)
    for shape in MESHES.get(comm.size, []):
        place, executor = place_on(comm, *shape)
        device = place.transport.device
        mine = [sequences.tolist() for sequences, _ in infer(executor, place.mesh, plan, split, device)]
        everyone = [number for ranks in collect(comm, mine) for sequences in ranks for number in sequences]
        assert sorted(everyone) == list(range(37))
        place.close()


def test_the_windows_of_a_sentence_are_one_sentence_again():
    split = labelled_split(7, windows=3)
    sentences, words = words_per_sentence(split, np.array([6, 0, 1, 2]))
    assert sentences.tolist() == [2, 0]
    assert words.tolist() == [split.index.words[6], split.index.words[:3].sum()]
