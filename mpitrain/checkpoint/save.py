"""Write a checkpoint aside, each rank its own slices, and commit it by manifest and rename: whole or absent."""

from __future__ import annotations

import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from mpitrain import __version__
from mpitrain.checkpoint.manifest import (
    MANIFEST,
    STEP_DIRECTORY,
    VERSION,
    FileEntry,
    Manifest,
    Piece,
    Progress,
    committed,
    read_manifest,
    write_manifest,
)
from mpitrain.comm.buckets import StateSlice
from mpitrain.errors import MpitrainError
from mpitrain.files import Sink, file_hash, sync
from mpitrain.runtime.agree import Comm, collect, share, together
from mpitrain.runtime.failpoints import reach

LEFT_OVER = re.compile(r"step-\d{8}\.tmp-[0-9a-f]+")


def save(
    comm: Comm,
    checkpoints: Path,
    slices: Iterable[StateSlice],
    *,
    progress: Progress,
    mesh: Mapping[str, int],
    identity: Mapping[str, Any],
    documents: Mapping[str, str],
) -> Path:
    """Commit `checkpoints/step-NNNNNNNN` (collective).

    Of a step that is committed already only the progress is written anew: an evaluation may have come after it.

    Args:
        slices: what this rank owns.
        documents: small text files that make the checkpoint self-contained, written by rank 0.

    Raises:
        MpitrainError: on all ranks, because one could not write: nothing is committed, what was before stays whole.
    """
    final = checkpoints / f"step-{progress.step:08d}"
    if share(comm, (final / MANIFEST).is_file()):
        with together(comm, f"updating {final}"), can_be_written(final):
            if comm.rank == 0:
                _refresh(final, progress)
        return final
    aside = checkpoints / f"{final.name}.tmp-{share(comm, secrets.token_hex(4))}"
    with cleared_if_in_vain(comm, aside):
        with together(comm, f"making {aside}"), can_be_written(aside):
            reach("save.begin")
            if comm.rank == 0:
                aside.mkdir(parents=True)
        entries: dict[str, Any] = {}
        shapes: dict[str, list[int]] = {}
        with together(comm, f"writing {aside}"), can_be_written(aside):
            reach("save.slices")
            entries, shapes = _write_slices(aside / f"rank-{comm.rank:05d}.h5", list(slices))
            if comm.rank == 0:
                entries |= _write_documents(aside, documents)
        everyone = collect(comm, [entries, shapes])
        with together(comm, f"committing {final}"), can_be_written(final):
            if comm.rank == 0:
                manifest = Manifest(
                    version=VERSION,
                    written_by=f"mpitrain {__version__}",
                    progress=progress,
                    mesh=dict(mesh),
                    identity=dict(identity),
                    tensors={name: shape for _, rank_shapes in everyone for name, shape in rank_shapes.items()},
                    files={name: entry for rank_entries, _ in everyone for name, entry in rank_entries.items()},
                )
                _commit(aside, final, manifest)
    return final


@contextmanager
def cleared_if_in_vain(comm: Comm, aside: Path) -> Iterator[None]:
    """Give a full disk its room back at once: when all ranks fail together, nobody writes any more."""
    try:
        yield
    except MpitrainError:
        if comm.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
        raise


@contextmanager
def can_be_written(place: Path) -> Iterator[None]:
    """A full disk, a quota or a directory that has vanished is nobody's bug."""
    try:
        yield
    except OSError as error:
        raise MpitrainError(
            f"{place}: cannot be written: {error.strerror or error}; the checkpoints before it are as they were: "
            "see to the disk, then start again"
        ) from error


def _refresh(final: Path, progress: Progress) -> None:
    manifest = read_manifest(final)
    if manifest.progress != progress:
        reach("save.refresh")
        manifest.progress = progress
        write_manifest(final, manifest)


def _write_slices(path: Path, slices: list[StateSlice]) -> tuple[dict[str, Any], dict[str, list[int]]]:
    if not slices:
        return {}, {}
    pieces = []
    with Sink(path, "w+") as sink:
        with h5py.File(sink, "w", libver="latest") as file:
            for piece in slices:
                values = piece.values.detach().cpu().numpy()
                data = file.create_dataset(f"{piece.kind}/{piece.name}", data=values, dtype=np.float32)
                data.attrs.update(shape=piece.shape, start=piece.start, columns=piece.columns or (0, piece.shape[-1]))
                where = {"start": piece.start, "stop": piece.stop, "columns": piece.columns}
                pieces.append(Piece(kind=piece.kind, name=piece.name, **where))
        sink.check()
    reach("save.hash")
    return {path.name: _entry(path, pieces)}, {piece.name: list(piece.shape) for piece in slices}


def _write_documents(directory: Path, documents: Mapping[str, str]) -> dict[str, Any]:
    entries = {}
    for name, text in documents.items():
        (directory / name).write_text(text, encoding="utf-8")
        entries[name] = _entry(directory / name, [])
    return entries


def _entry(path: Path, pieces: list[Piece]) -> dict[str, Any]:
    sync(path)
    return FileEntry(sha256=file_hash(path), bytes=path.stat().st_size, pieces=pieces).model_dump()


def _commit(aside: Path, final: Path, manifest: Manifest) -> None:
    reach("save.manifest")
    write_manifest(aside, manifest)
    if final.exists():  # a directory of that name without a manifest is no checkpoint
        discard(final)
    reach("save.rename")
    aside.rename(final)
    reach("save.committed")
    sync(final.parent)


def retain(checkpoints: Path, keep: int, best_step: int) -> None:
    """Delete all checkpoints but the newest `keep` and the best (rank 0 only, after a commit)."""
    reach("save.retain")
    for place in committed(checkpoints)[keep:]:
        match = STEP_DIRECTORY.fullmatch(place.name)
        if match and int(match[1]) != best_step:
            discard(place)


def forget_after(checkpoints: Path, step: int) -> None:
    """Delete checkpoints of steps that are to be done again, damaged ones among them (rank 0 only, on a resume)."""
    for place in committed(checkpoints):
        match = STEP_DIRECTORY.fullmatch(place.name)
        if match and int(match[1]) > step:
            discard(place)


def clear_left_overs(checkpoints: Path) -> None:
    """Delete what killed saves left behind (rank 0 only, before a run writes)."""
    for place in checkpoints.glob("step-*.tmp-*"):
        if LEFT_OVER.fullmatch(place.name):
            shutil.rmtree(place, ignore_errors=True)


def discard(place: Path) -> None:
    """Delete a directory; it loses its name first, so that a kill half-way leaves no half checkpoint behind."""
    doomed = place.with_name(f"{place.name}.tmp-{secrets.token_hex(4)}")
    place.rename(doomed)
    reach("save.discard")
    shutil.rmtree(doomed, ignore_errors=True)
