"""A tiny corpus and a tiny model card on disk, and what a run left behind, for tests that start real commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np

SAMPLE = Path(__file__).resolve().parents[2] / "data" / "sample"
SENTENCES = {"train": 200, "dev": 30, "test": 25}
CARD = """hidden_size = 32
num_hidden_layers = 4
num_attention_heads = 2
intermediate_size = 64
max_position_embeddings = 64
"""


def make_tiny(place: Path) -> list[str]:
    """Write corpus and card below `place`; the flags that train the one on the other, in steps of a few milliseconds.

    200 sentences in batches of 8 are 26 steps an epoch: a few sentences are longer than 64 pieces.
    """
    corpus = place / "corpus"
    corpus.mkdir(parents=True)
    for split, count in SENTENCES.items():
        sentences = (SAMPLE / f"{split}.conll").read_text(encoding="utf-8").split("\n\n")[:count]
        (corpus / f"{split}.conll").write_text("\n\n".join(sentences) + "\n", encoding="utf-8")
    (place / "tiny.toml").write_text(CARD, encoding="utf-8")
    fields = {"model": place / "tiny.toml", "data": corpus, "tokenizer.vocab_size": 300}
    # More than one thread a rank would be slow on a busy machine.
    fields |= {"train.epochs": 4, "train.batch_size": 8, "train.micro_batches": 4, "train.threads": 1}
    return [word for name, value in fields.items() for word in (f"--{name}", str(value))]


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that are whole; none while there is no such file."""
    file = run / "metrics.jsonl"
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def exit_of(run: Path) -> dict[str, Any]:
    """What exit.json tells, but for what it has cost."""
    found: dict[str, Any] = json.loads((run / "exit.json").read_text(encoding="utf-8"))
    found.pop("node_hours")
    return found


def tensors_of(checkpoint: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Every weight and moment of a checkpoint, flat, whatever files its pieces are in."""
    manifest = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
    found: dict[str, np.ndarray[Any, Any]] = {}
    for name, entry in manifest["files"].items():
        for piece in entry["pieces"]:
            key = f"{piece['kind']}/{piece['name']}"
            whole = found.setdefault(key, np.full(int(np.prod(manifest["tensors"][piece["name"]])), np.nan, np.float32))
            with h5py.File(checkpoint / name, "r") as file:
                whole[piece["start"] : piece["stop"]] = file[key][:]
    return found


def processes_of(mark: str) -> dict[int, list[str]]:
    """Process id and arguments of everything that runs with `mark`, a NAME=VALUE, in its environment."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (place / "environ").read_bytes().split(b"\0"):
                found[int(place.name)] = (place / "cmdline").read_text().split("\0")
        except OSError:  # it has just ended, or is not ours
            continue
    return found


def ranks_of(mark: str) -> list[int]:
    """Process ids of the ranks among them, launchers left out."""
    return sorted(pid for pid, argv in processes_of(mark).items() if argv[1:3] == ["-m", "mpitrain"])
