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
        return Path(file).read_text(encoding="utf-8")
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
    empty = next((number for number, row in enumerate(rows, 1) if not row), None)
    if not rows or empty:
        raise UsageError(f"--pipeline.schedule {file}:{empty or 1}: a stage that computes nothing; a row is a stage")
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
    found = 1 + max(number for row in rows for _, _, number in row)
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


def _read_row(file: str, line: int, row: list[str]) -> Row:
    found = []
    for column, cell in enumerate(row, 1):
        if not cell.strip():
            continue
        match = CELL.fullmatch(cell.strip())
        if match is None:
            raise UsageError(
                f"--pipeline.schedule {file}:{line}: cell {column} is {cell.strip()!r}; it should be a place in the "
                "model, one of F B I W, and a micro-batch, such as 0F3"
            )
        found.append((int(match[1]), KINDS[match[2]], int(match[3])))
    return found


def _placement(file: str, rows: list[Row]) -> Placement:
    placement = Placement(tuple(tuple(sorted({place for place, _, _ in row})) for row in rows))
    everywhere = sorted(place for places in placement.places for place in places)
    if everywhere != list(range(len(everywhere))):
        raise UsageError(
            f"--pipeline.schedule {file}: its rows hold the places {', '.join(map(str, everywhere))} of the model; "
            f"each of 0 to {everywhere[-1]} should be in one row"
        )
    return placement
