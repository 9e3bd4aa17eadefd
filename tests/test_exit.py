"""No rank waits for ever: whatever happens to one rank ends the job on all ranks soon, and names the first cause."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launching import begin, command, finish, mpirun, start
from tiny import exit_of, make_tiny, metrics_of, processes_of, ranks_of

from mpitrain.runtime.launch import library_version

SECONDS = 30
# Runs `train` with step 3 of rank 1 replaced by what the test puts in.
SCRIPT = """
import os, sys, threading
from mpitrain import cli
from mpitrain.comm.node import NodeExchange
from mpitrain.runtime.agree import MPI
from mpitrain.step import Stepper

def misfortune(self):
    {misfortune}

def fail(*arguments):
    raise RuntimeError("the dog ate my gradients")

run = Stepper.run
def run_or_fail(self, plan, micro_batches, **told):
    if MPI.COMM_WORLD.rank == 1 and plan.step == 2:
        misfortune(self)
    return run(self, plan, micro_batches, **told)

Stepper.run = run_or_fail
cli.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def problem(tmp_path_factory) -> tuple[Path, list[str], dict[str, str]]:
    """A folder, the flags of a tiny training in it, and its environment."""
    place = tmp_path_factory.mktemp("exit")
    return place, make_tiny(place), {"MPITRAIN_CACHE": str(place / "cache")}


def train_with(problem: tuple[Path, list[str], dict[str, str]], misfortune: str, out: str, *launcher: str) -> Any:
    """What became of three ranks, all of which must be gone; `launcher` are more flags for it."""
    place, flags, environment = problem
    (place / f"{out}.py").write_text(SCRIPT.format(misfortune=misfortune))
    mark = {"TEST_MARK": f"exit-{out}-{os.getpid()}"}
    mpirun, *line = command(3, f"{out}.py", *flags, "--out", out, "--mesh.data", "3")
    done = finish(begin([mpirun, *launcher, *line], place, **environment, **mark), 90)
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
        ("reducer", "NodeExchange.reduce = fail"),
    ],
)
def test_an_uncaught_exception_on_one_rank_ends_all_with_its_traceback(problem, name, misfortune):
    done = train_with(problem, misfortune, name)
    assert done.returncode == 70, done.stdout + done.stderr
    assert "[rank 1] Traceback (most recent call last):\n" in done.stderr
    assert "[rank 1] RuntimeError: the dog ate my gradients\n" in done.stderr
    assert "[rank 0]" not in done.stderr and "[rank 2]" not in done.stderr
    if name != "thread":  # only the main thread knows the run directory
        found = exit_of(problem[0] / name)
        assert (found["code"], found["step"]) == (70, 2)
        assert "the dog ate my gradients" in found["reason"]


@pytest.mark.parametrize("name, misfortune", [("leaves", "sys.exit(3)"), ("vanishes", "os._exit(3)")])
def test_a_rank_that_just_leaves_takes_the_others_with_it(problem, name, misfortune):
    assert train_with(problem, misfortune, name).returncode != 0


def test_a_death_that_the_launcher_overlooks_ends_the_job_all_the_same(problem):
    blind = "-disable-auto-cleanup" if "MPICH" in library_version() else "--enable-recovery"
    done = train_with(problem, "os._exit(3)", "overlooked", blind)
    assert done.returncode != 0
    assert re.search(r"^error \(rank 0\): rank 1 \(process \d+ of this node\) is gone", done.stderr, re.M), done.stderr


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler of its own for a signal."""
    caught = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    limit = time.monotonic() + 90
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit
        time.sleep(0.02)


def test_a_stop_signal_to_one_rank_alone_stops_all_with_a_checkpoint(problem):
    place, flags, environment = problem
    mark = f"stop-{os.getpid()}"
    words = ("-m", "mpitrain", *flags, "--out", "stopped", "--train.epochs", "20")
    process = start(2, *words, cwd=place, **environment, TEST_MARK=mark)
    wait_for(lambda: bool(metrics_of(place / "stopped")), process)
    os.kill(ranks_of(f"TEST_MARK={mark}")[1], signal.SIGTERM)
    done = finish(process, SECONDS)
    assert done.returncode == 75, done.stdout + done.stderr
    exit = exit_of(place / "stopped")
    assert (exit["code"], exit["reason"]) == (75, "stopped by SIGTERM")
    assert (place / "stopped" / "checkpoints" / f"step-{exit['step']:08d}" / "manifest.json").is_file()


def test_a_stop_signal_while_libraries_load_stops_after_the_first_step_and_the_next_start_goes_on(problem):
    place, flags, environment = problem
    mark = f"early-{os.getpid()}"
    words = ("-m", "mpitrain", *flags, "--out", "early", "--train.max_steps", "1")
    process = start(2, *words, cwd=place, **environment, TEST_MARK=mark)

    def all_listen() -> bool:
        ranks = ranks_of(f"TEST_MARK={mark}")
        return len(ranks) == 2 and all(catches(rank, signal.SIGUSR1) for rank in ranks)

    wait_for(all_listen, process)
    assert not (place / "early").exists()
    os.kill(process.pid, signal.SIGUSR1)
    done = finish(process, 60)
    assert done.returncode == 75, done.stdout + done.stderr
    assert exit_of(place / "early") == {"code": 75, "reason": "stopped by SIGUSR1", "step": 1}
    assert not (place / "early" / "eval.json").exists()
    again = mpirun(2, *words, cwd=place, **environment)
    assert again.returncode == 0, again.stdout + again.stderr
    assert len(metrics_of(place / "early")) == 1
    assert "dev      epoch" in again.stdout, "the last step was done, its evaluation was not"
