"""The commit mark of a checkpoint: which files hold which slices of which tensors, with every file's sha256.

A directory `step-NNNNNNNN` is a checkpoint; the manifest is written last, and the directory gets its name only then, so
that one without a manifest is damaged. Tensors go by their logical (Hugging Face) name; a piece is the range
[start, stop) of the flattened tensor, or of some columns of it, so any mesh can read what any other mesh wrote.
"""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mpitrain.errors import CheckpointError
from mpitrain.files import FileName, is_sealed, replace_file, seal, sync

VERSION = 2
MANIFEST = "manifest.json"
STEP_DIRECTORY = re.compile(r"step-(\d{8})")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Piece(_Strict):
    """A dataset `/<kind>/<name>` in a file: elements [start, stop) of the flattened tensor, fp32.

    With `columns`, the elements are those of columns [first, last) of a matrix alone, flattened.
    """

    kind: str
    name: str
    start: Annotated[int, Field(ge=0)]
    stop: Annotated[int, Field(ge=0)]
    columns: tuple[int, int] | None = None


class FileEntry(_Strict):
    """One file of the checkpoint; `xxh3` is what loading checks, if there is one (`files.Digest`)."""

    sha256: str
    xxh3: str = ""
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
        skipped_in_a_row: the last steps, as far as they have changed no weight.
    """

    step: int = 0
    num_updates: int = 0
    best_f1: float = -1.0
    best_step: int = -1
    evaluations_without_gain: int = 0
    loss_scale: float = 1.0
    good_steps: int = 0
    evaluated_step: int = -1
    skipped_in_a_row: int = 0


class Manifest(_Strict):
    """Everything that `load` needs to know before it opens another file.

    Attributes:
        identity: settings that fix the order of the data and the model; a resumed run must share them.
        tensors: shape of every tensor by logical name.
        seal: sha256 of the text with this field empty (`files.seal`).
    """

    seal: str = ""
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
    if not path.is_file():
        raise CheckpointError(f"{path}: is not there as a file: {directory.name} is no complete checkpoint")
    try:
        raw = path.read_bytes()
        manifest = Manifest.model_validate_json(raw)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}): this is no complete checkpoint") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{path}: is damaged: {where or 'JSON'}: {first['msg']}") from None
    if manifest.version != VERSION:
        raise CheckpointError(f"{path}: format version {manifest.version}; this program reads version {VERSION}")
    if not is_sealed(raw):
        raise CheckpointError(f"{path}: is damaged: its text is not the one whose sha256 is in it")
    return manifest


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Put it in place, whole and durably."""
    replace_file(directory / MANIFEST, seal(manifest.model_copy(update={"seal": ""}).model_dump_json(indent=1)))
    sync(directory)


def candidates(checkpoints: Path) -> list[Path]:
    """All that were checkpoints once, newest first: one without a manifest is damaged, as saves never leave such."""
    if not checkpoints.is_dir():
        return []
    return sorted((place for place in checkpoints.iterdir() if STEP_DIRECTORY.fullmatch(place.name)), reverse=True)


def committed(checkpoints: Path) -> list[Path]:
    """Those that have a manifest, newest first."""
    return [place for place in candidates(checkpoints) if (place / MANIFEST).is_file()]


def find_checkpoint(place: Path, *, best: bool = True) -> Path:
    """The checkpoint that `place` means: itself, or a run directory's best (if wanted), else its newest.

    Raises:
        CheckpointError: there is none.
    """
    if (place / MANIFEST).is_file():
        return place
    found = candidates(place / "checkpoints") or candidates(place)
    if not found:
        raise CheckpointError(f"{place}: no complete checkpoint; give a run directory or one checkpoint")
    best_step = -1
    if best:
        with suppress(CheckpointError):  # who reads what is found tells what is wrong with it
            best_step = read_manifest(found[0]).progress.best_step
    return next((path for path in found if path.name == f"step-{best_step:08d}"), found[0])
