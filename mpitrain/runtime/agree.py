"""Collective votes: every rank leaves each of these calls with the same answer, or with the same error.

Messages are JSON in upper-case (buffer) calls: nothing is pickled. Every function is collective over `comm`.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from mpitrain.errors import ExitCode, MpitrainError, UsageError, error_of, on_all_ranks
from mpitrain.runtime.notes import State, note, wait

Comm = MPI.Intracomm
T = TypeVar("T")


def share_array(comm: Comm, array: NDArray[Any] | None, root: int = 0) -> NDArray[Any]:
    """Root's array on every rank. Only root's argument counts."""
    head = share(comm, [array.dtype.str, list(array.shape)] if array is not None and comm.rank == root else None, root)
    data = np.ascontiguousarray(array) if comm.rank == root else np.empty(head[1], np.dtype(head[0]))
    view = data.reshape(-1).view(np.uint8)
    for start in range(0, view.size, 1 << 30):  # some MPIs refuse messages beyond 2 GiB
        comm.Bcast([view[start : start + (1 << 30)], MPI.BYTE], root)
    return data


def _encoded(value: Any) -> NDArray[np.uint8]:
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def share(comm: Comm, value: Any, root: int = 0) -> Any:
    """Root's JSON value on every rank. Only root's argument counts."""
    text = _encoded(value) if comm.rank == root else np.empty(0, np.uint8)
    size = np.array([text.size], np.int64)
    wait()
    comm.Bcast(size, root)
    buffer = text.copy() if comm.rank == root else np.empty(size[0], np.uint8)
    comm.Bcast([buffer, MPI.BYTE], root)
    return json.loads(buffer.tobytes())


def collect(comm: Comm, value: Any) -> list[Any]:
    """Everyone's JSON value, in rank order, on every rank."""
    text = _encoded(value)
    sizes = np.empty(comm.size, np.int64)
    wait()
    comm.Allgather(np.array([text.size], np.int64), sizes)
    buffer = np.empty(int(sizes.sum()), np.uint8)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    comm.Allgatherv([text, MPI.BYTE], [buffer, sizes, starts[:-1], MPI.BYTE])
    return [json.loads(buffer[a:b].tobytes()) for a, b in pairwise(starts)]


def gather(comm: Comm, value: Any) -> list[Any]:
    """Everyone's JSON value, in rank order, on rank 0; nothing on others. For what is too large for `collect`."""
    text = _encoded(value)
    wait()
    if comm.rank > 0:
        comm.Send(np.array([text.size], np.int64), 0)
        comm.Send([text, MPI.BYTE], 0)
        return []
    found, size = [value], np.empty(1, np.int64)
    for source in range(1, comm.size):
        comm.Recv(size, source)
        buffer = np.empty(size[0], np.uint8)
        comm.Recv([buffer, MPI.BYTE], source)
        found.append(json.loads(buffer.tobytes()))
    return found


def everyone(comm: Comm, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The values of each rank, [ranks, ...], on every rank."""
    found = np.empty((comm.size, *values.shape))
    wait()
    comm.Allgather(values, found)
    return found


def total(comm: Comm, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Element-wise sum over ranks, in rank order, so that the bits are the same on every rank and in every run."""
    return np.asarray(everyone(comm, values).sum(axis=0), np.float64)


def any_rank(comm: Comm, flag: bool) -> bool:
    """Whether the flag is set on at least one rank."""
    return bool(total(comm, np.array([float(flag)]))[0] > 0)


@contextmanager
def together(comm: Comm, what: str, state: State = State.WORKING) -> Iterator[None]:
    """Run a section that may fail on some ranks only; leave it on all ranks, or raise on all of them.

    The section itself must not hold a collective call that a failed rank would miss. The error raised
    everywhere is that of the lowest failed rank. What is not an `MpitrainError` keeps its traceback on the
    rank where it happened and reaches the others as a fault that names that rank. However long the section
    takes, it is no hang as long as `state` says so.
    """
    error: Exception | None = None
    note(what.encode(), state=state)
    try:
        yield
    except Exception as caught:
        error = caught
    note(f"vote after {what}".encode())
    mine = None if error is None else [getattr(error, "code", ExitCode.FAULT), f"{error}" or repr(error)]
    if not any_rank(comm, error is not None):
        return
    rank, (code, message) = next((r, found) for r, found in enumerate(collect(comm, mine)) if found)
    if error is not None and not isinstance(error, MpitrainError):
        raise error
    raise on_all_ranks(error_of(code, f"rank {rank}, while {what}: {message}" if code == ExitCode.FAULT else message))


def require_same(comm: Comm, what: str, mine: Mapping[str, str], kind: type[MpitrainError] = UsageError) -> None:
    """Refuse ranks that were told, or are made of, other things than rank 0.

    Raises:
        MpitrainError: of `kind`, on all ranks; names the first rank that differs, its node, and each difference.
    """
    first = share(comm, [platform.node(), dict(mine)])
    with together(comm, what):
        node, told = first
        lines = [
            f"{key}: {mine.get(key)} on rank {comm.rank} ({platform.node()}), {told.get(key)} on rank 0 ({node})"
            for key in [*told, *(key for key in mine if key not in told)]
            if mine.get(key) != told.get(key)
        ]
        if lines:
            raise kind("\n  ".join([f"{what}: ranks differ, and all must have the same", *lines]))


def attempt(comm: Comm, what: str, work: Callable[[], T]) -> T:
    """What `work` returns on this rank, if it succeeds on every rank; see `together`."""
    result: list[T] = []
    with together(comm, what):
        result.append(work())
    return result[0]


def attempt_at_root(comm: Comm, what: str, work: Callable[[], Any]) -> Any:
    """The JSON value that `work` returns on rank 0, on every rank; its error on every rank if it fails."""
    return share(comm, attempt(comm, what, lambda: work() if comm.rank == 0 else None))
