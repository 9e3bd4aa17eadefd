"""A tiny training to be interrupted in all ways, and the one that nobody interrupts to compare it with."""

from __future__ import annotations

import itertools
import os
import random
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from launching import begin, command, finish
from tiny import exit_of, make_tiny, metrics_of, processes_of, tensors_of

SEED = int(os.environ.get("SEED", "0")) or random.SystemRandom().randrange(1, 10**6)
ROUNDS = int(os.environ.get("ROUNDS", "2"))
RANKS = [2, 1, 3, 4]  # two are for the quick part
NO_HANG = 30  # seconds in which all processes must be gone
NUM_STEPS = 6  # of which the first three are an epoch
FLAGS = {"train.epochs": 2, "train.batch_size": 68, "checkpoint.every": 1, "checkpoint.keep": 2}


@dataclass
class Exam:
    """A folder for runs of one training; the one without misfortune is done when it is first asked for."""

    place: Path
    _marks: Any = field(default_factory=itertools.count)
    _references: dict[int, Path] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.flags = make_tiny(self.place)
        for name, value in FLAGS.items():
            self.flags += [f"--{name}", str(value)]

    def begin(self, ranks: int, out: str, *program: str, settings: Sequence[str] = (), **environment: str) -> Attempt:
        """Start the training, or go on with it, in the background, by `-m mpitrain` or another program."""
        return self.begin_line(out, command(ranks, *self.words(out, *program, settings=settings)), **environment)

    def words(self, out: str, *program: str, settings: Sequence[str] = ()) -> list[str]:
        """What Python is told."""
        return [*(program or ("-m", "mpitrain")), *self.flags, *settings, "--out", out]

    def begin_line(self, out: str, line: Sequence[str], **environment: str) -> Attempt:
        """Start the training by a command line."""
        mark = f"exam-{os.getpid()}-{next(self._marks)}"
        environment |= {"MPITRAIN_CACHE": str(self.place / "cache"), "EXAM_MARK": mark}
        process = begin(list(line), self.place, **environment)
        return Attempt(process, f"EXAM_MARK={mark}", self.place / out)

    def run(self, ranks: int, out: str, *program: str, settings: Sequence[str] = (), **environment: str) -> Any:
        """Start it and wait until all of it is gone."""
        return self.begin(ranks, out, *program, settings=settings, **environment).end(120)

    def reference(self, ranks: int) -> Path:
        """The run directory of the training without misfortune."""
        if ranks not in self._references:
            began, out = time.monotonic(), f"reference-{ranks}"
            done = self.run(ranks, out)
            assert done.returncode == 0, done.stdout + done.stderr
            self.seconds[ranks] = time.monotonic() - began
            self._references[ranks] = self.place / out
        return self._references[ranks]

    def copy(self, out: str) -> Path:
        """A finished run of two ranks that may be spoilt."""
        return Path(shutil.copytree(self.reference(2), self.place / out))

    def finish(self, ranks: int, out: str, newest: int) -> Any:
        """Go on with an interrupted run: from its newest checkpoint, to the bits of the one without misfortune."""
        reference, run = self.reference(ranks), self.place / out
        done = self.run(ranks, out)
        assert done.returncode == 0, done.stdout + done.stderr
        resumed = re.search(r"^resume +step (\d+)", done.stdout, re.M)
        assert (int(resumed[1]) if resumed else 0) == newest, done.stdout
        assert steps_of(run) == steps_of(reference)
        assert_same_checkpoint(run, reference)
        assert [line["step"] for line in metrics_of(run)] == list(range(1, NUM_STEPS + 1))
        for mine, theirs in zip(metrics_of(run), metrics_of(reference), strict=True):
            assert [mine[key] for key in ("loss", "grad_norm")] == [theirs[key] for key in ("loss", "grad_norm")]
        assert not list((run / "checkpoints").glob("*.tmp-*")), "left-overs"
        assert (run / "eval.json").read_bytes() == (reference / "eval.json").read_bytes()
        assert exit_of(run) == exit_of(reference)
        return done


@dataclass
class Attempt:
    """One start of the training."""

    process: subprocess.Popen[str]
    mark: str
    run: Path

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Or until it has ended."""
        limit = time.monotonic() + 60
        while not condition() and self.process.poll() is None:
            assert time.monotonic() < limit
            time.sleep(0.01)

    def end(self, timeout: float = NO_HANG) -> Any:
        """Wait until the launcher has ended, and all it has started."""
        done = finish(self.process, timeout)
        limit = time.monotonic() + NO_HANG
        while left := processes_of(self.mark):
            assert time.monotonic() < limit, left
            time.sleep(0.05)
        return done


def steps_of(run: Path) -> list[int]:
    """Steps of the committed checkpoints, in order."""
    return sorted(int(place.parent.name[5:]) for place in run.glob("checkpoints/step-????????/manifest.json"))


def newest(run: Path) -> Path:
    """The directory of the newest checkpoint."""
    return run / "checkpoints" / f"step-{steps_of(run)[-1]:08d}"


def assert_same_checkpoint(run: Path, reference: Path) -> None:
    """The newest checkpoints hold the same bits."""
    mine, theirs = (tensors_of(newest(each)) for each in (run, reference))
    assert mine.keys() == theirs.keys()
    for name, values in mine.items():
        assert np.array_equal(values.view(np.int32), theirs[name].view(np.int32)), name
