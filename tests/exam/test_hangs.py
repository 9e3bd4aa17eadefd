"""Case 14: a rank makes no more progress; and one that only takes long is left alone."""

from __future__ import annotations

import os
import re
import signal
import time

import pytest
from examining import Exam
from tiny import exit_of, metrics_of, ranks_of

TIMEOUT = 3
FLAGS = ("--runtime.hang_timeout", str(TIMEOUT))
AT_ONCE = ("--checkpoint.async", "false")  # so that a save is a phase of its own
RING = ("--comm.algorithm", "ring")  # so that nothing that is given back needs the other rank
SLACK = 10  # seconds within which all must be over after the time-out
# Where a rank gets stuck, how, and as what its phase is told.
HANGS = [
    ("forward:1:5", "stop", "step 3, forward of micro-batch"),
    ("reduce:0:2", "stop", "step 2, sum of gradients over replicas"),
    ("save.slices:1:2", "stop", "step 2, writing"),
    ("evaluate:1:1", "stop", "step 3"),
    ("end:1:1", "stop", "step 6"),
    ("start:1", "stop", "loading libraries"),
    ("backward:1:6", "hold1000", "step 3, backward of micro-batch"),
    ("update:0:3", "sleep1000", "step 3, update of weights"),
    ("save.manifest:0:1", "hold1000", "step 1, committing"),
]


@pytest.mark.case(14)
@pytest.mark.parametrize("place, action, phase", HANGS)
def test_a_rank_that_hangs_is_named(reference: Exam, told, place, action, phase):
    out, rank = f"hang-{place}".replace(":", "-"), place.split(":")[1]
    settings = (*FLAGS, *AT_ONCE, *(RING if place.startswith("end") else ()))
    attempt = reference.begin(2, out, settings=settings, MPITRAIN_FAILPOINT=f"{place}={action}")
    done = attempt.end(60)
    assert done.returncode == 70, done.stderr
    assert re.search(rf"no rank has made progress for {TIMEOUT} s .* [12] of 2 ranks on ", done.stderr), done.stderr
    assert re.search(rf"^  rank {rank}: {phase}", done.stderr, re.M), done.stderr
    assert re.search(rf"^stacks of ranks? (0, )?{rank}", done.stderr, re.M), done.stderr
    # Who was stopped has gone on for a moment, and what holds Python's lock is in no line of Python.
    assert action == "stop" or "in reach" in done.stderr, done.stderr
    assert ("stopped by a signal" in done.stderr) == (action == "stop")
    if not place.startswith("start"):
        assert exit_of(attempt.run)["code"] == 70
    told(f"{action} at {place}", "named with phase and stacks, exit code 70")


@pytest.mark.case(14)
@pytest.mark.parametrize("rank", range(4))
def test_a_rank_stopped_from_outside_ends_the_job_in_time(reference: Exam, told, rank):
    attempt = reference.begin(4, f"stopped-{rank}", settings=(*FLAGS, "--mesh.pipe", "2", "--train.epochs", "99"))
    attempt.wait_until(lambda: len(metrics_of(attempt.run)) >= 2)
    os.kill(ranks_of(attempt.mark)[rank], signal.SIGSTOP)
    began = time.monotonic()
    done = attempt.end(TIMEOUT + SLACK)
    took = time.monotonic() - began
    assert done.returncode == 70, done.stderr
    assert re.search(rf"^  rank {rank}: step .*stopped by a signal", done.stderr, re.M), done.stderr
    told(f"SIGSTOP of rank {rank} of 4, 2 of them stages", f"exit code 70 after {took:.1f} s, time-out {TIMEOUT} s")


@pytest.mark.case(14)
@pytest.mark.parametrize("place", ["start:1", "forward:0:1", "save.slices:1:1", "save.manifest:0:2"])
def test_who_works_long_is_left_alone(reference: Exam, told, place):
    out = f"long-{place}".replace(":", "-")
    done = reference.run(2, out, settings=FLAGS, MPITRAIN_FAILPOINT=f"{place}=work{2 * TIMEOUT + 1}")
    assert done.returncode == 0, done.stderr
    told(f"{2 * TIMEOUT + 1} s of work at {place}", f"exit code 0 with a time-out of {TIMEOUT} s")


LATE = """
import sys, time
from mpitrain import cli
from mpitrain.runtime import launch
launch.SECONDS_TO_START = 5
if launch.announced(launch.RANK_VARIABLES) == 1:
    time.sleep(1000)
cli.main(sys.argv[1:])
"""


@pytest.mark.case(14)
def test_a_rank_that_never_comes_to_the_start_ends_the_job(reference: Exam, told):
    script = reference.place / "late.py"
    script.write_text(LATE)
    done = reference.begin(2, "never", str(script)).end()
    assert done.returncode != 0 and "in _initialise" in done.stderr, done.stderr
    told("a rank asleep before MPI starts", f"its stack, exit code {done.returncode}")
