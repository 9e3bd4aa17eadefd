"""The run directory: what other programs read of a run (config.json, metrics.jsonl, eval.json, exit.json ...)."""

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

from mpitrain.errors import MpitrainError, UsageError
from mpitrain.files import can_be_written, create_file, parse_json, replace_file
from mpitrain.observe import ledger
from mpitrain.observe.lines import Line, read_lines, step_of

TRIAL = ".mpitrain-doctor-"  # what doctor's directories begin with
STARTS, LOCK = "starts.json", "lock"
MACHINE, PLAN = "machine.toml", "plan.json"
PLANNED = (MACHINE, PLAN, "schedule.png", "schedule.svg")
EXIT, METRICS, EVALUATIONS, LEDGER = "exit.json", "metrics.jsonl", "evaluations.jsonl", "ledger.json"
JOBS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "FLUX_JOB_ID")
SECONDS_FOR_A_PREDECESSOR = 10  # a job that was killed may take a moment to be gone


def is_before_a_run(place: Path) -> bool:
    """Whether `mpitrain doctor` or `plan` has left it."""
    return place.name.startswith(TRIAL) or place.name in PLANNED


class RunDirectory:
    """Files of one run; only rank 0 writes them."""

    def __init__(self, path: Path) -> None:
        """Use `path`, which `create` makes."""
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.token = secrets.token_hex(8)  # of whoever has made it
        self._lock: TextIO | None = None
        self._number = 0

    def require_ours(self) -> None:
        """Refuse a directory that holds something else than a run (UsageError)."""
        if self.path.is_dir() and not all(map(is_before_a_run, self.path.iterdir())) and not self.checkpoints.is_dir():
            raise UsageError(f"--out {self.path}: holds other things than a run; give a new or an empty directory")

    def create(self) -> None:
        """Make the directory and its parents, and keep others from writing into it for as long as this object lives.

        Raises:
            UsageError: it holds something else than a run, or another job writes to it.
        """
        self.require_ours()
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

    def begin(self, step: int, *, ranks: int, nodes: int, seconds: float) -> None:
        """Go on from `step`, `seconds` after this program's start; drop the lines of steps that will be done again."""
        starts, lines, evaluations = self._account()
        ledger.settle(starts, lines, evaluations, step)
        self.write(LEDGER, ledger.STARTS.dump_python(starts))  # a death until the last line below must not count twice
        with can_be_written(self.path):
            for name, found in ((METRICS, lines), (EVALUATIONS, evaluations)):
                kept = (json.dumps(line) for line in found if step_of(line) <= step)
                replace_file(self.path / name, "".join(f"{line}\n" for line in kept))
            (self.path / EXIT).unlink(missing_ok=True)
        starts.append(ledger.Start(step=step, ranks=ranks, nodes=nodes, start=seconds, seconds=seconds))
        self.write(LEDGER, ledger.STARTS.dump_python(starts))
        self._number = len(starts)

    def count_start(self, step: int) -> int:
        """How many starts in a row have begun at this step, this one included; none of those before came to an end."""
        file = self.path / STARTS
        try:
            before = parse_json(file.read_text(encoding="utf-8")) if file.is_file() else {}
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
        self._append(METRICS, metrics)

    def add_evaluation(self, scores: dict[str, Any]) -> None:
        """Append a line for a split that was scored, with the number of the start that has done so."""
        self._append(EVALUATIONS, {"start": self._number, **scores})

    def _append(self, name: str, line: Line) -> None:
        path = self.path / name
        with can_be_written(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def write(self, name: str, value: Any) -> None:
        """Replace a JSON file as a whole."""
        with can_be_written(self.path / name):
            replace_file(self.path / name, json.dumps(value, indent=1) + "\n")

    def write_exit(self, code: int, reason: str, step: int, seconds: float | None = None, saves: float = 0.0) -> None:
        """Leave the exit code where every launcher's quirks cannot reach it, then, beside it, what the run has cost.

        Args:
            code, reason, step: of the end.
            seconds: since this program's start; None if it has not come to `begin`.
            saves: seconds of saves after the last step.
        """
        told = {"code": code, "reason": reason, "step": step}
        with can_be_written(self.path / EXIT):  # a rank that ends the job may have told more, and end this one now
            create_file(self.path / EXIT, json.dumps(told, indent=1) + "\n")
        with suppress(MpitrainError):  # the code is what matters
            self.write(EXIT, told | {"node_hours": self._settled(seconds, saves)})

    def _settled(self, seconds: float | None, saves: float) -> dict[str, float]:
        starts, lines, evaluations = self._account()
        ledger.see(starts, lines, evaluations)
        if starts and seconds is not None:
            starts[-1] = starts[-1].model_copy(update={"seconds": seconds, "saves": saves})
            self.write(LEDGER, ledger.STARTS.dump_python(starts))
        return ledger.node_hours(starts, lines, evaluations)

    def _account(self) -> tuple[list[ledger.Start], list[Line], list[Line]]:
        file = self.path / LEDGER
        starts = ledger.read_starts(file.read_text(encoding="utf-8", errors="replace")) if file.is_file() else []
        return starts, read_lines(self.path / METRICS)[0], read_lines(self.path / EVALUATIONS)[0]


def _whose() -> str:
    """This process, for those who find its lock."""
    job = next((f", job {os.environ[name]}" for name in JOBS if name in os.environ), "")
    return f"process {os.getpid()} on {platform.node()}{job}"


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
