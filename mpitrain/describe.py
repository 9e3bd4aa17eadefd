"""`mpitrain inspect`: what is in a directory of shards, a run or a checkpoint."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from mpitrain.checkpoint.manifest import committed, find_checkpoint, read_manifest
from mpitrain.dataset.shards import DatasetInfo, is_dataset, open_dataset
from mpitrain.errors import CheckpointError, DataError, MpitrainError, UsageError
from mpitrain.files import file_hash


def describe(place: Path) -> tuple[Any, MpitrainError | None]:
    """Something that rich can print, and an error that names the files which are not as they were written.

    Raises:
        UsageError: the directory is neither of the three.
        MpitrainError: it is damaged.
    """
    if is_dataset(place):
        info = open_dataset(place)
        entries = [entry for shards in info.splits.values() for entry in shards]
        damaged = [place / entry.file for entry in entries if not is_whole(place / entry.file, entry.sha256)]
        return describe_dataset(info), DataError(_names(damaged)) if damaged else None
    try:
        found = find_checkpoint(place)
    except CheckpointError:
        raise UsageError(f"{place}: is neither a directory of shards, nor a run, nor a checkpoint") from None
    run = found.parent if found != place else None
    others = [f"checkpoints in the run: {', '.join(path.name for path in reversed(committed(run)))}"] if run else []
    content, damaged = describe_checkpoint(found)
    return Group(*others, content), CheckpointError(_names(damaged)) if damaged else None


def _names(damaged: list[Path]) -> str:
    return f"damaged or missing: {', '.join(map(str, damaged))}"


def is_whole(path: Path, sha256: str) -> bool:
    """Whether a file is there, as a plain file, as it was written."""
    return path.is_file() and not path.is_symlink() and file_hash(path) == sha256


def describe_checkpoint(directory: Path) -> tuple[Group, list[Path]]:
    """Step, settings, files with the state of their hashes, and tensors; and the files that are not whole."""
    manifest = read_manifest(directory)
    files = Table(box=None, header_style="bold", title="files", title_justify="left")
    for name in ("file", "bytes", "pieces", "sha256"):
        files.add_column(name, justify="left" if name in ("file", "sha256") else "right")
    damaged = []
    for name, entry in sorted(manifest.files.items()):
        path = directory / name
        whole = is_whole(path, entry.sha256)
        damaged += [] if whole else [path]
        state = "whole" if whole else "DAMAGED" if path.exists() else "MISSING"
        files.add_row(name, f"{entry.bytes:,}", f"{len(entry.pieces):,}", f"{entry.sha256[:12]}  {state}")
    tensors = Table(box=None, header_style="bold", title="tensors", title_justify="left")
    tensors.add_column("name")
    tensors.add_column("shape")
    for name, shape in manifest.tensors.items():
        tensors.add_row(name, " x ".join(map(str, shape)))
    progress = manifest.progress
    num_weights = sum(prod(shape) for shape in manifest.tensors.values())
    head = [
        f"{directory}: step {progress.step}, written by {manifest.written_by}",
        f"best dev F1 {progress.best_f1:.4f} at step {progress.best_step}"
        if progress.best_step >= 0
        else "no dev score",
        f"mesh {json.dumps(manifest.mesh)}; {num_weights:,} weights",
        f"labels {', '.join(manifest.identity.get('labels', []))}",
    ]
    return Group(*map(escape, head), files, tensors), damaged


def describe_dataset(info: DatasetInfo) -> Group:
    """What is in a dataset, for a terminal."""
    counts = Table("split", "sentences", "words", "pieces", "sequences", "shards", "longest", title=escape(info.name))
    labels = Table("label", *info.summary)
    for split, summary in info.summary.items():
        shards = info.splits[split]
        sequences = sum(entry.sequences for entry in shards)
        row = (summary.sentences, summary.words, summary.pieces, sequences, len(shards), summary.longest_sentence)
        counts.add_row(split, *(f"{number:,}" for number in row))
    for label in info.label_names:
        labels.add_row(escape(label), *(f"{summary.labels.get(label, 0):,}" for summary in info.summary.values()))
    notes = [
        f"{split}: {count:,} x {what}"
        for split, summary in info.summary.items()
        for what, count in summary.normalised.items()
    ]
    license = escape(info.license or "-")
    facts = f"vocabulary {info.vocab_size:,}, up to {info.max_length} tokens a sequence, license: {license}"
    return Group(counts, labels, facts, *notes)
