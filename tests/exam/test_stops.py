"""Cases 2, 5, 9, 10, 13, 16, 26 and 27: signals, time limits, numbers that are not finite, saves, starts in vain."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from examining import NUM_STEPS, RANKS, ROUNDS, SEED, Attempt, Exam, steps_of
from tiny import exit_of, metrics_of, ranks_of, tensors_of

from mpitrain.errors import ExitCode


def strike(attempt: Attempt, number: signal.Signals, rank: int | None) -> None:
    """Signal the launcher, or one rank alone."""
    os.kill(attempt.process.pid if rank is None else ranks_of(attempt.mark)[rank], number)


def assert_stopped(reference: Exam, out: str, name: str, done: Any, ranks: int = 2) -> int:
    """A checkpoint of the step at which all ranks stopped, and the end of the run as if nothing had been; the step."""
    run = reference.place / out
    assert done.returncode == ExitCode.STOPPED, done.stdout + done.stderr
    told = exit_of(run)
    assert (told["code"], told["reason"]) == (ExitCode.STOPPED, f"stopped by {name}")
    assert steps_of(run)[-1] == told["step"]
    reference.finish(ranks, out, told["step"])
    return int(told["step"])


# A nap at some place of one rank, and how to see that the rank is in it.
NAPS = {
    "forward": ("forward:1:5=sleep0.5", lambda run: len(metrics_of(run)) >= 1),
    "reduce": ("reduce:0:2=sleep0.5", lambda run: len(metrics_of(run)) >= 1),
    "save": (
        "save.slices:1:2=sleep0.5",
        lambda run: len(metrics_of(run)) >= 2 and list(run.glob("checkpoints/*.tmp*")),
    ),
    "evaluate": ("evaluate:0:1=sleep0.5", lambda run: len(metrics_of(run)) >= 3),
    "the last evaluation": ("evaluate:1:3=sleep0.5", lambda run: len(metrics_of(run)) >= NUM_STEPS),
    "save before the last step": ("save.slices:1:5=sleep0.5", lambda run: len(metrics_of(run)) >= NUM_STEPS - 1),
}
FULL = [("save.slices", 1), ("save.hash", 1), ("save.manifest", 0), ("save.rename", 0)]


@pytest.mark.case(9)
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("whom", [None, 0, 1])
@pytest.mark.parametrize("where", NAPS)
def test_a_signal_stops_all_ranks_at_one_step(reference: Exam, told, where, whom, ranks):
    out = f"signal-{where.replace(' ', '-')}-{whom}-{ranks}"
    whom = None if whom is None else min(whom, ranks - 1)
    number = signal.SIGUSR1 if whom is None else signal.SIGTERM
    nap, is_there = NAPS[where]
    nap = nap if ranks > 1 else nap.replace(":1:", ":0:")
    reference.reference(ranks)
    attempt = reference.begin(ranks, out, MPITRAIN_FAILPOINT=nap)
    attempt.wait_until(lambda: bool(is_there(attempt.run)))
    for _ in range(2):  # the second one changes nothing
        strike(attempt, number, whom)
        time.sleep(0.1)
    step = assert_stopped(reference, out, number.name, attempt.end(), ranks)
    who = "mpirun" if whom is None else f"rank {whom} of {ranks}"
    told(f"{number.name} twice to {who} during {where}", f"exit code 75 after step {step}, then to the end, bit-equal")


@pytest.mark.case(9)
@pytest.mark.parametrize("number", range(ROUNDS))
def test_a_signal_at_a_random_instant(reference: Exam, told, number):
    chance = random.Random(f"{SEED}-{number}")
    reference.reference(2)
    out = f"random-{number}"
    attempt = reference.begin(2, out)
    attempt.wait_until(attempt.run.is_dir)
    delay = chance.uniform(0, 1)
    time.sleep(delay)
    strike(attempt, signal.SIGUSR1, None)
    done = attempt.end()
    if done.returncode == 0:  # too late
        step = NUM_STEPS
        reference.finish(2, out, step)
    else:
        step = assert_stopped(reference, out, "SIGUSR1", done)
    told(f"SIGUSR1 to mpirun {delay:.2f} s after the run directory was there (SEED={SEED})", f"step {step}, bit-equal")


@pytest.mark.case(5)
@pytest.mark.parametrize("steps", [[1], [2], [3], [4], [5], [NUM_STEPS], [1, 2], [4, 5], [2, 3, 4]])
def test_a_run_that_stops_anywhere_goes_on_bit_for_bit(reference: Exam, told, steps):
    """The first three steps are an epoch, so 3 is the last of one and 4 the first of the next."""
    out = f"stop-{'-'.join(map(str, steps))}"
    for before, step in pairwise([0, *steps]):
        done = reference.run(2, out, MPITRAIN_FAILPOINT=f"reduce:1:{step - before}=ask")
        assert done.returncode == ExitCode.STOPPED, done.stdout + done.stderr
        assert exit_of(reference.place / out) == {"code": 75, "reason": "stopped by SIGUSR1", "step": step}
    reference.finish(2, out, steps[-1])
    told(
        f"stopped in step {', then '.join(map(str, steps))} of {NUM_STEPS}",
        "same data, losses, weights, moments, scores",
    )


LIMIT, SAVE = 14, 2  # seconds
TIMED = ("--train.epochs", "999", "--runtime.time_limit", str(LIMIT))


@pytest.mark.case(27)
@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_time_limit_leaves_time_for_a_save(reference: Exam, told, asynchronous):
    out = f"limit-{asynchronous}"
    reference.reference(2)
    naps = f"save.hash:1=sleep{SAVE},forward:0=sleep0.05"
    settings = (*TIMED, "--checkpoint.every", "15", "--checkpoint.async", asynchronous, "--checkpoint.best", "false")
    began = time.monotonic()
    done = reference.run(2, out, settings=settings, MPITRAIN_FAILPOINT=naps)
    took = time.monotonic() - began
    assert done.returncode == ExitCode.STOPPED, done.stdout + done.stderr
    found = exit_of(reference.place / out)
    assert found["reason"] == "stopped by the end of its time (--runtime.time_limit)"
    assert steps_of(reference.place / out)[-1] == found["step"] == len(metrics_of(reference.place / out))
    assert len(steps_of(reference.place / out)) == 2 and LIMIT / 2 < took < LIMIT
    told(
        f"{LIMIT} s of time, saves of {SAVE} s, async {asynchronous}",
        f"saved and stopped after {took:.1f} s, exit code 75",
    )


@pytest.mark.case(27)
def test_a_job_of_slurm_stops_before_its_end(reference: Exam, told):
    reference.reference(2)
    end = {"SLURM_JOB_ID": "17", "SLURM_JOB_END_TIME": str(int(time.time()) + LIMIT)}
    done = reference.run(2, "slurm-limit", settings=TIMED[:2], MPITRAIN_FAILPOINT="forward:0=sleep0.05", **end)
    assert done.returncode == ExitCode.STOPPED, done.stdout + done.stderr
    assert exit_of(reference.place / "slurm-limit")["reason"] == "stopped by the end of its time (Slurm)"
    assert time.time() < int(end["SLURM_JOB_END_TIME"])
    told(f"a job that Slurm ends after {LIMIT} s", "saved and stopped before, exit code 75")


@pytest.mark.case(2)
def test_killed_while_the_progress_of_a_checkpoint_is_written_anew(reference: Exam, told):
    """A signal at the end of an epoch leaves a checkpoint whose evaluation comes at the next start."""
    run = reference.place / "refreshed"
    attempt = reference.begin(2, "refreshed", MPITRAIN_FAILPOINT="save.slices:1:2=sleep0.5")
    attempt.wait_until(lambda: len(metrics_of(run)) >= 2)
    strike(attempt, signal.SIGUSR1, None)
    assert attempt.end().returncode == ExitCode.STOPPED and steps_of(run)[-1] == 3
    killed = reference.run(2, "refreshed", MPITRAIN_FAILPOINT="save.refresh:0:1=kill")
    assert killed.returncode != 0 and "failpoint save.refresh on rank 0" in killed.stderr, killed.stderr
    reference.finish(2, "refreshed", 3)
    told("kill at save.refresh, rank 0, visit 1", "went on from step 3, bit-equal")


@pytest.mark.case(10)
@pytest.mark.parametrize("rank", [0, 1])
def test_one_gradient_that_is_not_finite_skips_a_step_on_all_ranks(reference: Exam, told, rank):
    out = f"nan-{rank}"
    done = reference.run(2, out, MPITRAIN_FAILPOINT=f"gradient:{rank}:1=nan")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 1: loss or gradient is not finite; all ranks skip this update" in done.stdout
    run = reference.place / out
    assert [line["grad_norm"] is None for line in metrics_of(run)] == [step == 1 for step in range(1, NUM_STEPS + 1)]
    checkpoint = run / "checkpoints" / f"step-{NUM_STEPS:08d}"
    assert json.loads((checkpoint / "manifest.json").read_text())["progress"]["num_updates"] == NUM_STEPS - 1
    assert all(np.isfinite(values).all() for values in tensors_of(checkpoint).values())
    told(f"NaN in a gradient of rank {rank} at step 1", "that update skipped by all, no NaN in the checkpoint")


@pytest.mark.case(10)
def test_gradients_that_are_never_finite_end_the_run(reference: Exam, told):
    done = reference.run(2, "nan-always", MPITRAIN_FAILPOINT="gradient:1=nan", MPITRAIN_TRAIN__MAX_SKIPPED_STEPS="3")
    assert done.returncode == 70
    assert "3 steps in a row had a loss or gradient that is not finite" in done.stderr
    told("NaN in every gradient of rank 1", "exit code 70 after 3 skipped steps")


# The limit comes once MPI has its own files.
LIMITED = """
import resource, sys
from mpitrain import cli
from mpitrain.checkpoint.saver import Saver

