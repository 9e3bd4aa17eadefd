"""Run directories that nobody has trained: what is in them is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FIGURES = {"loss", "f1", "learning-rate", "gradient-norm", "speed", "parts", "work", "imbalance", "memory", "rank-work"}
FIGURES |= {"types"}
LABELS = ("LOC", "PER", "ORG")


def line(step: int, **fields: Any) -> dict[str, Any]:
    """A step of two ranks in a pipeline: half a second, of which each works 0.3 s."""
    parts = {"data": 0.01, "forward_backward": 0.3, "pipeline_wait": 0.1, "reduce": 0.05, "update": 0.03, "copy": 0.0}
    told = {"step": step, "epoch": (step - 1) // 10, "loss": 2.0 / step, "grad_norm": 1.0, "learning_rate": 1e-3 / step}
    told |= {"tokens": 990, "padding": 10, "seconds": 0.5, "tokens_per_second": 1980.0, **parts, "tensor": 0.0}
    told |= {"gather": 0.01, "save": 0.0, "work": 0.3, "passes": 0.28, "bubble": 0.1, "memory": 3 << 30}
    return told | {"elapsed": 4.0 + 0.5 * step, "imbalance": 1.02} | fields


def scores(f1: float, labels: tuple[str, ...] = LABELS) -> dict[str, Any]:
    types = {
        label: {"precision": f1, "recall": f1, "f1": f1, "support": 10 + place} for place, label in enumerate(labels)
    }
    totals = {f"{score}_{mode}": f1 for score in ("precision", "recall", "f1") for mode in ("conlleval", "strict")}
    return {"loss": 1 - f1, "token_accuracy": f1, **totals, "per_type": types, "sentences": 5, "words": 50}


def make_run(
    run: Path, *, steps: int = 20, labels: tuple[str, ...] = LABELS, reason: str = "done", **settings: Any
) -> Path:
    """A run of 20 steps in two epochs; dev F1 is 0.5 after the first, 0.6 after the second, test F1 0.55."""
    run.mkdir(parents=True)
    write_lines(run / "metrics.jsonl", [line(step) for step in range(1, steps + 1)])
    told = [(10, 0.5, "dev"), (20, 0.6, "dev"), (20, 0.55, "test")]
    write_lines(
        run / "evaluations.jsonl",
        [
            {"split": split, "step": at, "weights": at, "epoch": at / 10, "seconds": 0.5, "elapsed": 0.0}
            | scores(f1, labels)
            for at, f1, split in told
        ],
    )
    train = {"batch_size": 32, "precision": "fp32", "learning_rate": None}
    config = {"model": "bert-mini", "data": "sample", "out": str(run.name), "train": train | settings}
    problem = {"model": {"num_hidden_layers": 4, "hidden_size": 256}, "labels": ["O", *labels]}
    mesh = {"data": 1, "pipe": 2, "tensor": 1}
    documents = {
        "config.json": {"config": config, "mesh": mesh, "num_steps": 20, "problem": problem},
        "eval.json": {"dev": scores(0.6, labels), "test": scores(0.55, labels)},
        "exit.json": {"code": 0, "reason": reason, "step": steps},
        "ledger.json": [{"step": 0, "ranks": 2, "nodes": 2, "start": 4.0, "seconds": 18.0}],
        "ranks.json": [
            {
                "rank": rank,
                "node": f"node{rank}",
                "replica": 0,
                "stage": rank,
                "tensor": 0,
                "memory": 3 << 30,
                "work": 0.3,
            }
            for rank in range(2)
        ],
    }
    for name, document in documents.items():
        (run / name).write_text(json.dumps(document))
    return run


def write_lines(file: Path, lines: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(each) + "\n" for each in lines))
