"""The run directory: whether all ranks see it, and whether it locks, renames and reads as checkpoints need it."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mpitrain.dataset.shards import write_arrays
from mpitrain.doctor.findings import Finding
from mpitrain.doctor.ground import Ground, everywhere
from mpitrain.doctor.judge_files import FREE, HELD, judge_directory, judge_hdf5, judge_locks, judge_rename
from mpitrain.errors import DataError
from mpitrain.files import forget_cached, replace_file, sync, user_path
from mpitrain.hdf5 import map_arrays
from mpitrain.observe.record import LOCK, TRIAL, RunDirectory
from mpitrain.runtime.agree import attempt, share

NUM_VALUES = 1 << 22  # of 8 bytes: long against opening a file, short against a slow file server
PUT_IN_PLACE = "in-place"


def check_files(ground: Ground) -> Iterator[Finding]:
    """Write into a directory of its own in --out, or where that will be, and have all ranks look (collective)."""
    comm = ground.comm
    made, *told = attempt(comm, "making a directory", lambda: _make(ground) if comm.rank == 0 else [None])
    path, token, (place, kind, free) = share(comm, [str(made.path), made.token, told] if made else None)
    directory = made or RunDirectory(Path(path))
    try:
        seen = everywhere(comm, f"looking for {path}", lambda: directory.is_seen(token))
        yield judge_directory(place, kind, free, seen, ground.hosts)
        here = seen[comm.rank]
        locks = everywhere(comm, f"locking {path}", lambda: _ask_for_lock(directory.path) if here else HELD)
        yield judge_locks(locks, ground.hosts)
        yield _check_rename(ground, directory.path, seen)
        yield _check_hdf5(ground, directory.path, seen)
    finally:
        if made is not None:
            made.release()
            shutil.rmtree(made.path, ignore_errors=True)


def _make(ground: Ground) -> list[Any]:
    """A run's directory, its place's full name, the kind of its file system, and how many bytes are free."""
    out = ground.config.out or Path()
    place = next((each for each in (out, *out.parents) if each.exists()), Path())  # --out itself a training makes
    directory = RunDirectory(place / f"{TRIAL}{secrets.token_hex(4)}")
    with user_path("--out", out):
        if ground.config.out is not None:
            RunDirectory(out).require_ours()
        directory.create()
    status = os.statvfs(place)
    return [directory, str(place.absolute()), _kind_of(place), status.f_bavail * status.f_frsize]


def _kind_of(place: Path) -> str:
    """From the device that it is on (proc(5)); nothing if that is not told."""
    device = place.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return ""
    kinds = [line.rpartition(" - ")[2].split()[0] for line in lines if line.split()[2] == number]
    return kinds[-1] if kinds else ""


def _ask_for_lock(path: Path) -> str:
    """What becomes of asking for the lock that rank 0 holds: by another description of the file, on rank 0 too."""
    with (path / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return HELD
        except OSError as error:
            return error.strerror or repr(error)
    return FREE


def _check_rename(ground: Ground, path: Path, seen: list[bool]) -> Finding:
    comm, file = ground.comm, path / PUT_IN_PLACE
    faults = everywhere(comm, f"renaming in {path}", lambda: _rename(path, file) if comm.rank == 0 else "")
    same = everywhere(
        comm, f"reading {file}", lambda: not seen[comm.rank] or file.read_text(encoding="utf-8") == "new and longer"
    )
    return judge_rename(faults[0], [rank for rank, right in enumerate(same) if not right])


def _rename(path: Path, file: Path) -> str:
    """What is wrong with putting files and directories in place, if anything is."""
    replace_file(file, "old")
    with file.open(encoding="utf-8") as before:
        replace_file(file, "new and longer")
        if before.read() != "old":
            return "who has a file open sees what was put in its place"
    aside, final = path / "step.tmp", path / "step"
    aside.mkdir()
    (aside / "file").write_text("whole", encoding="utf-8")
    aside.rename(final)
    sync(path)
    return "" if (final / "file").exists() and not aside.exists() else "a directory has not got its new name"


def _check_hdf5(ground: Ground, path: Path, seen: list[bool]) -> Finding:
    comm, file = ground.comm, path / "values.h5"
    values = np.arange(NUM_VALUES, dtype="<i8")

    def write() -> None:
        if comm.rank == 0:
            with user_path("--out", path.parent):
                write_arrays(file, {"values": values})
                forget_cached(file)

    def read() -> list[Any]:
        if not seen[comm.rank]:
            return []
        began = time.perf_counter()
        found = map_arrays(file, {"values": ("<i8",)}, DataError)["values"].copy()
        return [values.nbytes / (time.perf_counter() - began), bool(np.array_equal(found, values))]

    everywhere(comm, f"writing {file}", write)
    measured = everywhere(comm, f"reading {file}", read)
    wrong = [rank for rank, each in enumerate(measured) if each and not each[1]]
    rates = [each[0] for each in measured if each]
    return judge_hdf5(rates, wrong, values.nbytes, crowded=ground.cores.crowded)
