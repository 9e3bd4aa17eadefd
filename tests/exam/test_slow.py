"""Case 33: a rank that is slower than its peers is named; ranks that are equal are not."""

from __future__ import annotations

import os
import re

import pytest
from examining import Exam
from launching import command
from tiny import metrics_of

NUM_STEPS = 60
SETTINGS = ("--train.epochs", "999", "--train.max_steps", str(NUM_STEPS), "--checkpoint.best", "false")
SETTINGS += ("--checkpoint.every", "999")
NAMED = r"rank (\d+) on \S+ is slow: own work ([\d.]+) ms a step, where its peers would take ([\d.]+); the others wait "


@pytest.mark.case(33)
@pytest.mark.parametrize(
    "place, mesh", [("forward", ("--mesh.data", "2")), ("data", ()), ("backward", ("--mesh.pipe", "2"))]
)
def test_a_slow_rank_is_named(reference: Exam, told, place, mesh):
    out = f"slow-{place}"
    done = reference.run(2, out, settings=(*SETTINGS, *mesh), MPITRAIN_FAILPOINT=f"{place}:1=sleep0.05")
    assert done.returncode == 0, done.stderr
    found = re.findall(NAMED, done.stdout.replace("\n", " "))
    assert [rank for rank, *_ in found] == ["1"], done.stdout
    assert float(found[0][1]) > 50 + float(found[0][2])
    lines = metrics_of(reference.place / out)[1:]
    assert sum(line["work"] for line in lines) < 0.95 * sum(line["seconds"] for line in lines)
    told(
        f"50 ms of sleep at each {place} of rank 1", f"named once, own work {found[0][1]} ms, others' {found[0][2]} ms"
    )


@pytest.mark.case(33)
@pytest.mark.parametrize("ranks, mesh", [(2, ()), (2, ("--mesh.pipe", "2")), (4, ("--mesh.pipe", "2")), (4, ())])
def test_equal_ranks_are_not_named(reference: Exam, told, ranks, mesh):
    done = reference.run(ranks, f"equal-{ranks}-{len(mesh)}", settings=(*SETTINGS, *mesh))
    assert done.returncode == 0 and " is slow" not in done.stdout, done.stdout
    told(f"nothing, on {ranks} ranks {' '.join(mesh)}", "nobody named")


@pytest.mark.case(33)
def test_a_rank_that_gets_less_of_its_core_is_named(reference: Exam, told):
    """Rank 1 shares its core with three others of the same kind."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    assert len(cores) == 2, "two cores are needed"
    words = command(
        0, *reference.words("crowded", settings=(*SETTINGS, "--train.batch_size", "200", "--mesh.data", "2"))
    )
    hog = "while :; do :; done"
    first, second = (["taskset", "-c", str(core), *words] for core in cores)
    hogs = " ".join(f"taskset -c {cores[1]} sh -c '{hog}' &" for _ in range(3))
    launch = [command(1)[0], "-np", "1", *first, ":", "-np", "1", *second]
    script = f'{hogs} "$@"; code=$?; kill $(jobs -p); exit $code'
    done = reference.begin_line("crowded", ["bash", "-c", script, "bash", *launch]).end(120)
    assert done.returncode == 0, done.stderr
    found = re.findall(NAMED, done.stdout.replace("\n", " "))
    assert [rank for rank, *_ in found] == ["1"], done.stdout
    told("three other programs on the core of rank 1", f"named once, {found[0][1]} ms, others' {found[0][2]} ms")
