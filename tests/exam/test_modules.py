"""Cases that tests of modules hold: they are run as they are, on several ranks where it matters.

All of them are part of `make test` too; here they have their place in the table, and the exam its numbers.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from launching import mpirun

TESTS = Path(__file__).parents[1]
# Case, what it is about, the tests, and on how many ranks: 0 is without MPI's launcher.
CASES = [
    (4, "the same numbers on any mesh", "test_parity.py", (2, 3, 4)),
    (11, "exact evaluation", "test_evaluate.py", (1, 2, 3, 4)),
    (12, "checkpoints on another mesh", "checkpoint/test_checkpoint.py", (1, 2, 3, 4)),
    (12, "commands that go on with a run on another mesh", "test_cli_train.py -k resumed_on_another_mesh", (0,)),
    (20, "the order of the data", "dataset/test_batches.py", (0,)),
    (20, "every sequence of every shard, by a thread that reads ahead", "dataset/test_loader.py", (0, 1, 2, 3)),
    (21, "shards that cannot be right", "dataset/test_shards.py", (0,)),
    (24, "sums of zero, odd and long tensors", "comm", (1, 2, 3, 4)),
    (25, "sends that nothing buffers", "test_reductions_under_mpirun.py", (0,)),
    (
        25,
        "schedules whose sends wait for their receives",
        "pipeline/test_executor.py pipeline/test_prove.py",
        (0, 2, 4),
    ),
    (34, "no worker processes: a thread reads ahead", "dataset/test_loader.py -k ahead_of_time", (0,)),
    (35, "quirks of tagged text", "dataset/test_conll.py dataset/test_recipe.py dataset/test_prepare.py", (0, 2)),
    (36, "long sentences and words", "dataset/test_tokenize.py -k long", (0,)),
    (37, "scores as seqeval has them", "test_metrics.py", (0,)),
    (38, "labels of pieces", "dataset/test_tokenize.py -k pieces", (0,)),
]


@pytest.mark.whole
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "what, tests, ranks",
    [pytest.param(what, tests, ranks, marks=pytest.mark.case(case)) for case, what, tests, ranks in CASES],
)
def test_of_modules(told, tmp_path, what, tests, ranks):
    files, *chosen = tests.split(" -k ")
    words = ["-m", "pytest", "-p", "no:cacheprovider", *(str(TESTS / file) for file in files.split())]
    words += [word for text in chosen for word in ("-k", text)]
    found = []
    for number in ranks:
        done = mpirun(number, *words, *(["--only-mpi"] if number else []), cwd=tmp_path, timeout=600)
        summary = (done.stdout.strip().splitlines() or [""])[-1]
        assert done.returncode == 0 and " passed" in summary, f"{sys.executable}\n{done.stdout}\n{done.stderr}"
        assert "skipped" not in summary or "CI" not in os.environ
        found.append(summary.partition(" passed")[0])
    where = ", ".join(str(number) if number else "no" for number in ranks)
    told(f"{what}: {tests}", f"{' + '.join(found)} tests on {where} ranks")
