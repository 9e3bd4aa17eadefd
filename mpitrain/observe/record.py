"""The run directory: what other programs read of a run (config.json, metrics.jsonl, eval.json, exit.json)."""

from __future__ import annotations

import fcntl
import json
import re
import time
from pathlib import Path
from typing import Any

from mpitrain.errors import UsageError
from mpitrain.files import replace_file

STARTS = "starts.json"
SECONDS_FOR_A_PREDECESSOR = 10  # a job that was killed may take a moment to be gone


class RunDirectory:
    """Files of one run; only rank 0 writes them."""

    def __init__(self, path: Path) -> None:
        """Use `path`, which `create` makes."""
        self.path = path
        self.checkpoints = path / "checkpoints"

    def create(self) -> None:
        """Make the directory and its parents, and keep others from writing into it for as long as this object lives.

        Raises:
            UsageError: it holds something else than a run, or another job writes to it.
        """
        if self.path.is_dir() and any(self.path.iterdir()) and not self.checkpoints.is_dir():
            raise UsageError(f"--out {self.path}: holds other things than a run; give a new or an empty directory")
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / "lock").open("a")
        for _ in range(SECONDS_FOR_A_PREDECESSOR):
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                time.sleep(1)
            except OSError:
                return  # a file system without locks: the scheduler has to see to it there
        raise UsageError(f"--out {self.path}: another job writes to it; wait for its end, stop it, or give another")

    def forget_after(self, step: int) -> None:
        """Drop the lines of steps that will be done again, because the run resumes from an earlier checkpoint."""
        lines = [line for line in self._metric_lines() if 0 < _step_of(line) <= step]
        replace_file(self.path / "metrics.jsonl", "".join(f"{line}\n" for line in lines))
        (self.path / "exit.json").unlink(missing_ok=True)

    def count_start(self, step: int) -> int:
        """How many starts in a row have begun at this step, this one included; none of those before came to an end."""
        file = self.path / STARTS
        try:
            before = json.loads(file.read_text(encoding="utf-8"))
            number = 1 + int(before["starts"]) if before["step"] == step else 1
        except (OSError, ValueError, KeyError, TypeError):  # none or damaged
            number = 1
        self.write(STARTS, {"step": step, "starts": number})
        return number

    def forget_starts(self) -> None:
        """The run has come to its end."""
        (self.path / STARTS).unlink(missing_ok=True)

    def add_metrics(self, metrics: dict[str, Any]) -> None:
        """Append a line for a step."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")

    def write(self, name: str, value: Any) -> None:
        """Replace a JSON file as a whole."""
        replace_file(self.path / name, json.dumps(value, indent=1) + "\n")

    def write_exit(self, code: int, reason: str, step: int) -> None:
        """Leave the exit code where every launcher's quirks cannot reach it."""
        self.write("exit.json", {"code": code, "reason": reason, "step": step})

    def _metric_lines(self) -> list[str]:
        file = self.path / "metrics.jsonl"
        lines = file.read_text(encoding="utf-8").split("\n") if file.exists() else []
        return [line for line in lines[:-1] if line]  # what stands behind the last newline was cut by a kill


def _step_of(line: str) -> int:
    """The step of a line of metrics; 0 if it is damaged: a log must not keep a run from going on."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
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
