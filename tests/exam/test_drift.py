"""Case 15: a bit flips in a rank's memory; and none does."""

from __future__ import annotations

import os
import re

import pytest
from examining import NUM_STEPS, Exam, steps_of
from tiny import exit_of, metrics_of

RING = ("--comm.algorithm", "ring")
FLIPS = [("weight:1:2", RING), ("weight:0:2", ()), ("moment:1:2", RING), ("moment:0:3", ())]


@pytest.mark.case(15)
@pytest.mark.parametrize("place, settings", FLIPS)
def test_a_flipped_bit_is_found_before_the_next_update(reference: Exam, told, place, settings):
    out = f"drift-{place}".replace(":", "-")
    faults = {"MPITRAIN_FAILPOINT": f"{place}=flip"}
    done = reference.run(2, out, settings=(*settings, "--runtime.check_every", "1"), **faults)
    kind, rank, visit = place.split(":")
    assert done.returncode == 70 and "Traceback" not in done.stderr, done.stderr
    name = "weight bert" if kind == "weight" else "exp_avg "
    assert re.search(rf"^  rank {rank}: {name}.* has changed since the update of step {visit}$", done.stderr, re.M)
    run = reference.place / out
    assert exit_of(run)["code"] == 70 and len(metrics_of(run)) == int(visit)
    assert max(steps_of(run)) == int(visit) - 1, "what has changed is in no checkpoint"
    if not settings:
        reference.finish(2, out, int(visit) - 1)
    told(f"a bit flipped at {place} {' '.join(settings)}", "named with its rank before the next update, exit code 70")


@pytest.mark.case(15)
def test_a_sum_that_is_not_the_same_on_all_replicas_names_parameter_and_ranks(reference: Exam, told):
    """Of three replicas two agree."""
    script = reference.place / "lossy.py"
    script.write_text(LOSSY)
    done = reference.run(3, "lossy", str(script), settings=(*RING, "--mesh.data", "3", "--runtime.check_every", "2"))
    assert done.returncode == 70, done.stdout + done.stderr
    found = re.findall(r"after step 2 (\S+) differs: on ranks 1 from ranks 0, 2", done.stderr)
    assert len(found) == 1 and found[0].startswith(("bert.", "classifier.")), done.stderr
    told("one weight is lost on its way to rank 1 of 3 in step 2", f"exit code 70, {found[0]}, rank 1")


LOSSY = """
import sys
from mpitrain import cli
from mpitrain.runtime.agree import MPI
from mpitrain.step import Stepper

update = Stepper._update
def update_and_lose(self, *arguments):
    found = update(self, *arguments)
    if MPI.COMM_WORLD.rank == 1 and self.num_updates == 1:
        next(self.executor.stage.parameters()).data.view(-1)[7] += 1e-3
    return found

Stepper._update = update_and_lose
cli.main(sys.argv[1:])
"""


@pytest.mark.case(15)
def test_a_thousand_clean_steps_give_no_alarm(reference: Exam, told):
    num_steps = 1000 if "ROUNDS" in os.environ else 200
    flags = ("--train.epochs", "999", "--train.max_steps", str(num_steps), "--checkpoint.every", "999")
    flags += ("--train.batch_size", "4", "--checkpoint.best", "false", "--runtime.check_every", "1")
    done = reference.run(3, "clean", settings=(*flags, *RING))
    assert done.returncode == 0, done.stderr
    assert len(metrics_of(reference.place / "clean")) == num_steps > NUM_STEPS
    told(f"nothing, in {num_steps:,} steps of 3 ranks that are all checked", "no alarm")
