"""The arrays of a rank's own micro-batches, ready before the computation needs them.

The first stage reads tokens, the last reads labels, every stage knows all lengths from the index, which rank 0 reads
and shares. Shards are mapped into memory, so a node holds one copy of what its ranks read.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from mpitrain.dataset.batches import Indices
from mpitrain.dataset.sequences import SplitIndex
from mpitrain.dataset.shards import DatasetInfo, map_shard, read_index
from mpitrain.runtime.agree import Comm, share, share_array, together

Item = TypeVar("Item")
Made = TypeVar("Made")


class Split:
    """One split of a prepared dataset."""

    def __init__(self, comm: Comm, directory: Path, info: DatasetInfo, name: str) -> None:
        """Read the index on rank 0 and share it (collective)."""
        entries = info.splits[name]
        self._paths = [directory / entry.file for entry in entries]
        self._firsts = np.cumsum([0, *(entry.sequences for entry in entries)])
        self._mapped: dict[int, dict[str, NDArray[Any]]] = {}
        found: NDArray[Any] | None = None
        with together(comm, f"reading the index of {directory}"):
            if comm.rank == 0:
                found = np.stack([np.concatenate(column) for column in zip(*map(read_index, self._paths), strict=True)])
        self.index = SplitIndex(*share_array(comm, found))

    def read(self, field: str, sequences: Indices) -> NDArray[np.int64]:
        """As in `Sequences`."""
        parts = [self._one(field, int(number)) for number in sequences]
        return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, np.int64)

    def _one(self, field: str, sequence: int) -> NDArray[Any]:
        shard = int(np.searchsorted(self._firsts, sequence, side="right")) - 1
        if shard not in self._mapped:
            self._mapped[shard] = map_shard(self._paths[shard])
        arrays = self._mapped[shard]
        start, stop = arrays["offsets"][sequence - self._firsts[shard] :][:2]
        return arrays[field][start:stop]


def open_split(comm: Comm, directory: Path, info: DatasetInfo, name: str) -> Split | None:
    """The split, or None if the dataset has no such split (the same on every rank)."""
    return Split(comm, directory, info, name) if share(comm, name in info.splits) else None


def prefetch(
    items: Iterable[Item], make: Callable[[Item], Made], depth: int = 2
) -> Generator[tuple[Item, Made], None, None]:
    """Yield (item, make(item)) in order; up to `depth` are made ahead of time by a thread.

    What `make` raises is raised here, in the caller's thread. Closing the iterator ends the thread.
    """
    ready: queue.Queue[tuple[Item, Made] | BaseException | None] = queue.Queue(maxsize=depth)
    closed = threading.Event()

    def put(entry: tuple[Item, Made] | BaseException | None) -> None:
        while not closed.is_set():
            try:
                ready.put(entry, timeout=0.1)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                if closed.is_set():
                    return
                put((item, make(item)))
            put(None)
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while (entry := ready.get()) is not None:
            if isinstance(entry, BaseException):
                raise entry
            yield entry
    finally:
        closed.set()
        thread.join()
