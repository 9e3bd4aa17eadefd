"""What a run has cost in node-hours over all its starts, and what became of them: restarts, waiting, bubble, saves.

`ledger.json` has an entry for each start. A start may die without a word: the next one settles its account by the lines
that it left in metrics.jsonl and evaluations.jsonl, before those of steps that are done again are dropped. The ranks of
a start count as equal shares of its nodes. Pure.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from typing import Annotated

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from mpitrain.observe.lines import Line, amount, step_of

SECONDS_PER_HOUR = 3600
PARTS = {
    "computing": "passes and updates, and waiting for data",
    "padding": "passes of padding: their time by its share of all tokens that were computed (an estimate)",
    "bubble": "stages of a pipeline that idle while another one of their replica still has passes to do",
    "waiting": "ranks that wait for others, and their messages: sums of gradients, votes, new weights, tensor groups",
    "saves": "the training stands still for a checkpoint",
    "evaluation": "scores of dev and test",
    "start": "the first start, until its first step begins",
    "restarts": "every further start until its first step begins, and steps that were done again with all around them",
    "other": "what is left: between steps, loading the best weights, the end, a death until the job was gone",
}
Seconds = Annotated[float, Field(ge=0, le=1e12)]
Count = Annotated[int, Field(ge=0, le=1 << 40)]


class Start(BaseModel):
    """One start of a run.

    Attributes:
        step: that it has gone on from, 0 at first.
        ranks, nodes: of the job.
        start: seconds until its first step began, or, before that, until it opened the run directory.
        seconds: from the start of the program to its last sign of life.
        saves: seconds of saves after its last step.
        lost: seconds of steps that were done again, and of what came behind them.
    """

    step: Count
    ranks: Count
    nodes: Count
    start: Seconds
    seconds: Seconds
    saves: Seconds = 0.0
    lost: Seconds = 0.0


STARTS = TypeAdapter(list[Start])


def read_starts(text: str) -> list[Start]:
    """The starts in a ledger.json; none if it is damaged: an account must not keep a run from going on."""
    try:
        return STARTS.validate_json(text)
    except (ValidationError, RecursionError):
        return []


def by_start(starts: Sequence[Start], lines: Sequence[Line]) -> list[list[Line]]:
    """The lines that each start has left, in their order.

    A start has done the steps behind its first one up to that from which a later start went on.
    """
    before = accumulate((start.step for start in reversed(starts)), min)
    bounds = [*[*before][-2::-1], math.inf]
    found: list[list[Line]] = [[] for _ in starts]
    for line in lines:
        place = bisect_left(bounds, step_of(line))
        if place < len(starts) and starts[place].step < step_of(line):
            found[place].append(line)
    return found


def scored_by(starts: Sequence[Start], evaluations: Sequence[Line]) -> list[list[Line]]:
    """The scores of each start, which are told by its number: two may score the weights of one step."""
    found: list[list[Line]] = [[] for _ in starts]
    for line in evaluations:
        number = int(amount(line, "start"))
        if 0 < number <= len(starts):
            found[number - 1].append(line)
    return found


def see(starts: Sequence[Start], lines: Sequence[Line], evaluations: Sequence[Line]) -> None:
    """Take up what lines tell: when the first step of each start began, and when the last start was still alive."""
    for start, own in zip(starts, by_start(starts, lines), strict=True):
        if own and step_of(own[0]) == start.step + 1 and amount(own[0], "elapsed"):
            start.start = _began(own[0])
    if starts:
        last = (*by_start(starts, lines)[-1], *scored_by(starts, evaluations)[-1])
        signs = (amount(line, "elapsed") for line in last)
        starts[-1].seconds = max(starts[-1].seconds, *signs, 0.0)


def settle(starts: Sequence[Start], lines: Sequence[Line], evaluations: Sequence[Line], step: int) -> None:
    """Close the account of all starts, before another one goes on from `step` and does what lies behind it again."""
    see(starts, lines, evaluations)
    for start, own in zip(starts, by_start(starts, lines), strict=True):
        again = [line for line in own if step_of(line) > step]
        if again:
            start.lost, start.saves = max(0.0, start.seconds - _began(again[0])), 0.0


def _began(line: Line) -> float:
    """When a step began, seconds from the start of its program."""
    return max(0.0, amount(line, "elapsed") - amount(line, "seconds"))


def node_hours(starts: Sequence[Start], lines: Sequence[Line], evaluations: Sequence[Line]) -> dict[str, float]:
    """`used`, and its PARTS, which are disjoint and add up to it; `see` or `settle` comes before."""
    used, parts = 0.0, dict.fromkeys(PARTS, 0.0)
    shares = zip(starts, by_start(starts, lines), scored_by(starts, evaluations), strict=True)
    for number, (start, steps, scored) in enumerate(shares):
        hours = start.nodes / SECONDS_PER_HOUR
        used += hours * start.seconds
        # Before its first step a start may do what the one before it was stopped at.
        first = sum(amount(line, "seconds") for line in scored if step_of(line) == start.step)
        parts["restarts" if number else "start"] += hours * max(0.0, start.start - first)
        parts["restarts"] += hours * start.lost
        parts["saves"] += hours * start.saves
        parts["evaluation"] += hours * sum(amount(line, "seconds") for line in scored)
        for name, seconds in _of_steps(steps).items():
            parts[name] += hours * seconds
    used = max(used, sum(parts.values()))
    parts["other"] = used - sum(parts.values())
    return {"used": used, **parts}


def _of_steps(lines: Sequence[Line]) -> dict[str, float]:
    """Seconds of steps, by part."""
    seconds, work, bubble, copy, saves = (
        sum(amount(line, key) for line in lines) for key in ("seconds", "work", "bubble", "copy", "save")
    )
    padding = sum(amount(line, "passes") * padding_share(line) for line in lines)
    return {
        "computing": max(0.0, work - padding),
        "padding": padding,
        "bubble": bubble,
        "waiting": max(0.0, seconds - work - bubble - copy),
        "saves": saves,
    }


def padding_share(line: Line) -> float:
    """Tokens of padding by all that were computed in a step."""
    padding = amount(line, "padding")
    return padding / (padding + amount(line, "tokens")) if padding else 0.0
