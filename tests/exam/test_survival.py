"""Case 42: where MPI can lose ranks, those that are left go on as a smaller job; where it cannot, that is refused."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
from examining import NUM_STEPS, ROUNDS, SEED, Attempt, Exam
from launching import command
from tiny import exit_of, metrics_of, ranks_of

SETTINGS = ["--runtime.on_failure", "shrink", "--runtime.check_every", "1"]
SECONDS = 1.5  # from the making of the run directory to the end
# Ranks, of which how many pipe and tensor; who dies where; and how many go on then.
DEATHS = [
    (2, 1, 1, "reduce:1:4=kill", 1),
    (3, 1, 1, "forward:0:4=kill", 2),
    (3, 1, 1, "save.slices:0:3=kill,data:2:6=kill", 1),
    (4, 1, 1, "evaluate:0:1=kill", 3),
    (4, 2, 1, "backward:3:4=kill", 2),
    (4, 1, 2, "update:0:5=kill", 2),
]


def begin(reference: Exam, ranks: int, out: str, *settings: str, **environment: str) -> Attempt:
    launcher, *program = command(ranks, *reference.words(out, settings=[*SETTINGS, *settings]))
    return reference.begin_line(out, [launcher, "--with-ft", "ulfm", *program], **environment)


def assert_done(run: Path, usual: Path) -> None:
    """All steps with the same data, and nearly the same sums: fewer replicas add in another order."""
    assert exit_of(run) == {"code": 0, "reason": "done", "step": NUM_STEPS}
    for mine, theirs in zip(metrics_of(run), metrics_of(usual), strict=True):
        assert [mine[key] for key in ("step", "tokens")] == [theirs[key] for key in ("step", "tokens")]
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


@pytest.mark.case(42)
def test_refused_where_mpi_was_not_told_to(reference: Exam, told):
    done = reference.run(2, "refused", settings=SETTINGS)
    assert done.returncode == 64 and "mpirun --with-ft ulfm" in done.stderr, done.stderr
    told("--runtime.on_failure shrink without ULFM", "refused with exit code 64")


@pytest.mark.ulfm
@pytest.mark.case(42)
@pytest.mark.parametrize("ranks, pipe, tensor, failpoint, left", DEATHS)
def test_ranks_that_are_left_go_on(reference: Exam, told, ranks, pipe, tensor, failpoint, left):
    mesh = ["--mesh.pipe", str(pipe), "--mesh.tensor", str(tensor)]
    out = f"shrunk-{failpoint.partition('=')[0]}"
    done = begin(reference, ranks, out, *mesh, MPITRAIN_FAILPOINT=failpoint).end()
    for struck in failpoint.split(","):
        assert f"failpoint {struck.split(':')[0]} on rank {struck.split(':')[1]}" in done.stderr, done.stderr
    assert f"{left} go on from the last checkpoint" in done.stdout
    assert_done(reference.place / out, reference.reference(ranks))
    told(f"{failpoint} of {ranks} (pipe {pipe}, tensor {tensor})", f"{left} ranks went on, exit code {done.returncode}")


@pytest.mark.ulfm
@pytest.mark.case(42)
def test_less_than_a_replica_is_left(reference: Exam, told):
    done = begin(reference, 2, "none-left", "--mesh.pipe", "2", MPITRAIN_FAILPOINT="reduce:0:4=kill").end()
    assert done.returncode not in (0, 75)
    exit_json = exit_of(reference.place / "none-left")
    assert exit_json["code"] == 70 and "1 left are less than a replica of 2 needs" in exit_json["reason"]
    told("rank 0 of a pipeline of 2 killed", f"exit code {done.returncode}, no replica is left")


@pytest.mark.ulfm
@pytest.mark.case(42)
@pytest.mark.parametrize("number", range(ROUNDS))
def test_killed_at_a_random_instant(reference: Exam, told, number):
    chance = random.Random(f"{SEED}-{number}")
    ranks = chance.choice([2, 3, 4])
    reference.reference(ranks)
    victim, delay = chance.randrange(ranks), chance.uniform(0, SECONDS)
    attempt = begin(reference, ranks, f"lost-{number}")
    attempt.wait_until((attempt.run / "config.json").exists)  # before, Open MPI's launcher may wait for the dead
    time.sleep(delay)
    for pid in ranks_of(attempt.mark)[victim : victim + 1]:
        os.kill(pid, signal.SIGKILL)
    done = attempt.end()
    if found := "go on from the last checkpoint" in done.stdout:
        assert exit_of(attempt.run)["code"] == 0
    elif done.returncode:  # at the start, or when all was over
        assert reference.run(ranks, f"lost-{number}").returncode == 0
    assert_done(attempt.run, reference.reference(ranks))
    how = "the others went on" if found else "came too late" if not done.returncode else "started again"
    told(f"SIGKILL of rank {victim} of {ranks} after {delay:.2f} s (SEED={SEED})", how)
