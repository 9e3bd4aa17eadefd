"""The files of a checkpoint: written aside, each rank its own slices, committed by manifest and rename, and deleted."""

from __future__ import annotations

import errno
import io
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from mpitrain.checkpoint.manifest import (
    FileEntry,
    Manifest,
    Piece,
    Progress,
    candidates,
    committed,
    read_manifest,
    write_manifest,
)
from mpitrain.comm.buckets import StateSlice
from mpitrain.errors import MpitrainError
from mpitrain.files import Digest, Image, Sink, file_sum, forget_cached, parts_of, sync
from mpitrain.runtime.agree import Comm
from mpitrain.runtime.failpoints import reach

LEFT_OVER = re.compile(r"step-\d{8}\.tmp-[0-9a-f]+")


@contextmanager
def cleared_if_in_vain(comm: Comm, aside: Path) -> Iterator[None]:
    """Give a full disk its room back at once: when all ranks fail together, nobody writes any more."""
    try:
        yield
    except MpitrainError:
        if comm.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
        raise


def refresh(final: Path, progress: Progress) -> None:
    """Write the progress of a committed checkpoint anew, if it is another: an evaluation may have come after it."""
    manifest = read_manifest(final)
    if manifest.progress != progress:
        reach("save.refresh")
        manifest.progress = progress
        write_manifest(final, manifest)


def fill_file(target: io.RawIOBase, slices: Iterable[StateSlice]) -> None:
    """Write slices into a new HDF5 file: fp32, `/<kind>/<name>`, with attributes shape, start and columns."""
    with h5py.File(target, "w", libver="latest") as file:
        for piece in slices:
            values = piece.values.detach().cpu().numpy()
            data = file.create_dataset(f"{piece.kind}/{piece.name}", data=values, dtype=np.float32)
            data.attrs.update(shape=piece.shape, start=piece.start, columns=piece.columns or (0, piece.shape[-1]))


def write_slices(path: Path, slices: Sequence[StateSlice], image: Image | None) -> dict[str, Any]:
    """Write this rank's file durably, from `image` if the slices were copied there; its entry in the manifest."""
    if not slices:
        return {}
    digest = None
    if image is not None:
        digest = image.store(path)
    else:
        with Sink(path, "w+") as sink:
            fill_file(sink, slices)
            sink.check()
    reach("save.hash")
    pieces = [
        Piece(kind=piece.kind, name=piece.name, start=piece.start, stop=piece.stop, columns=piece.columns)
        for piece in slices
    ]
    return {path.name: _entry(path, pieces, digest)}


def write_documents(directory: Path, documents: Mapping[str, str]) -> dict[str, Any]:
    """Write small text files durably; their entries in the manifest."""
    entries = {}
    for name, text in documents.items():
        (directory / name).write_text(text, encoding="utf-8")
        entries[name] = _entry(directory / name, [])
    return entries


def _entry(path: Path, pieces: list[Piece], digest: Digest | None = None) -> dict[str, Any]:
    found = digest or Digest.of(parts_of(path))
    sync(path)
    forget_cached(path)
    if file_sum(path) != found.xxh3:  # or what was before would be deleted for the sake of this
        raise OSError(errno.EIO, "other bytes were read back than had been written")
    return FileEntry(**found._asdict(), bytes=path.stat().st_size, pieces=pieces).model_dump()


def commit(aside: Path, final: Path, manifest: Manifest) -> None:
    """Make what lies aside the checkpoint `final`, durably (rank 0 only)."""
    reach("save.manifest")
    write_manifest(aside, manifest)
    if final.exists():  # it is damaged, or its step has been done again
        discard(final)
    reach("save.rename")
    aside.rename(final)
    reach("save.committed")
    sync(final.parent)


def retain(checkpoints: Path, keep: int, pinned: int) -> None:
    """Delete all checkpoints but the newest `keep` and that of step `pinned` (rank 0 only, after a commit)."""
    reach("save.retain")
    for place in committed(checkpoints)[keep:]:
        if place.name != f"step-{pinned:08d}":
            discard(place)


def forget_after(checkpoints: Path, step: int) -> None:
    """Delete checkpoints of steps that are to be done again, damaged ones among them (rank 0 only, on a resume)."""
    for place in candidates(checkpoints):
        if place.name > f"step-{step:08d}":
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
