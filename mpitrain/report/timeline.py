"""The pipeline as it ran in a traced run, beside what its schedule promises for the times that passes took."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from mpitrain.errors import DataError
from mpitrain.files import parse_json
from mpitrain.pipeline.messages import with_messages
from mpitrain.pipeline.prove import Proof, ScheduleError, Span, play
from mpitrain.pipeline.schedule import Instruction, Kind, Placement


@dataclass(frozen=True)
class Step:
    """A replica's step: as it was measured, and as the schedule has it; times in ms."""

    number: int
    replica: int
    measured: Proof
    predicted: Proof


def read_steps(file: Path) -> tuple[list[Step], bool]:
    """The steps of a trace file, and whether ranks had to share cores.

    Raises:
        DataError: it is no trace, or not one of ours.
    """
    try:
        document = parse_json(file.read_text(encoding="utf-8"))
        placement = Placement(tuple(map(tuple, document["otherData"]["places"])))
        found: dict[tuple[int, int], list[list[Span]]] = defaultdict(lambda: [[] for _ in placement.places])
        num_tensor = document["otherData"].get("tensor", 1)
        for event in document["traceEvents"]:
            # The ranks of a tensor group compute side by side: the first one stands for all.
            if event["ph"] == "X" and event["cat"] == "compute" and event["pid"] % num_tensor == 0:
                replica, stage = divmod(event["pid"] // num_tensor, len(placement.places))
                found[event["args"]["step"], replica][stage].append(_span_of(event))
        steps = [_step(number, replica, spans, placement) for (number, replica), spans in sorted(found.items())]
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}; train with --trace N, and give the run's directory") from None
    except ScheduleError as error:
        raise DataError(f"{file}: holds a step that no schedule has: {error}") from None
    except (ValueError, KeyError, TypeError, IndexError, ArithmeticError) as error:
        raise DataError(f"{file}: is no trace of a run, or damaged: {error!r}") from None
    if not steps:
        raise DataError(f"{file}: holds no step")
    return steps, bool(document["otherData"].get("crowded"))


def _span_of(event: dict[str, Any]) -> Span:
    told = event["args"]
    instruction = Instruction(Kind(told["kind"]), int(told["micro_batch"]), int(told["chunk"]))
    return Span(instruction, event["ts"] / 1e3, (event["ts"] + event["dur"]) / 1e3)


def _step(number: int, replica: int, spans: list[list[Span]], placement: Placement) -> Step:
    first = min(span.start for stage in spans for span in stage)
    spans = [
        [Span(span.instruction, span.start - first, span.stop - first) for span in sorted(stage, key=lambda s: s.start)]
        for stage in spans
    ]
    makespan = max(span.stop for stage in spans for span in stage)
    return Step(number, replica, Proof([], makespan, spans), predict(spans, placement))


def predict(spans: list[list[Span]], placement: Placement) -> Proof:
    """The same passes in the same order on each stage, played as if messages took no time."""
    orders = [[span.instruction for span in stage] for stage in spans]
    lengths = {
        (places[span.instruction.chunk], span.instruction): span.stop - span.start
        for stage, places in zip(spans, placement.places, strict=True)
        for span in stage
    }
    told = [with_messages(order, stage, placement) for stage, order in enumerate(orders)]
    return play(
        told,
        1 + max(step.micro_batch for order in orders for step in order),
        placement=placement,
        times=lambda step, place: lengths[place, step],
        blocking_sends=False,
    )


def table_of(steps: list[Step]) -> Table:
    """A row for each step of each replica, and their medians."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("step", "replica", "pipeline ms", "predicted ms", "bubble", "predicted"):
        table.add_column(name, justify="right")
    measured, predicted = [step.measured for step in steps], [step.predicted for step in steps]
    for step in steps:
        ms = (f"{proof.makespan:,.1f}" for proof in (step.measured, step.predicted))
        bubbles = (f"{proof.bubble:.1%}" for proof in (step.measured, step.predicted))
        table.add_row(str(step.number), str(step.replica), *ms, *bubbles)
    if len(steps) > 1:
        ms = (f"{median(proof.makespan for proof in proofs):,.1f}" for proofs in (measured, predicted))
        bubbles = (f"{median(proof.bubble for proof in proofs):.1%}" for proofs in (measured, predicted))
        table.add_row("median", "", *ms, *bubbles)
    return table


def panels_of(steps: list[Step]) -> dict[str, Proof]:
    """The step of median length, measured and predicted, by title."""
    typical = sorted(steps, key=lambda step: step.measured.makespan)[len(steps) // 2]
    return {
        f"step {typical.number}, replica {typical.replica}: idle {typical.measured.bubble:.1%}": typical.measured,
        f"the same passes by the schedule: idle {typical.predicted.bubble:.1%}": typical.predicted,
    }
