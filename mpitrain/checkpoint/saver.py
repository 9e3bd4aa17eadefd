"""One save at a time, by a thread, while the training goes on.

All ranks go through a save together, in phases: each copies and writes its own file; then rank 0 commits. The thread
does what a rank does alone, and sends no messages. The training loop asks, in the vote that it holds on every step
anyway, whether all threads have ended a phase; then it begins the next one. So steps do not wait for a disk, and a
failure is known to all ranks at the same step. What is saved changes only when weights are updated: before that the
training waits for the copy, which has had a forward and a backward pass of time.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mpitrain import __version__
from mpitrain.checkpoint.manifest import MANIFEST, VERSION, Manifest, Progress
from mpitrain.checkpoint.save import (
    cleared_if_in_vain,
    commit,
    fill_file,
    refresh,
    retain,
    write_documents,
    write_slices,
)
from mpitrain.comm.buckets import StateSlice
from mpitrain.files import Image, can_be_written
from mpitrain.runtime.agree import Comm, gather, share, together
from mpitrain.runtime.failpoints import reach

AS_BEFORE = "the checkpoints before it are as they were: see to the disk, then start again"
SLOW_DISK = 5e7  # bytes a second, until a save has been measured
HEADERS = 1 << 12  # bytes that HDF5 takes for a tensor beside its values, at most


class Saver:
    """Saves into one folder; `close` ends its thread."""

    def __init__(self, comm: Comm, checkpoints: Path, *, asynchronous: bool) -> None:
        """Without `asynchronous`, `save` returns when all is done, and needs no memory for a copy."""
        self._comm, self._checkpoints = comm, checkpoints
        self._image = Image() if asynchronous else None
        self._thread = ThreadPoolExecutor(1, "saver")
        self._work: Future[Any] | None = None
        self._phases: Iterator[None] = iter(())
        self._saved: Progress | None = None  # last, or under way
        self._seconds = 0.0  # of the caller
        self._longest = 0.0  # from the begin of a save to its commit
        self._copied = threading.Event()

    def save(
        self,
        slices: Iterable[StateSlice],
        *,
        progress: Progress,
        mesh: Mapping[str, int],
        identity: Mapping[str, Any],
        documents: Mapping[str, str],
        keep: int,
        pinned: int = -1,
    ) -> Path:
        """Begin to save `step-NNNNNNNN` (collective), when the save before is done; where it will be.

        Of a step that is committed already only the progress is written anew.

        Args:
            slices: what this rank owns; nobody may change it before `wait_for_copy` has returned.
            progress: of the run.
            mesh: ranks along each axis.
            identity: what a resumed run must share.
            documents: small text files that make the checkpoint self-contained, written by rank 0.
            keep: newest checkpoints that stay when this one is committed.
            pinned: step of one more that stays.

        Raises:
            MpitrainError: on all ranks, because one could not write: nothing is committed, what was before stays whole.
        """
        if self._work is not None and self._saved == progress:  # both as the best and as a regular one
            return self._checkpoints / f"step-{progress.step:08d}"
        self.finish()
        self._saved = progress.model_copy()
        began = time.perf_counter()
        final = self._checkpoints / f"step-{progress.step:08d}"
        if share(self._comm, (final / MANIFEST).is_file()):
            with together(self._comm, f"updating {final}"), can_be_written(final, AS_BEFORE):
                if self._comm.rank == 0:
                    refresh(final, progress)
                    retain(self._checkpoints, keep, pinned)
        else:
            described = {"progress": progress.model_copy(), "mesh": dict(mesh), "identity": dict(identity)}
            self._phases = self._carry_out(final, list(slices), described, dict(documents), (keep, pinned))
            next(self._phases)
        self._seconds += time.perf_counter() - began
        if self._image is None:
            self.finish()
        return final

    def wait_for_copy(self) -> None:
        """Return once nothing that is being saved is needed any more; to be called before it changes."""
        if self._work is not None:
            began = time.perf_counter()
            self._copied.wait()
            self._seconds += time.perf_counter() - began

    def is_ready(self) -> bool:
        """Whether there is a save of which this rank has ended a phase, or failed in it."""
        return self._work is not None and self._work.done()

    def advance(self) -> None:
        """Begin the next phase when all ranks are ready, or else wait for them (collective).

        Raises:
            MpitrainError: as above.
        """
        began = time.perf_counter()
        next(self._phases, None)
        self._seconds += time.perf_counter() - began

    def finish(self) -> None:
        """Return when the save under way, if any, is done (collective).

        Raises:
            MpitrainError: as above.
        """
        while self._work is not None:
            self.advance()

    def seconds_of_save(self, num_bytes: int) -> float:
        """How long the longest save took, or one of so many bytes of this rank may take."""
        return self._longest or num_bytes / SLOW_DISK

    def take_seconds(self) -> float:
        """Time that callers have spent here since the last call: while they did, nothing was trained."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def close(self) -> None:
        """End the thread; to be called after `finish`."""
        self._thread.shutdown()

    def _carry_out(
        self,
        final: Path,
        slices: list[StateSlice],
        described: dict[str, Any],
        documents: dict[str, str],
        kept: tuple[int, int],
    ) -> Iterator[None]:
        comm = self._comm
        aside, began = final.with_name(f"{final.name}.tmp-{share(comm, secrets.token_hex(4))}"), time.monotonic()
        try:
            with cleared_if_in_vain(comm, aside):
                with together(comm, f"making {aside}"), can_be_written(aside, AS_BEFORE):
                    reach("save.begin")
                    if comm.rank == 0:
                        aside.mkdir()  # not its parents: whoever has deleted the run directory meant it
                self._copied.clear()
                work = self._begin(lambda: self._write(aside, slices, documents))
                yield
                with together(comm, f"writing {aside}"), can_be_written(aside, AS_BEFORE):
                    entries = work.result()
                everyone = gather(comm, [entries, {piece.name: list(piece.shape) for piece in slices}])
                work = self._begin(lambda: self._commit(aside, final, everyone, described, kept))
                yield
                with together(comm, f"committing {final}"), can_be_written(final, AS_BEFORE):
                    self._longest = max(self._longest, work.result() - began)
        finally:
            self._work = None

    def _begin(self, work: Callable[[], Any]) -> Future[Any]:
        self._work = self._thread.submit(work)
        return self._work

    def _copy(self, slices: list[StateSlice]) -> None:
        reach("save.copy")
        if self._image is not None:
            self._image.reserve(sum(4 * piece.values.numel() + HEADERS for piece in slices))
            fill_file(self._image, slices)

    def _write(self, aside: Path, slices: list[StateSlice], documents: dict[str, str]) -> dict[str, Any]:
        try:
            self._copy(slices)
        finally:  # a failure is told in the vote that ends this phase
            self._copied.set()
        reach("save.slices")
        entries = write_slices(aside / f"rank-{self._comm.rank:05d}.h5", slices, self._image)
        return entries | (write_documents(aside, documents) if self._comm.rank == 0 else {})

    def _commit(
        self, aside: Path, final: Path, everyone: list[Any], described: dict[str, Any], kept: tuple[int, int]
    ) -> float:
        """When it was done."""
        if self._comm.rank == 0:
            manifest = Manifest(
                version=VERSION,
                written_by=f"mpitrain {__version__}",
                tensors={name: shape for _, shapes in everyone for name, shape in shapes.items()},
                files={name: entry for entries, _ in everyone for name, entry in entries.items()},
                **described,
            )
            commit(aside, final, manifest)
            retain(self._checkpoints, *kept)
        return time.monotonic()
