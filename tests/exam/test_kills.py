"""Cases 1 to 3: a rank or the launcher dies, or one rank alone fails, at whatever instant."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest
from examining import RANKS, ROUNDS, SEED, Exam, steps_of
from tiny import exit_of, ranks_of

from mpitrain.runtime.failpoints import PLACES

# Where a save is struck, on which rank, and at which visit: its first, or the first that deletes something.
STRIKES = [("save.begin", 0, 2), ("save.begin", 1, 2), ("save.slices", 0, 1), ("save.slices", 1, 2)]
STRIKES += [("save.copy", 0, 1), ("save.copy", 1, 3)]
STRIKES += [("save.hash", 0, 2), ("save.hash", 1, 3), ("save.manifest", 0, 2), ("save.rename", 0, 2)]
STRIKES += [("save.committed", 0, 1), ("save.retain", 0, 4), ("save.discard", 0, 1)]
OF_RANK_0 = ("save.manifest", "save.rename", "save.committed", "save.retain", "save.discard")
FAILURES = [(place, "raise") for place in PLACES if place != "save.refresh"]
FAILURES += [(place, action) for place in ("data", "reduce") for action in ("leave", "vanish")]


def test_every_place_of_a_save_is_struck():
    assert {place for place, *_ in STRIKES} | {"save.refresh"} == {name for name in PLACES if name.startswith("save.")}


@pytest.mark.case(1)
@pytest.mark.parametrize("number", range(ROUNDS))
def test_killed_at_a_random_instant(reference: Exam, told, number):
    chance = random.Random(f"{SEED}-{number}")
    ranks = chance.choice([2, 3, 4])
    reference.reference(ranks)
    victim = chance.randrange(-1, ranks)
    delay = chance.uniform(0, 1) * reference.seconds[ranks]
    attempt = reference.begin(ranks, f"killed-{number}")
    attempt.wait_until(lambda: len(ranks_of(attempt.mark)) == ranks)
    pids = [*ranks_of(attempt.mark), attempt.process.pid]
    time.sleep(delay)
    late = attempt.process.poll() is not None
    try:
        os.kill(pids[victim], signal.SIGKILL)
    except ProcessLookupError:  # that rank was done, though the launcher was not
        late = True
    attempt.end()
    steps = steps_of(attempt.run)
    reference.finish(ranks, f"killed-{number}", max(steps, default=0))
    who = "mpirun" if victim < 0 else f"rank {victim}"
    found = "came too late" if late else f"went on from {steps}, bit-equal"
    told(f"SIGKILL of {who} of {ranks} after {delay:.2f} s (SEED={SEED})", found)


@pytest.mark.case(2)
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("place, rank, visit", STRIKES)
def test_killed_at_each_stage_of_a_save(reference: Exam, told, place, rank, visit, ranks):
    out, rank = f"{place}-{rank}-{visit}-{ranks}", min(rank, ranks - 1)
    done = reference.run(ranks, out, MPITRAIN_FAILPOINT=f"{place}:{rank}:{visit}=kill")
    assert f"failpoint {place} on rank {rank}, visit {visit}: kill" in done.stderr, done.stderr
    assert done.returncode != 0
    steps = steps_of(reference.place / out)
    reference.finish(ranks, out, max(steps, default=0))
    told(f"kill at {place}, rank {rank} of {ranks}, visit {visit}", f"went on from {steps}, bit-equal")


@pytest.mark.case(3)
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("place, action", FAILURES)
def test_one_rank_alone_fails(reference: Exam, told, place, action, ranks):
    out, rank = f"{place}-{action}-{ranks}", 0 if place in OF_RANK_0 else ranks - 1
    began = time.monotonic()
    done = reference.run(ranks, out, MPITRAIN_FAILPOINT=f"{place}:{rank}:1={action}")
    assert f"failpoint {place} on rank {rank}, visit 1: {action}" in done.stderr, done.stderr
    assert done.returncode != 0
    if action == "raise":
        assert done.returncode == 70
        assert f"rank {rank}" in done.stderr and "a fail-point struck" in done.stderr, done.stderr
        if place != "start":  # before that, nobody knows the run directory
            assert exit_of(reference.place / out)["code"] == 70
    told(
        f"{action} at {place} on rank {rank} of {ranks}",
        f"exit code {done.returncode} after {time.monotonic() - began:.1f} s",
    )
