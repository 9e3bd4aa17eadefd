"""The run directory: what other programs read of a run (config.json, metrics.jsonl, eval.json, exit.json)."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import secrets
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from mpitrain.errors import UsageError
from mpitrain.files import can_be_written, parse_json, replace_file

STARTS, LOCK = "starts.json", "lock"
JOBS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "FLUX_JOB_ID")
SECONDS_FOR_A_PREDECESSOR = 10  # a job that was killed may take a moment to be gone


class RunDirectory:
    """Files of one run; only rank 0 writes them."""

    def __init__(self, path: Path) -> None:
        """Use `path`, which `create` makes."""
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.token = secrets.token_hex(8)  # of whoever has made it
        self._lock: TextIO | None = None

    def create(self) -> None:
        """Make the directory and its parents, and keep others from writing into it for as long as this object lives.

        Raises:
            UsageError: it holds something else than a run, or another job writes to it.
        """
        if self.path.is_dir() and any(self.path.iterdir()) and not self.checkpoints.is_dir():
            raise UsageError(f"--out {self.path}: holds other things than a run; give a new or an empty directory")
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self._lock = lock = (self.path / LOCK).open("a+", encoding="utf-8")
        for _ in range(SECONDS_FOR_A_PREDECESSOR):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(1)
                continue
            except OSError:
                pass  # a file system without locks: the scheduler has to see to it there
            lock.truncate(0)
            lock.write(f"{_whose()}\n{self.token}\n")
            lock.flush()
            return
        lock.seek(0)
        raise UsageError(
            f"--out {self.path}: another job writes to it ({lock.readline().strip()}); wait for its end, "
            "stop it, or give another"
        )

    def release(self) -> None:
        """Let others write."""
        if self._lock is not None:
            self._lock.close()

    def is_seen(self, token: str) -> bool:
        """Whether this rank sees what the rank of that token has written; network file systems may take a moment."""
        for wait in (0.0, 0.1, 0.9, 2.0, 7.0):
            time.sleep(wait)
            with suppress(OSError):
                if token in (self.path / LOCK).read_text(encoding="utf-8"):
                    return True
        return False

    def forget_after(self, step: int) -> None:
        """Drop the lines of steps that will be done again, because the run resumes from an earlier checkpoint."""
        lines = [line for line in self._metric_lines() if 0 < _step_of(line) <= step]
        with can_be_written(self.path):
            replace_file(self.path / "metrics.jsonl", "".join(f"{line}\n" for line in lines))
            (self.path / "exit.json").unlink(missing_ok=True)

    def count_start(self, step: int) -> int:
        """How many starts in a row have begun at this step, this one included; none of those before came to an end."""
        file = self.path / STARTS
        try:
            before = parse_json(file.read_text(encoding="utf-8"))
            number = 1 + int(before["starts"]) if before["step"] == step else 1
        except (OSError, ValueError, KeyError, TypeError, OverflowError):  # none or damaged
            number = 1
        self.write(STARTS, {"step": step, "starts": number})
        return number

    def forget_starts(self) -> None:
        """The run has come to its end."""
        (self.path / STARTS).unlink(missing_ok=True)

    def add_metrics(self, metrics: dict[str, Any]) -> None:
        """Append a line for a step."""
        path = self.path / "metrics.jsonl"
        with can_be_written(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")

    def write(self, name: str, value: Any) -> None:
        """Replace a JSON file as a whole."""
        with can_be_written(self.path / name):
            replace_file(self.path / name, json.dumps(value, indent=1) + "\n")

    def write_exit(self, code: int, reason: str, step: int) -> None:
        """Leave the exit code where every launcher's quirks cannot reach it."""
        self.write("exit.json", {"code": code, "reason": reason, "step": step})

    def _metric_lines(self) -> list[str]:
        file = self.path / "metrics.jsonl"
        lines = file.read_text(encoding="utf-8", errors="replace").split("\n") if file.exists() else []
        return [line for line in lines[:-1] if line]  # what stands behind the last newline was cut by a kill


def _whose() -> str:
    """This process, for those who find its lock."""
    job = next((f", job {os.environ[name]}" for name in JOBS if name in os.environ), "")
    return f"process {os.getpid()} on {platform.node()}{job}"


def _step_of(line: str) -> int:
    """The step of a line of metrics; 0 if it is damaged: a log must not keep a run from going on."""
    try:
        return int(parse_json(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError):
        return 0


def new_run_directory(parent: Path, stem: str) -> Path:
    """Make `parent/stem-n` with the lowest n above all that exist; two runs started together get two directories."""
    parent.mkdir(parents=True, exist_ok=True)
    pattern = re.compile(re.escape(stem) + r"-(\d+)")
    while True:
        taken = [int(match[1]) for place in parent.iterdir() if (match := pattern.fullmatch(place.name))]
        path = parent / f"{stem}-{max(taken, default=0) + 1}"
        try:
            path.mkdir()
            return path
        except FileExistsError:
            continue
