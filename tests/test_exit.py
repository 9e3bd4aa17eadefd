"""No rank waits for ever: whatever happens to one rank ends the job on all ranks soon, and names the first cause."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from launching import finish, mpirun, start
from tiny import exit_of, make_tiny, metrics_of, processes_of

SECONDS = 30
# Runs `train` with step 3 of rank 1 replaced by what the test puts in.
SCRIPT = """
import os, sys, threading
from mpitrain import cli
from mpitrain.comm.reducer import GradientReducer
from mpitrain.runtime.agree import MPI
from mpitrain.step import Stepper

def misfortune(self):
    {misfortune}

def fail(*arguments):
    raise RuntimeError("the dog ate my gradients")

run = Stepper.run
def run_or_fail(self, plan, micro_batches, stop):
    if MPI.COMM_WORLD.rank == 1 and plan.step == 2:
        misfortune(self)
    return run(self, plan, micro_batches, stop)

Stepper.run = run_or_fail
cli.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def problem(tmp_path_factory) -> tuple[Path, list[str], dict[str, str]]:
    """A folder, the flags of a tiny training in it, and its environment; shards are made by the first that needs them."""
    place = tmp_path_factory.mktemp("exit")
    return place, make_tiny(place), {"MPITRAIN_CACHE": str(place / "cache")}


def train_with(problem: tuple[Path, list[str], dict[str, str]], misfortune: str, out: str) -> Any:
    """What became of three ranks, all of which must be gone."""
    place, flags, environment = problem
    (place / f"{out}.py").write_text(SCRIPT.format(misfortune=misfortune))
    mark = {"TEST_MARK": f"exit-{out}-{os.getpid()}"}
    arguments = (f"{out}.py", *flags, "--out", out, "--mesh.data", "3")
    done = mpirun(3, *arguments, cwd=place, timeout=90, **environment, **mark)
    limit = time.monotonic() + SECONDS
    while left := processes_of(f"TEST_MARK={mark['TEST_MARK']}"):
        assert time.monotonic() < limit, left
        time.sleep(0.1)
    assert len(metrics_of(place / out)) == 2
    return done


@pytest.mark.parametrize(
    "name, misfortune",
    [
        ("step", "fail()"),
        ("thread", "threading.Thread(target=fail).start()"),
        ("reducer", "GradientReducer._reduce = fail"),
    ],
)
def test_an_uncaught_exception_on_one_rank_ends_all_with_its_traceback(problem, name, misfortune):
    done = train_with(problem, misfortune, name)
    assert done.returncode == 70, done.stdout + done.stderr
    assert "[rank 1] Traceback (most recent call last):\n" in done.stderr
    assert "[rank 1] RuntimeError: the dog ate my gradients\n" in done.stderr
    assert "[rank 0]" not in done.stderr and "[rank 2]" not in done.stderr


@pytest.mark.parametrize("name, misfortune", [("leaves", "sys.exit(3)"), ("vanishes", "os._exit(3)")])
def test_a_rank_that_just_leaves_takes_the_others_with_it(problem, name, misfortune):
    assert train_with(problem, misfortune, name).returncode != 0


def test_the_run_directory_tells_the_fault_of_a_rank_other_than_the_first(problem):
    place = problem[0]
    train_with(problem, "fail()", "told")
    found = exit_of(place / "told")
    assert (found["code"], found["step"]) == (70, 2)
    assert "the dog ate my gradients" in found["reason"]


def test_a_stop_signal_to_one_rank_alone_stops_all_with_a_checkpoint(problem):
    place, flags, environment = problem
    mark = f"TEST_MARK=stop-{os.getpid()}"
    command = ("-m", "mpitrain", *flags, "--out", "stopped", "--train.epochs", "20")
    process = start(2, *command, cwd=place, **environment, TEST_MARK=mark.partition("=")[2])
    limit = time.monotonic() + 90
    while not metrics_of(place / "stopped"):
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.05)
    ranks = sorted(pid for pid, argv in processes_of(mark).items() if argv[1:3] == ["-m", "mpitrain"])
    os.kill(ranks[1], signal.SIGTERM)
    done = finish(process, SECONDS)
    assert done.returncode == 75, done.stdout + done.stderr
    exit = exit_of(place / "stopped")
    assert (exit["code"], exit["reason"]) == (75, "stopped by SIGTERM")
    assert (place / "stopped" / "checkpoints" / f"step-{exit['step']:08d}" / "manifest.json").is_file()
