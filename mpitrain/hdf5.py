"""Plain arrays of an HDF5 file as views of a memory map; what could lead elsewhere, or grow, is refused.

A file may hold links into other files, storage outside of itself, filters that load code, and shapes that are larger
than any disk. HDF5 is only asked where an array lies; its bytes are then read without it, and only inside the file.
"""

from __future__ import annotations

import mmap
import stat
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from mpitrain.errors import MpitrainError

Array = NDArray[Any]


def map_arrays(path: Path, wanted: Mapping[str, Collection[str]], kind: type[MpitrainError]) -> dict[str, Array]:
    """Read-only views, [n] each; processes of a node share their memory.

    Args:
        path: of the file.
        wanted: what each dataset's dtype may be, as `numpy.dtype.str` has it, by the dataset's path in the file.
        kind: of the error.

    Raises:
        MpitrainError: names the file and the dataset that is missing or of another kind.
    """
    places: dict[str, tuple[str, int, int]] = {}
    try:
        if not stat.S_ISREG(path.lstat().st_mode):  # a FIFO would hang the reader, a link may lead anywhere
            raise kind(f"{path}: is no plain file")
        with h5py.File(path, "r", locking=False) as file:
            # By the low-level interface, which is four times as fast: checkpoints have hundreds of arrays.
            for group in sorted({each for name in wanted for each in _groups_of(name)}):
                _require_hard_link(path, file.id, group, kind)
            for name, dtypes in wanted.items():
                places[name] = _place(path, file.id, name, dtypes, kind)
        with path.open("rb") as raw:
            view = mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:  # h5py has no class of its own
        raise kind(f"{path}: not a readable HDF5 file: {error}") from None
    arrays: dict[str, Array] = {}
    for name, (dtype, length, offset) in places.items():
        if offset + length * np.dtype(dtype).itemsize > len(view):
            raise kind(f"{path}: {name}: {length} rows reach beyond the end of the file")
        arrays[name] = np.frombuffer(view, dtype, length, offset)
    return arrays


def _groups_of(name: str) -> list[str]:
    """Those on the way to a dataset, the outermost first."""
    parts = name.split("/")
    return ["/".join(parts[:number]) for number in range(1, len(parts))]


def _require_hard_link(path: Path, file: h5py.h5f.FileID, name: str, kind: type[MpitrainError]) -> None:
    if not file.links.exists(name.encode()) or file.links.get_info(name.encode()).type != h5py.h5l.TYPE_HARD:
        raise kind(f"{path}: {name}: missing, or a link")


def _place(
    path: Path, file: h5py.h5f.FileID, name: str, dtypes: Collection[str], kind: type[MpitrainError]
) -> tuple[str, int, int]:
    """dtype, number of elements, and byte offset of a dataset."""
    _require_hard_link(path, file, name, kind)
    if h5py.h5o.get_info(file, name.encode()).type != h5py.h5o.TYPE_DATASET:
        raise kind(f"{path}: {name}: missing, there is something else of that name")
    what = f"{path}: {name}"
    data = h5py.h5d.open(file, name.encode())
    dtype, shape, plan = data.dtype, data.shape, data.get_create_plist()
    if len(shape) != 1 or dtype.str not in dtypes:
        raise kind(f"{what}: found {dtype} of shape {shape}, expected {' or '.join(dtypes)}, 1-D")
    if plan.get_layout() != h5py.h5d.CONTIGUOUS or plan.get_external_count() or plan.get_nfilters():
        raise kind(f"{what}: expected plain contiguous storage inside the file")
    offset = data.get_offset()  # None before the first byte is written, as in an empty dataset
    if offset is None and shape[0]:
        raise kind(f"{what}: {shape[0]} rows are declared, none was written")
    return dtype.str, int(shape[0]), int(offset or 0)
