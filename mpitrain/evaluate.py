"""Exact evaluation on any mesh: each sentence once, counts summed over replicas, then divided."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mpitrain.config import Config
from mpitrain.dataset.batches import Indices, evaluation_plan
from mpitrain.dataset.loader import Split
from mpitrain.dataset.sequences import Sequences
from mpitrain.files import replace_file, user_path
from mpitrain.metrics import Counts, Scores, is_plain, report
from mpitrain.model.bert import BertStage, token_loss
from mpitrain.model.layout import PackedLayout
from mpitrain.observe.console import Console, score_table
from mpitrain.pipeline.executor import Executor, MicroBatch
from mpitrain.place import Place
from mpitrain.problem import Problem, find_data
from mpitrain.restore import open_checkpoint, restore_stage
from mpitrain.runtime.agree import Comm, any_rank, collect, together
from mpitrain.runtime.failpoints import reach
from mpitrain.runtime.mesh import Mesh
from mpitrain.split import part

TOKENS_PER_MICRO_BATCH = 2048
MICRO_BATCHES_AT_ONCE = 8  # bounds what a stage holds between its instructions


def infer(
    executor: Executor,
    mesh: Mesh,
    plan: Sequence[Indices],
    split: Sequences,
    device: torch.device,
    goes_on: Callable[[], bool] = lambda: True,
) -> Iterator[tuple[Indices, torch.Tensor]]:
    """(sequences, logits [num_words, num_labels]) of this replica's share of a plan, on one rank that has the head.

    Collective, so every rank must exhaust it; all ranks call `goes_on` equally often, and what it returns must be the
    same on all of them.
    """
    mine = plan[mesh.replica :: mesh.num_replicas]
    for start in range(0, part(0, len(plan), mesh.num_replicas)[1], MICRO_BATCHES_AT_ONCE):
        if not goes_on():
            return
        chosen = mine[start : start + MICRO_BATCHES_AT_ONCE]
        batches = [load_inference(split, sequences, executor.stage, device) for sequences in chosen]
        logits = executor.infer(batches)
        yield from zip(chosen, logits if mesh.tensor == 0 else (), strict=False)


def load_inference(split: Sequences, sequences: Indices, stage: BertStage, device: torch.device) -> MicroBatch:
    """A micro-batch without labels and dropout, of whose tokens those are wanted that words begin with."""
    tokens = torch.from_numpy(split.read("tokens", sequences)).to(device) if stage.has_embeddings else None
    words = np.flatnonzero(split.read("word_starts", sequences) == 1)
    return MicroBatch(PackedLayout(split.index.lengths[sequences], device, words), tokens)


def evaluate(
    executor: Executor,
    place: Place,
    problem: Problem,
    split: Sequences,
    stops: Callable[[], bool] = lambda: False,
) -> Scores | None:
    """Score a split (collective): the report of eval.json, and one of each replica's share, on every rank.

    None if `stops()` has been true on some rank before the end.
    """
    reach("evaluate")
    went_on = True

    def goes_on() -> bool:
        nonlocal went_on
        went_on = not any_rank(place.mesh.world, stops())
        return went_on

    plan = evaluation_plan(split.index.lengths, split.index.sentences, TOKENS_PER_MICRO_BATCH)
    counts, loss = Counts.of(problem.label_names), 0.0
    tells = executor.stage.has_head and place.mesh.tensor == 0
    for sequences, logits in infer(executor, place.mesh, plan, split, place.transport.device, goes_on):
        labels = split.read("labels", sequences)
        labels = labels[labels >= 0]
        predicted = logits.argmax(dim=-1).cpu().numpy()
        counts.add(labels, predicted, words_per_sentence(split, sequences)[1].tolist())
        loss += float(token_loss(logits, torch.from_numpy(labels).to(logits.device), 1).double())
    if not went_on:
        return None
    shares = collect(place.mesh.world, [counts.vector.tolist(), loss] if tells else None)
    return summarise(problem.label_names, [share for share in shares if share is not None])


def summarise(label_names: Sequence[str], shares: Sequence[tuple[list[int], float]]) -> Scores:
    """Add the replicas' counts up before dividing; the order of ranks fixes the bits of the loss."""
    vectors = [np.array(vector, np.int64) for vector, _ in shares]
    losses = [loss for _, loss in shares]
    replicas = [_report(label_names, vector, loss) for vector, loss in zip(vectors, losses, strict=True)]
    return _report(label_names, np.sum(vectors, axis=0), sum(losses)), replicas


def _report(label_names: Sequence[str], vector: NDArray[np.int64], loss: float) -> dict[str, Any]:
    scores = report(Counts.from_vector(label_names, vector))
    return {"loss": loss / max(1, scores["words"]), **scores}


def words_per_sentence(split: Sequences, sequences: Indices) -> tuple[Indices, Indices]:
    """The sentences in a micro-batch, in its order, and the words of each, its windows added up."""
    sentences = split.index.sentences[sequences]
    starts = np.flatnonzero(np.diff(sentences, prepend=-1))
    return sentences[starts], np.add.reduceat(split.index.words[sequences], starts)


def evaluate_checkpoint(comm: Comm, config: Config, checkpoint: Path, console: Console) -> dict[str, Any]:
    """Score a checkpoint on the dev and test splits of `--data`, or of what it was trained on (collective).

    Raises:
        MpitrainError: on all ranks, with the first cause.
    """
    trained = open_checkpoint(comm, checkpoint, console)
    shards, info = find_data(comm, config, trained.trained_on, trained.problem, console)
    place, executor = restore_stage(comm, config, trained, console)
    reports: dict[str, Any] = {}
    splits: list[str] = [name for name in ("dev", "test") if name in info.splits] or list(info.splits)
    for name in splits:
        split = Split(place.mesh.world, shards, info, name)
        scores = evaluate(executor, place, trained.problem, split)
        assert scores is not None  # nobody can stop this
        reports[name], replicas = scores
        console.show(score_table(name, reports[name], replicas, plain=is_plain(info.label_names)))
    with together(comm, "writing eval.json"):
        if comm.rank == 0 and config.out is not None:
            with user_path("--out", config.out):
                config.out.mkdir(parents=True, exist_ok=True)
                replace_file(config.out / "eval.json", json.dumps(reports, indent=1) + "\n")
    place.close()
    return reports
