"""What is drawn of runs: a curve, bars or a stack for each question; nothing where nothing is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mpitrain.report.bars import by_rank, hours, per_type, time_by_part
from mpitrain.report.curves import dev_f1, loss, over_steps, own_work
from mpitrain.report.recorded import Recorded
from mpitrain.report.style import LIGHT, SMALL, WIDE, Draw, color_of, png_of, short, styled, svg_of


@dataclass(frozen=True)
class Figure:
    """A drawing and what it shows."""

    key: str
    title: str
    caption: str
    draw: Draw
    size: tuple[float, float] = SMALL


@dataclass(frozen=True)
class Picture:
    """A figure as it was drawn."""

    key: str
    title: str
    caption: str
    svg: str
    png: bytes


def picture(figure: Figure, runs: Sequence[Recorded]) -> Picture | None:
    """Draw it, if there is anything to draw; runs that share an axis are told apart by colour."""
    from matplotlib.figure import Figure as Canvas

    with styled():
        width, height = figure.size
        canvas = Canvas(
            figsize=(width, height + (0.34 * len(runs) if figure.size == WIDE else 0)), layout="constrained"
        )
        axes = canvas.subplots()
        if not figure.draw(axes, runs):
            return None
        svg = svg_of(canvas, figure.key)
        canvas.suptitle(figure.title, x=0.01, ha="left", fontsize=10, fontweight="bold")
        if len(runs) > 1 and figure.size != WIDE:
            _add_legend(canvas, runs)
        return Picture(figure.key, figure.title, figure.caption, svg, png_of(canvas))


def _add_legend(canvas: Any, runs: Sequence[Recorded]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=LIGHT[color_of(number)]) for number in range(len(runs))]
    # matplotlib leaves names out that begin with an underscore.
    names = [f"\u200a{short(run.name)}" if run.name.startswith("_") else short(run.name) for run in runs]
    canvas.legend(handles, names, loc="outside lower left", ncols=2 if len(runs) > 1 else 1)


LEARNING = [
    Figure("loss", "Loss", "Mean cross entropy of the labelled tokens of each step's batch; rings: dev.", loss),
    Figure("f1", "F1 on dev", "Entity F1 (conlleval), in percent, of every evaluation.", dev_f1),
    Figure("learning-rate", "Learning rate", "As the schedule has it.", over_steps("learning_rate")),
    Figure("gradient-norm", "Gradient norm", "Global norm before clipping.", over_steps("grad_norm", logarithm=True)),
]
SPEED = [
    Figure(
        "speed", "Tokens per second", "Real tokens of all ranks, padding left out.", over_steps("tokens_per_second")
    ),
    Figure(
        "parts",
        "Time by part",
        "Where the time of a step goes on rank 0; the slowest steps may reach beyond the top.",
        time_by_part,
    ),
    Figure("work", "Own work", "Share of a step in which ranks do not wait, in percent, mean of all ranks.", own_work),
    Figure(
        "imbalance",
        "Imbalance of replicas",
        "Estimated cost of the replica with most work by the mean of all; 1 is even.",
        over_steps("imbalance"),
    ),
]
RANKS = [
    Figure(
        "memory",
        "Memory of each rank",
        "Most memory that a rank has had (resident set, shared memory included); colours of a single run are stages.",
        by_rank("memory", 2**-30, "GiB"),
    ),
    Figure(
        "rank-work",
        "Work of each rank",
        "Seconds of own work a step, on average of the last start; colours of a single run are stages.",
        by_rank("work", 1.0, "s"),
    ),
]
SCORES = [Figure("types", "F1 by type", "In percent, types by their support.", per_type)]
COST = [
    Figure(
        "node-hours",
        "Node-hours",
        "What became of them, over all starts; the table tells what counts as what.",
        hours,
        WIDE,
    )
]
