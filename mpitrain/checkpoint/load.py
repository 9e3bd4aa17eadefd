"""Verify and read checkpoints, on any mesh: every byte is hashed before any of it is used."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mpitrain.checkpoint.manifest import FileEntry, Manifest, Piece, candidates, read_manifest
from mpitrain.comm.buckets import StateSlice
from mpitrain.errors import CheckpointError, on_all_ranks
from mpitrain.files import file_hash, file_sum
from mpitrain.hdf5 import Array, map_arrays
from mpitrain.runtime.agree import Comm, share, together


def verify(comm: Comm, directory: Path) -> Manifest:
    """The manifest, after all files were found whole; ranks share the hashing (collective).

    Raises:
        CheckpointError: on all ranks, with file, expected and actual hash.
    """
    document = None
    with together(comm, f"reading {directory}"):
        if comm.rank == 0:
            document = read_manifest(directory).model_dump_json()
    manifest = Manifest.model_validate_json(share(comm, document))
    with together(comm, f"verifying {directory}"):
        for name in sorted(manifest.files)[comm.rank :: comm.size]:
            _verify_file(directory / name, manifest.files[name])
    return manifest


def _verify_file(path: Path, expected: FileEntry) -> None:
    if path.is_symlink() or not path.is_file():
        raise CheckpointError(f"{path}: is listed in the manifest, but is not there as a regular file")
    try:
        size = path.stat().st_size
        if size != expected.bytes:
            raise CheckpointError(f"{path}: is damaged: it has {size:,} bytes, the manifest says {expected.bytes:,}")
        name, told = ("xxh3", expected.xxh3) if expected.xxh3 else ("sha256", expected.sha256)
        actual = file_sum(path) if expected.xxh3 else file_hash(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    if actual != told:
        raise CheckpointError(f"{path}: is damaged: {name} is {actual}, the manifest says {told}")


def newest_usable(comm: Comm, checkpoints: Path, warn: list[str]) -> tuple[Path, Manifest] | None:
    """The newest checkpoint that is whole, or None if there never was one (collective).

    Args:
        warn: gets a line for every damaged checkpoint that was passed over.

    Raises:
        CheckpointError: there are checkpoints, but all are damaged.
    """
    names = share(comm, [str(path) for path in candidates(checkpoints)])
    for name in names:
        try:
            return Path(name), verify(comm, Path(name))
        except CheckpointError as error:
            warn.append(str(error))
    if names:
        hint = "give another --out to start anew, or --resume DIR to start from another run"
        raise on_all_ranks(CheckpointError("\n  ".join(["all checkpoints are damaged:", *warn, hint])))
    return None


Places = dict[tuple[str, str], list[tuple[str, Piece]]]
Where = slice | NDArray[np.int64]


def _places_of(manifest: Manifest) -> Places:
    """File and extent of every piece, by kind and name."""
    places: Places = defaultdict(list)
    for file, entry in manifest.files.items():
        for piece in entry.pieces:
            places[piece.kind, piece.name].append((file, piece))
    return places


def overlap(wanted: StateSlice, piece: Piece) -> tuple[int, Where, Where]:
    """How many elements both have, where they are in `wanted`, and where in `piece`."""
    if wanted.columns == piece.columns:
        start = max(wanted.start, piece.start)
        stop = max(start, min(wanted.stop, piece.stop))
        return (
            stop - start,
            slice(start - wanted.start, stop - wanted.start),
            slice(start - piece.start, stop - piece.start),
        )
    ours, theirs = (each.columns or (0, wanted.shape[-1]) for each in (wanted, piece))
    width, their_width = ours[1] - ours[0], theirs[1] - theirs[0]
    first, last = piece.start // their_width, -(-piece.stop // their_width)  # rows
    elements = np.arange(max(wanted.start, first * width), min(wanted.stop, last * width))
    rows, columns = np.divmod(elements, width)
    columns += ours[0] - theirs[0]
    found = rows * their_width + columns - piece.start
    both = (columns >= 0) & (columns < their_width) & (found >= 0) & (found < piece.stop - piece.start)
    return int(both.sum()), elements[both] - wanted.start, found[both]


def holds(manifest: Manifest, slices: Iterable[StateSlice]) -> bool:
    """Whether `fill` would find every element of these slices."""
    places = _places_of(manifest)
    return all(
        sum(overlap(wanted, piece)[0] for _, piece in places[wanted.kind, wanted.name]) == wanted.stop - wanted.start
        for wanted in slices
    )


def fill(comm: Comm, directory: Path, manifest: Manifest, slices: Iterable[StateSlice]) -> None:
    """Read the ranges that this rank needs from whichever files hold them (collective).

    Raises:
        CheckpointError: a tensor is missing, incomplete or of another shape.
    """
    with together(comm, f"loading {directory}"):
        places, opened = _places_of(manifest), Opened(directory, manifest)
        for wanted in slices:
            _fill_one(manifest, wanted, places[wanted.kind, wanted.name], opened)


class Opened:
    """Pieces of a checkpoint's files as views; each file is opened when it is first needed."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        """Nothing is open yet."""
        self.directory, self._manifest = directory, manifest
        self._files: dict[str, dict[str, Array]] = {}

    def view(self, name: str, piece: Piece) -> Array:
        """The elements of a piece, fp32 [stop - start].

        Raises:
            CheckpointError: the file does not hold them, as plain as they were written.
        """
        if name not in self._files:
            wanted = {f"{each.kind}/{each.name}": ("<f4",) for each in self._manifest.files[name].pieces}
            self._files[name] = map_arrays(self.directory / name, wanted, CheckpointError)
        found = self._files[name][f"{piece.kind}/{piece.name}"]
        if len(found) != piece.stop - piece.start:
            raise CheckpointError(
                f"{self.directory / name}: {piece.kind}/{piece.name}: has {len(found)} elements, the manifest says "
                f"{piece.stop - piece.start}"
            )
        return found


def _fill_one(manifest: Manifest, wanted: StateSlice, places: list[tuple[str, Piece]], opened: Opened) -> None:
    shape = manifest.tensors.get(wanted.name)
    if shape != list(wanted.shape):
        raise CheckpointError(
            f"{opened.directory}: {wanted.name} has shape {shape}, the model's is {list(wanted.shape)}"
        )
    missing = wanted.stop - wanted.start
    for name, piece in places:
        count, here, there = overlap(wanted, piece)
        if not count:
            continue
        values = opened.view(name, piece)[there]
        if wanted.values.device.type == "cpu":
            wanted.values.detach().numpy()[here] = values
        else:
            wanted.values[here] = torch.from_numpy(values.copy()).to(wanted.values.device)
        missing -= count
    if missing:
        raise CheckpointError(f"{opened.directory}: {missing} elements of {wanted.kind} {wanted.name} are in no file")
