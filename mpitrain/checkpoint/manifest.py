"""The commit mark of a checkpoint: which files hold which slices of which tensors, with every file's sha256.

A directory `step-NNNNNNNN` is a checkpoint if, and only if, it holds a manifest; the manifest is written last, and
the directory gets its name only then. Tensors go by their logical (Hugging Face) name; a piece is the range
[start, stop) of the flattened tensor, so any mesh can read what any other mesh wrote.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from mpitrain.errors import CheckpointError

VERSION = 1
MANIFEST = "manifest.json"
STEP_DIRECTORY = re.compile(r"step-(\d{8})")
FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$", max_length=128)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Piece(_Strict):
    """A dataset `/<kind>/<name>` in a file: elements [start, stop) of the flattened tensor, fp32."""

    kind: str
    name: str
    start: Annotated[int, Field(ge=0)]
    stop: Annotated[int, Field(ge=0)]


class FileEntry(_Strict):
    """One file of the checkpoint."""

    sha256: str
    bytes: int
    pieces: list[Piece] = []


class Progress(_Strict):
    """Where the run stands, beyond its tensors.

    Attributes:
        step: steps done.
        num_updates: steps of the optimizer, fewer than `step` if some were skipped.
        best_f1, best_step: best evaluation on dev so far and its checkpoint.
        evaluations_without_gain: for early stopping.
        loss_scale, good_steps: state of the fp16 loss scale.
        evaluated_step: the last step whose weights were scored on dev.
    """

    step: int = 0
    num_updates: int = 0
    best_f1: float = -1.0
    best_step: int = -1
    evaluations_without_gain: int = 0
    loss_scale: float = 1.0
    good_steps: int = 0
    evaluated_step: int = -1


class Manifest(_Strict):
    """Everything that `load` needs to know before it opens another file.

    Attributes:
        identity: settings that fix the order of the data and the model; a resumed run must share them.
        tensors: shape of every tensor by logical name.
    """

    version: int
    written_by: str
    progress: Progress
    mesh: dict[str, int]
    identity: dict[str, Any]
    tensors: dict[str, list[int]]
    files: dict[FileName, FileEntry]


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a checkpoint directory.

    Raises:
        CheckpointError: it is missing, unreadable, damaged or of another version.
    """
    path = directory / MANIFEST
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}): this is no complete checkpoint") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{path}: is damaged: {where or 'JSON'}: {first['msg']}") from None
    if manifest.version != VERSION:
        raise CheckpointError(f"{path}: format version {manifest.version}; this program reads version {VERSION}")
    return manifest


def committed(checkpoints: Path) -> list[Path]:
    """All complete checkpoints in a folder, newest first."""
    if not checkpoints.is_dir():
        return []
    found = [place for place in checkpoints.iterdir() if STEP_DIRECTORY.fullmatch(place.name)]
    return sorted((place for place in found if (place / MANIFEST).is_file()), reverse=True)


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Have a file's or directory's content reach the disk: a rename alone is atomic, but not durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, text: str) -> None:
    """Write a whole file and have it reach the disk."""
    path.write_text(text, encoding="utf-8")
    sync(path)


def replace_durably(path: Path, text: str) -> None:
    """Write a file aside, then put it in place, so that readers see the old or the new one, never half."""
    aside = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    write_durably(aside, text)
    aside.replace(path)
    sync(path.parent)
