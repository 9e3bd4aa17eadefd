"""The same model, data and hyperparameters by mpitrain and by a plain transformers loop: F1 and wall time of both.

    MPITRAIN_CORPORA=/path/to/corpora python tests/benchmarks/compare_transformers.py --data btc --ranks 8

transformers runs as its tutorials do: one process, all cores, sentences padded to the longest of their batch, each
from the same tokenizer and card, with the same AdamW, learning-rate schedule, clipping, batch size and epochs; the
weights scored are those of the best dev epoch, as mpitrain's are. Both score with the same code.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import BertConfig, BertForTokenClassification, get_linear_schedule_with_warmup

from mpitrain.dataset.shards import map_shard, open_dataset
from mpitrain.metrics import Counts, report
from mpitrain.optim import decays

BIN = Path(sys.executable).parent


def run_mpitrain(options: argparse.Namespace, seed: int, out: Path) -> dict[str, float]:
    flags = ["--model", options.model, "--data", options.data, "--out", str(out), "--train.seed", str(seed)]
    flags += ["--train.epochs", str(options.epochs), "--train.learning_rate", str(options.learning_rate)]
    launcher = [str(BIN / "mpirun"), "-np", str(options.ranks)] if options.ranks else []
    began = time.perf_counter()
    subprocess.run([*launcher, sys.executable, "-m", "mpitrain", *flags], check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - began
    scores = json.loads((out / "eval.json").read_text())
    return {"dev": scores["dev"]["f1_conlleval"], "test": scores["test"]["f1_conlleval"], "seconds": seconds}


def read_split(shards: Path, name: str) -> list[tuple[np.ndarray, np.ndarray]]:
    sequences = []
    for entry in open_dataset(shards).splits[name]:
        arrays = map_shard(shards / entry.file)
        bounds = arrays["offsets"][1:-1]
        tokens = np.split(arrays["tokens"].astype(np.int64), bounds)
        sequences += list(zip(tokens, np.split(arrays["labels"].astype(np.int64), bounds), strict=True))
    return sequences


def pad(batch: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, torch.Tensor]:
    width = max(len(tokens) for tokens, _ in batch)
    shape = (len(batch), width)
    fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    padded = {name: np.full(shape, value) for name, value in fill.items()}
    for row, (tokens, labels) in enumerate(batch):
        padded["input_ids"][row, : len(tokens)] = tokens
        padded["labels"][row, : len(tokens)] = labels
        padded["attention_mask"][row, : len(tokens)] = 1
    return {name: torch.from_numpy(values).long() for name, values in padded.items()}


@torch.no_grad()
def score(model: BertForTokenClassification, split: list, label_names: list[str]) -> float:
    model.eval()
    counts = Counts.of(label_names)
    for start in range(0, len(split), 64):
        batch = split[start : start + 64]
        inputs = pad(batch)
        labels = inputs.pop("labels").numpy()
        predicted = model(**inputs).logits.argmax(-1).numpy()
        for row in range(len(batch)):
            scored = labels[row] >= 0
            counts.add(labels[row][scored], predicted[row][scored])
    model.train()
    return report(counts)["f1_conlleval"]


def run_transformers(options: argparse.Namespace, seed: int, run: Path) -> dict[str, float]:
    """Train as `run` was; its shards, card and tokenizer are used."""
    described = json.loads((run / "config.json").read_text())
    shards, card = Path(described["shards"]), dict(described["problem"]["model"])
    label_names, train = described["problem"]["labels"], described["config"]["train"]
    card.pop("do_lower_case")
    began = time.perf_counter()
    torch.manual_seed(seed)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    Tokenizer.from_file(str(shards / "tokenizer.json"))
    splits = {name: read_split(shards, name) for name in ("train", "dev", "test")}
    model = BertForTokenClassification(BertConfig(**card, num_labels=len(label_names)))
    named = list(model.named_parameters())
    groups = [
        {"params": [p for name, p in named if decays(name)], "weight_decay": train["weight_decay"]},
        {"params": [p for name, p in named if not decays(name)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, eps=train["adam_epsilon"])
    size = train["batch_size"]
    num_steps = -(-len(splits["train"]) // size) * options.epochs
    schedule = get_linear_schedule_with_warmup(optimizer, int(num_steps * train["warmup_ratio"]), num_steps)
    generator = np.random.default_rng(seed)
    best = {"dev": -1.0, "test": 0.0}
    for _ in range(options.epochs):
        order = generator.permutation(len(splits["train"]))
        for start in range(0, len(order), size):
            loss = model(**pad([splits["train"][i] for i in order[start : start + size]])).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), train["max_grad_norm"])
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        dev = score(model, splits["dev"], label_names)
        if dev > best["dev"]:
            best = {"dev": dev, "test": score(model, splits["test"], label_names)}
    return {**best, "seconds": time.perf_counter() - began}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bert-mini")
    parser.add_argument("--data", default="sample")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--ranks", type=int, default=8, help="0: no mpirun")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    options = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {"mpitrain": [], "transformers": []}
    for seed in options.seeds:
        run = options.out / f"{options.data}-{options.ranks}-seed{seed}"
        found["mpitrain"].append(run_mpitrain(options, seed, run))
        found["transformers"].append(run_transformers(options, seed, run))
        print({name: runs[-1] for name, runs in found.items()}, flush=True)
    for name, runs in found.items():
        columns = {key: [run[key] for run in runs] for key in ("dev", "test", "seconds")}
        cells = [f"{key} {statistics.mean(v):.4f} ({min(v):.4f} to {max(v):.4f})" for key, v in columns.items()]
        print(f"{name:<13}", "  ".join(cells))


if __name__ == "__main__":
    main()
