"""Known bugs of trainers, put into the program on purpose: each must be caught by the exam or by a test that it names.

A bug is a piece of text in a copy of the package, which the tests then import. Most are what users of other systems
complain about: a mean of means, a norm that counts a weight twice, a resume that is off by one, a stale snapshot.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from launching import BIN, clean_environment

import mpitrain

PACKAGE, TESTS = Path(mpitrain.__file__).parent, Path(__file__).parents[1]
SECONDS = 300


@dataclass(frozen=True)
class Mutant:
    """A bug: in `file` the text `right` becomes `wrong`; `tests` catch it, on `ranks` (0: they start their own)."""

    name: str
    file: str
    right: str
    wrong: str
    tests: str
    ranks: int = 0


MUTANTS = [
    Mutant(
        "mean of means",
        "model/bert.py",
        'reduction="sum") / max(num_labelled, 1)',
        'reduction="mean") / 8',
        "test_parity.py -k micro_batches_do_not_change",
        2,
    ),
    Mutant(
        "a shared weight counted twice in the norm",
        "optim.py",
        "if first or not bucket.shared",
        "",
        "test_parity.py -k ranks_that_share_layers_give_the_numbers",
        2,
    ),
    Mutant(
        "a resume that is off by one",
        "train.py",
        "range(run.progress.step, 0 if",
        "range(run.progress.step + 1, 0 if",
        "exam/test_stops.py -k goes_on_bit_for_bit",
    ),
    Mutant(
        "a stale snapshot",
        "checkpoint/saver.py",
        "            self._copied.wait()\n",
        "",
        "exam/test_stops.py -k holds_what_was_there",
    ),
    Mutant(
        "a stop that is not voted on",
        "step.py",
        "grad_norm, stops > 0, unready == 0",
        "grad_norm, stop, unready == 0",
        "exam/test_stops.py -k at_one_step",
    ),
    Mutant(
        "a step that is not skipped",
        "step.py",
        "updated = math.isfinite(grad_norm) and math.isfinite(loss)",
        "updated = True",
        "exam/test_stops.py -k not_finite",
    ),
    Mutant(
        "dropout that hangs on the mesh",
        "step.py",
        "KeyedDropout(self.options.seed, plan.step, number)",
        "KeyedDropout(self.options.seed, plan.step, number - share.start)",
        "test_parity.py -k any_mesh_gives",
        2,
    ),
    Mutant(
        "a sum that forgets a rank",
        "comm/node.py",
        "            for other in others:\n",
        "            for other in others[:-1]:\n",
        "test_parity.py -k any_mesh_gives",
        2,
    ),
    Mutant(
        "a checkpoint that is not verified",
        "checkpoint/load.py",
        "    if actual != told:\n",
        "    if False:\n",
        "exam/test_damage.py -k passed_over_loudly",
    ),
    Mutant(
        "old checkpoints that go before the new one is there",
        "checkpoint/saver.py",
        "            commit(aside, final, manifest)\n            retain(self._checkpoints, *kept)\n",
        "            retain(self._checkpoints, *kept)\n            commit(aside, final, manifest)\n",
        "exam/test_damage.py -k one_checkpoint_that_is_kept",
    ),
    Mutant(
        "moments that are not resumed",
        "resume.py",
        "fill(run.world, place, manifest, run.stepper.optimizer.slices())",
        'fill(run.world, place, manifest, [p for p in run.stepper.optimizer.slices() if p.kind == "weight"])',
        "exam/test_stops.py -k goes_on_bit_for_bit",
    ),
    Mutant(
        "an evaluation that drops what does not divide",
        "evaluate.py",
        "    mine = plan[mesh.replica :: mesh.num_replicas]\n",
        "    mine = plan[: len(plan) // mesh.num_replicas * mesh.num_replicas][mesh.replica :: mesh.num_replicas]\n",
        "test_evaluate.py",
        2,
    ),
    Mutant(
        "an epoch without its last batch",
        "dataset/batches.py",
        "self.steps_per_epoch = -(-len(lengths) // batch_size)",
        "self.steps_per_epoch = max(1, len(lengths) // batch_size)",
        "dataset/test_batches.py",
    ),
    Mutant(
        "a hash that is followed through a link",
        "checkpoint/load.py",
        "if path.is_symlink() or not path.is_file():",
        "if not path.is_file():",
        "exam/test_traps.py -k plain_file",
    ),
    Mutant(
        "a failure that only its own rank knows",
        "checkpoint/saver.py",
        '                with together(comm, f"writing {aside}"), can_be_written(aside, AS_BEFORE):\n'
        "                    entries = work.result()\n",
        "                with can_be_written(aside, AS_BEFORE):\n                    entries = work.result()\n",
        "exam/test_stops.py -k full_disk",
    ),
    Mutant(
        "a token # that is taken for a comment",
        "dataset/conll.py",
        " and len(_columns(line, separator)) != num_columns:",
        ":",
        "dataset/test_conll.py",
    ),
]


@pytest.mark.whole
@pytest.mark.case("bug")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "-"))
def test_a_known_bug_is_caught(tmp_path, told, mutant):
    shutil.copytree(PACKAGE, tmp_path / "mpitrain", ignore=shutil.ignore_patterns("__pycache__", "_shelves"))
    for shelf in ("data", "models", "jobs"):
        (tmp_path / shelf).symlink_to(PACKAGE.parent / shelf)
    file = tmp_path / "mpitrain" / mutant.file
    text = file.read_text()
    assert text.count(mutant.right) == 1, "the program has changed: this bug needs another place"
    file.write_text(text.replace(mutant.right, mutant.wrong))
    files, *chosen = mutant.tests.split(" -k ")
    words = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", str(TESTS / files)]
    words += [word for text in chosen for word in ("-k", text)]
    if mutant.ranks:
        words = [str(BIN / "mpirun"), "-np", str(mutant.ranks), *words, "--only-mpi"]
    environment = clean_environment(PYTHONPATH=str(tmp_path), ROUNDS=os.environ.get("ROUNDS", "1"))
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=SECONDS)
    output = done.stdout + done.stderr
    caught = re.search(r"FAILED (?:\S*/)?(test_\w+\.py\S*)", output)
    assert done.returncode == 1 and caught, output[-3000:]
    told(mutant.name, f"caught by {caught[1][:90]}")