save = Saver.save
def save_within_limits(*arguments, **options):
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
    return save(*arguments, **options)

Saver.save = save_within_limits
cli.main(sys.argv[1:])
"""


@pytest.mark.case(16)
def test_a_limit_of_the_system_on_files(reference: Exam, told):
    script = reference.place / "limited.py"
    script.write_text(LIMITED)
    done = reference.run(2, "limited", str(script))
    assert done.returncode == 70, done.stdout + done.stderr
    assert "cannot be written: " in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not any((reference.place / "limited" / "checkpoints").iterdir())
    assert exit_of(reference.place / "limited")["code"] == 70
    told("files of at most 64 KiB", "exit code 70, said so, nothing left over")


@pytest.mark.case(16)
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("place, rank", FULL)
def test_a_full_disk_leaves_the_checkpoints_before(reference: Exam, told, place, rank, ranks):
    rank = min(rank, ranks - 1)
    out = f"full-{place}-{ranks}"
    done = reference.run(ranks, out, MPITRAIN_FAILPOINT=f"{place}:{rank}:3=full")
    assert done.returncode == 70
    assert "cannot be written: No space left on device; the checkpoints before it are" in done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    left = sorted(place.name for place in (reference.place / out / "checkpoints").iterdir())
    assert left == ["step-00000001", "step-00000002"]
    reference.finish(ranks, out, 2)
    told(f"no space left at {place}, rank {rank} of {ranks}", "exit code 70, said so, went on from step 2, bit-equal")


@pytest.mark.case(26)
def test_starts_without_progress_come_to_an_end(reference: Exam, told):
    at_once = {"MPITRAIN_CHECKPOINT__ASYNC": "false"}  # each start gets as far as the others
    faults = {"MPITRAIN_FAILPOINT": "update:0:2=raise"} | at_once
    codes = [reference.run(2, "in-vain", **faults).returncode for _ in range(2)]
    assert codes == [70, 70] and steps_of(reference.place / "in-vain") == [1, 2]
    for _ in range(5):
        done = reference.run(2, "in-vain", MPITRAIN_FAILPOINT="update:0:1=raise", **at_once)
        codes.append(done.returncode)
    assert codes == [70, 70, 70, 70, 70, 93, 93]
    assert "3 starts in a row have not come to a checkpoint after step 2: do not requeue" in done.stderr, done.stderr
    assert exit_of(reference.place / "in-vain")["code"] == 93
    (reference.place / "in-vain" / "starts.json").unlink()
    reference.finish(2, "in-vain", 2)
    told("a fault at the same step at every start", "exit codes 70, 70, 70, then 93; with progress counted anew")


LATE = ("--checkpoint.every", "3", "--checkpoint.best", "false")


@pytest.mark.case(13)
@pytest.mark.parametrize("place, waits", [("save.slices", False), ("save.copy", True)])
def test_a_save_holds_what_was_there_when_it_began(reference: Exam, told, place, waits):
    out = f"late-{place}"
    at_once = reference.run(2, f"at-once-{place}", settings=(*LATE, "--checkpoint.async", "false"))
    late = reference.run(2, out, MPITRAIN_FAILPOINT=f"{place}:1:1=sleep2", settings=LATE)
    assert at_once.returncode == late.returncode == 0, late.stderr
    runs = [reference.place / name / "checkpoints" for name in (f"at-once-{place}", out)]
    for step in (3, NUM_STEPS):
        mine, theirs = (tensors_of(run / f"step-{step:08d}") for run in runs)
        assert mine.keys() == theirs.keys()
        assert all(np.array_equal(mine[name], theirs[name]) for name in mine)
    seconds = [line["seconds"] for line in metrics_of(reference.place / out)]
    assert (max(seconds[:5]) > 1) == waits, "an update waits for the copy, and nothing for the files"
    told(f"2 s of sleep at {place} beside three steps", "the bits of a save that is waited for, at both steps")


@pytest.mark.case(13)
def test_killed_during_a_save_while_steps_went_on(reference: Exam, told):
    faults = "save.slices:1:1=sleep9,backward:0:9=kill"
    done = reference.run(2, "killed-late", MPITRAIN_FAILPOINT=faults, settings=LATE)
    assert done.returncode != 0 and "failpoint backward on rank 0" in done.stderr
    run = reference.place / "killed-late"
    assert len(metrics_of(run)) >= 4 and steps_of(run) == [] and list(run.glob("checkpoints/*.tmp-*"))
    reference.finish(2, "killed-late", 0)
    told("SIGKILL at step 5 while step 3 was being saved", "no half checkpoint, began anew, bit-equal")


@pytest.mark.case(13)
@pytest.mark.parametrize("visit", [1, 3, NUM_STEPS])
def test_a_slow_save_is_waited_for_by_the_next_one_and_by_the_end(reference: Exam, told, visit):
    out = f"slow-{visit}"
    done = reference.run(2, out, MPITRAIN_FAILPOINT=f"save.hash:0:{visit}=sleep2,save.manifest:0:{visit}=sleep1")
    assert done.returncode == 0, done.stderr
    reference.finish(2, out, NUM_STEPS)
    told(f"3 s of sleep in save {visit} of {NUM_STEPS}", "all saves complete, bit-equal")


@pytest.mark.case(13)
def test_a_failure_of_a_save_is_everybodys_at_one_step(reference: Exam, told):
    done = reference.run(2, "late-full", MPITRAIN_FAILPOINT="save.hash:1:1=full", settings=LATE)
    assert done.returncode == 70 and "Traceback" not in done.stderr, done.stderr
    assert "step-00000003" in done.stderr, done.stderr
    told_step = exit_of(reference.place / "late-full")["step"]
    assert 3 <= told_step <= NUM_STEPS and len(metrics_of(reference.place / "late-full")) == told_step
    reference.finish(2, "late-full", 0)
    told("no space left in a save that goes on beside steps", f"exit code 70 after step {told_step} on all ranks")
