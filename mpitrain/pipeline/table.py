"""A schedule from a CSV file: a row for each stage, and in its cells what it computes, one after the other.

    0F0,0F1,0F2,0I0,0W0,0F3,0I1,0W1,0I2,0W2,0I3,0W3
    ,1F0,1I0,1F1,1I1,1F2,1I2,1W0,1F3,1I3,1W1,1W2,1W3

A cell is a place in the model (0 is the first chunk), F, B, I or W (forward, backward, its half for inputs, that for
weights), and a micro-batch: the format of torch.distributed.pipelining. Empty cells, where time passes, mean nothing.
A row that holds several places is a stage of several chunks.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Container
from itertools import count
from pathlib import Path

from mpitrain.errors import UsageError
from mpitrain.pipeline.messages import program
from mpitrain.pipeline.prove import ScheduleError, play
from mpitrain.pipeline.schedule import Instruction, Kind, Placement, Schedule, only

KINDS = {"F": Kind.FORWARD, "B": Kind.BACKWARD, "I": Kind.BACKWARD_INPUT, "W": Kind.BACKWARD_WEIGHT}
CELL = re.compile(r"(\d+)([FBIW])(\d+)")
Row = list[tuple[int, Kind, int]]  # place in the model, kind, micro-batch


def read_text(file: str) -> str:
    """A file's text.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        return Path(file).read_text(encoding="utf-8-sig")  # a spreadsheet may put a mark in front
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"--pipeline.schedule {file}: {reason}; it is neither a file nor a schedule's name") from None


def num_rows(text: str) -> int:
    """Stages that a table is for."""
    return len(text.splitlines())


def read_schedule(file: str, text: str, num_stages: int, num_micro_batches: int) -> Schedule:
    """Understand and prove a schedule.

    Args:
        file: name of a CSV file as above.
        text: of the file.
        num_stages: of the mesh.
        num_micro_batches: the most that a replica has in a step; steps with fewer go without what is not there.

    Raises:
        UsageError: names the file, and the line and cell, or who waits for whom.
    """
    rows = [_read_row(file, number, row) for number, row in enumerate(csv.reader(text.splitlines()), 1)]
    if not any(rows):
        raise UsageError(
            f"--pipeline.schedule {file}: is empty; a row for each stage is wanted, such as 0F0,0F1,0B0,0B1"
        )
    if [] in rows:
        line = 1 + rows.index([])
        raise UsageError(f"--pipeline.schedule {file}:{line}: a stage that computes nothing; a row is a stage")
    if len(rows) != num_stages:
        raise UsageError(
            f"--pipeline.schedule {file}: {len(rows)} rows for {len(rows)} stages, the mesh has {num_stages}; "
            f"--mesh.pipe {len(rows)} would work"
        )
    schedule = Schedule(file, _placement(file, rows), lambda stage, number: only(number, orders[stage]))
    orders = [
        [Instruction(kind, number, schedule.placement.places[stage].index(place)) for place, kind, number in row]
        for stage, row in enumerate(rows)
    ]
    numbers = {number for row in rows for _, _, number in row}
    found, gap = 1 + max(numbers), _first_missing(numbers)
    if gap < found:
        raise UsageError(f"--pipeline.schedule {file}: has micro-batch {found - 1}, but no micro-batch {gap}")
    if found < num_micro_batches:
        raise UsageError(
            f"--pipeline.schedule {file}: has {found} micro-batches, a replica has up to {num_micro_batches} in a step "
            f"(--train.micro_batches over --mesh.data, rounded up)"
        )
    try:
        programs = [program(schedule, stage, found) for stage in range(num_stages)]
        play(programs, found, placement=schedule.placement, blocking_sends=False)  # nor does the executor's block
    except ScheduleError as error:
        raise UsageError(f"--pipeline.schedule {file}: {error}") from None
    return schedule


def _first_missing(numbers: Container[int]) -> int:
    """The least number, from 0 on, that is not there."""
    return next(number for number in count() if number not in numbers)


def _read_row(file: str, line: int, row: list[str]) -> Row:
    found = []
    for column, cell in enumerate(row, 1):
        if not cell.strip():
            continue
        match = CELL.fullmatch(cell.strip())
        if match is None:
            raise UsageError(
                f"--pipeline.schedule {file}:{line}: cell {column} is {cell.strip()!r}; it should be a place in the "
                "model, one of F B I W, and a micro-batch, such as 0F3, with commas between cells"
            )
        found.append((int(match[1]), KINDS[match[2]], int(match[3])))
    return found


def _placement(file: str, rows: list[Row]) -> Placement:
    placement = Placement(tuple(tuple(sorted({place for place, _, _ in row})) for row in rows))
    holders: dict[int, int] = {}
    for line, places in enumerate(placement.places, 1):
        for place in places:
            if place in holders:
                raise UsageError(
                    f"--pipeline.schedule {file}:{line}: place {place} of the model (the number before F, B, I or W) "
                    f"is in row {holders[place]} already; the first row of a simple pipeline has 0F0, the next 1F0"
                )
            holders[place] = line
    gap = _first_missing(holders)
    if gap < len(holders):
        last = max(holders)
        raise UsageError(
            f"--pipeline.schedule {file}: row {holders[last]} holds place {last} of the model, but no row place {gap}"
        )
    return placement
