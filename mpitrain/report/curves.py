"""Curves over steps and epochs, through as many points as an eye can tell apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mpitrain.observe.lines import number
from mpitrain.report.recorded import Recorded, Values
from mpitrain.report.style import LIGHT, Draw, color_of

POINTS, BAND = 120, 400  # of a smooth curve, and of the range behind it
THOUSANDS = 3000  # from which on numbers have commas
WIDE_RANGE = 30  # quotient of values that only a logarithm shows


def curve(axes: Any, steps: Values, values: Values, color: str, *, alone: bool, label: str | None = None) -> bool:
    """A smooth line through many values, their range behind it if it stands alone; False if there are none."""
    told = np.isfinite(values)
    steps, values = steps[told], values[told]
    if not len(values):
        return False
    if alone and len(values) > POINTS:
        count = min(BAND, len(values) // 4)
        middle = binned(steps, count)
        low, high = binned(values, count, np.min), binned(values, count, np.max)
        axes.fill_between(middle, low, high, color=color, alpha=0.22, linewidth=0)
    dots = "o" if len(values) == 1 else None
    axes.plot(binned(steps, POINTS), binned(values, POINTS), color=color, label=label, marker=dots, markersize=3.5)
    return True


def binned(values: Values, count: int, of: Callable[[Values], Any] = np.mean) -> Values:
    """Values of `count` groups of neighbours, or those there are."""
    return np.array([of(part) for part in np.array_split(values, min(count, len(values)))])


def over_steps(of: str | Callable[[Recorded], Values], *, logarithm: bool = False) -> Draw:
    """A field of metrics.jsonl, or what is made of some, over steps."""

    def draw(axes: Any, runs: Sequence[Recorded]) -> bool:
        columns = [run.column(of) if isinstance(of, str) else of(run) for run in runs]
        drawn = [
            curve(axes, run.steps, values, LIGHT[color_of(number)], alone=len(runs) == 1)
            for number, (run, values) in enumerate(zip(runs, columns, strict=True))
        ]
        told = np.concatenate(columns)
        told = told[np.isfinite(told)]
        if logarithm and len(told) and told.min() > 0 and told.max() > WIDE_RANGE * told.min():
            _scale_by_logarithm(axes)
        elif len(told) and told.max() > THOUSANDS:
            axes.yaxis.set_major_formatter("{x:,.0f}")
        finish_steps(axes, runs)
        return any(drawn)

    return draw


def own_work(axes: Any, runs: Sequence[Recorded]) -> bool:
    """See the caption."""
    drawn = over_steps(lambda run: 100 * np.minimum(1, run.column("work") / np.maximum(1e-9, run.column("seconds"))))(
        axes, runs
    )
    axes.set_ylim(0, 100)
    return drawn


def finish_steps(axes: Any, runs: Sequence[Recorded]) -> None:
    """The axis of steps, with a mark where a run was started again."""
    axes.set_xlabel("step")
    axes.margins(x=0.01)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    if len(runs) == 1:
        for start in runs[0].starts[1:]:
            if runs[0].lines and start.step >= runs[0].steps[0]:
                axes.axvline(start.step + 0.5, color=LIGHT["muted"], linestyle=(0, (1, 2)), linewidth=1)


def _scale_by_logarithm(axes: Any) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def loss(axes: Any, runs: Sequence[Recorded]) -> bool:
    """Of training, and of dev as rings."""
    drawn = over_steps("loss")(axes, runs)
    for place, run in enumerate(runs):
        told = [(number(line, "weights"), number(line, "loss")) for line in run.dev()]
        points = np.array([point for point in told if math.isfinite(point[1])])
        if len(points):
            color = LIGHT[color_of(place)] if len(runs) > 1 else LIGHT["s2"]
            face = {"markerfacecolor": LIGHT["card"], "markeredgecolor": color, "markersize": 5, "markeredgewidth": 1.5}
            axes.plot(*points.T, "o", label="dev", **face)
    if drawn:
        axes.set_ylim(bottom=0)
    return drawn


def dev_f1(axes: Any, runs: Sequence[Recorded]) -> bool:
    """Over epochs, the best with its number."""
    for place, run in enumerate(runs):
        color, best = LIGHT[color_of(place)], run.best()
        if best is None:
            continue
        epochs, scores = ([number(line, key) for line in run.dev()] for key in ("epoch", "f1_conlleval"))
        axes.plot(epochs, [100 * score for score in scores], color=color, marker="o", markersize=4)
        if len(runs) == 1:
            top = number(best, "epoch"), 100 * number(best, "f1_conlleval")
            axes.plot(*top, "o", color=color, markersize=9, alpha=0.3)
            axes.annotate(f"{top[1]:.1f}", top, (0, -15), textcoords="offset points", ha="center")
    axes.set_xlabel("epoch")
    axes.set_xlim(left=0)
    axes.margins(y=0.2)
    return any(run.best() for run in runs)
