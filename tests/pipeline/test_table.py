"""Schedules from CSV files: read as torch.distributed.pipelining writes them, proven, refused with the reason."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mpitrain.errors import UsageError
from mpitrain.pipeline import table
from mpitrain.pipeline.messages import program
from mpitrain.pipeline.prove import play
from mpitrain.pipeline.schedule import SCHEDULES, Kind, Schedule

LETTERS = {kind: letter for letter, kind in table.KINDS.items()}


def read(file, num_stages: int, num_micro_batches: int) -> Schedule:
    return table.read_schedule(str(file), table.read_text(str(file)), num_stages, num_micro_batches)


def written(schedule: Schedule, num_stages: int, num_micro_batches: int) -> str:
    rows = []
    for stage in range(num_stages):
        places = schedule.placement.places[stage]
        order = schedule.order(stage, num_micro_batches)
        rows.append(",".join(f"{places[step.chunk]}{LETTERS[step.kind]}{step.micro_batch}" for step in order))
    return "\n".join(rows) + "\n"


@pytest.mark.parametrize("name", SCHEDULES)
def test_what_is_read_is_what_was_written(name, tmp_path):
    known, file = SCHEDULES[name](3, 2), tmp_path / "own.csv"
    file.write_text(written(known, 3, 6))
    found = read(file, 3, 6)
    assert found.placement == known.placement
    assert [found.order(stage, 6) for stage in range(3)] == [known.order(stage, 6) for stage in range(3)]


def test_a_replica_with_fewer_micro_batches_goes_without_the_others(tmp_path):
    file = tmp_path / "own.csv"
    file.write_text(written(SCHEDULES["zb-v"](2, 2), 2, 6))
    found = read(file, 2, 4)
    for count in range(5):
        play([program(found, stage, count) for stage in range(2)], count, placement=found.placement)


def test_the_example_in_the_documentation_is_proven_and_empty_cells_mean_nothing(tmp_path):
    file = tmp_path / "own.csv"
    file.write_text(table.__doc__.split("\n\n")[1].replace("    ", ""))
    found = read(file, 2, 4)
    assert [step.kind for step in found.order(1, 1)] == [Kind.FORWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT]


def test_stages_may_differ_in_the_order_of_micro_batches(tmp_path):
    (tmp_path / "own.csv").write_text("0F0,0F1,0B0,0B1\n1F0,1F1,1B1,1B0\n")
    read(tmp_path / "own.csv", 2, 2)


def test_the_example_of_the_readme_is_a_schedule(tmp_path):
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (tmp_path / "own.csv").write_text(re.search(r"    (0F0.*)\n    (1F0.*)\n", readme).expand(r"\1\n\2\n"))
    read(tmp_path / "own.csv", 2, 2)


def test_a_mark_that_spreadsheets_put_in_front_is_no_cell(tmp_path):
    (tmp_path / "own.csv").write_text("0F0,0B0\n1F0,1B0\n", encoding="utf-8-sig")
    read(tmp_path / "own.csv", 2, 1)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("0F0,0B0\n1F0,1B0,1X1\n", r"own.csv:2: cell 3 is '1X1'; it should be a place in the model, one of F B I W"),
        ("0F0,0B0\n", r"1 rows for 1 stages, the mesh has 2; --mesh.pipe 1 would work"),
        ("0F0,0B0\n\n", r"own.csv:2: a stage that computes nothing"),
        ("", r"own.csv: is empty; a row for each stage is wanted"),
        ("\n\n", r"own.csv: is empty"),
        ("0F0,0B0\n2F0,2B0\n", r"row 2 holds place 2 of the model, but no row place 1"),
        (
            "0F0,0B0\n0F1,0B1\n",
            r"own.csv:2: place 0 of the model \(the number before F, B, I or W\) is in row 1 already",
        ),
        ("0F0,0B0,0F99999999999999999999\n1F0,1B0\n", r"has micro-batch 9+, but no micro-batch 1$"),
        ("0F0,0F1,0B0\n1F0,1F1,1B0,1B1\n", r"stage 0: never computed: backward 1$"),
        ("0F0,0B0\n1F0,1B0\n", r"has 1 micro-batches, a replica has up to 2 in a step"),
        ("0F0,0F1,0B0,0B1\n1F0,1F1,1B0\n", r"stage 1: never computed: backward 1$"),
        (
            "0F0,0B0,0F1,0B1\n1F0,1F1,1B0,1B1\n",
            r"deadlock: stage 0 waits at 'receive gradient 0'; stage 1 waits at 'receive activation 1'; "
            r"in a circle: stage 0 waits for stage 1 waits for stage 0",
        ),
        ("0F0,0F1,0B0,0B1\n1F0,1F1,1I0,1W0,1B1,1W0\n", r"stage 1: 'backward weight 0' was computed before"),
    ],
)
def test_what_would_not_work_is_refused_with_the_reason(text, problem, tmp_path):
    (tmp_path / "own.csv").write_text(text)
    with pytest.raises(UsageError, match=problem) as caught:
        read(tmp_path / "own.csv", 2, 2)
    assert str(caught.value).startswith(f"--pipeline.schedule {tmp_path / 'own.csv'}")


def test_a_file_that_is_not_there_and_one_that_is_no_text(tmp_path):
    with pytest.raises(UsageError, match="No such file or directory; it is neither a file nor a schedule's name"):
        read(tmp_path / "none.csv", 2, 2)
    (tmp_path / "own.csv").write_bytes(b"\xff\xfe0F0")
    with pytest.raises(UsageError, match="it is not UTF-8 text"):
        read(tmp_path / "own.csv", 2, 2)
