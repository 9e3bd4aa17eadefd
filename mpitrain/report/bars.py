"""Bars and stacks: where time and node-hours go, what ranks take, how types are scored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from mpitrain.observe.lines import number
from mpitrain.report.curves import POINTS, binned, finish_steps
from mpitrain.report.recorded import Recorded, Values
from mpitrain.report.style import HOURS, LIGHT, SMALL, Draw, color_of, short

OUTLIER = 3  # times the median, from which on a step is cut off
MANY = 32  # ranks or types that still have a bar each
STEP_PARTS = {  # of a step's seconds: colour, and the fields that are added and taken away
    "forward and backward": ("s1", ("forward_backward",), ("tensor",)),
    "tensor group": ("s7", ("tensor",), ()),
    "pipeline wait": ("s2", ("pipeline_wait",), ()),
    "reduce": ("s4", ("reduce",), ()),
    "update": ("s3", ("update",), ("gather", "copy")),
    "new weights": ("s6", ("gather",), ()),
    "data": ("s5", ("data",), ()),
    "save": ("s8", ("save",), ()),
}


def time_by_part(axes: Any, runs: Sequence[Recorded]) -> bool:
    """Of one run a stack over steps; of several one bar each."""
    parts = [_parts_of(run) for run in runs]
    means = [{name: float(np.nanmean(values)) for name, values in each.items() if len(values)} for each in parts]
    total = max((sum(each.values()) for each in means), default=0.0)
    if not total > 0:
        return False
    scale, unit = (1e3, "ms") if total < 1 else (1.0, "s")
    shown = [name for name in STEP_PARTS if max(each.get(name, 0.0) for each in means) > 0.002 * total]
    colors = [LIGHT[STEP_PARTS[name][0]] for name in shown]
    if len(runs) == 1:
        steps = binned(runs[0].steps, POINTS)
        stack = [scale * binned(np.nan_to_num(parts[0][name]), POINTS) for name in shown]
        axes.stackplot(steps, stack, colors=colors, labels=shown)
        whole = np.sum(stack, axis=0)
        axes.set_ylim(0, min(whole.max(), OUTLIER * float(np.median(whole))))
        axes.set_ylabel(f"{unit} a step")
        finish_steps(axes, runs)
    else:
        _stack_bars(axes, runs, [{name: scale * each.get(name, 0.0) for name in shown} for each in means], colors)
        axes.set_xlabel(f"{unit} a step")
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=4, handlelength=0.8, columnspacing=1.2)
    return True


def _parts_of(run: Recorded) -> dict[str, Values]:
    columns = {key: np.nan_to_num(run.column(key)) for _, *keys in STEP_PARTS.values() for key in sum(keys, ())}
    return {
        name: np.maximum(0, sum(columns[key] for key in added) - sum(columns[key] for key in taken))
        for name, (_, added, taken) in STEP_PARTS.items()
    }


def _stack_bars(axes: Any, runs: Sequence[Recorded], parts: list[dict[str, float]], colors: list[str]) -> None:
    left = np.zeros(len(runs))
    for name, color in zip(parts[0], colors, strict=True):
        widths = np.array([each[name] for each in parts])
        axes.barh(range(len(runs)), widths, left=left, color=color, height=0.62, label=name)
        left += widths
    axes.set_yticks(range(len(runs)), [short(run.name, 22) for run in runs] if len(runs) > 1 else [""])
    axes.invert_yaxis()
    axes.grid(False)
    axes.margins(x=0)


def hours(axes: Any, runs: Sequence[Recorded]) -> bool:
    """A bar for each run: shares of its node-hours."""
    told = [run.node_hours for run in runs]
    if not all(each.get("used") for each in told):
        return False
    shares = [{name: 100 * each[name] / each["used"] for name in HOURS} for each in told]
    _stack_bars(axes, runs, shares, [LIGHT[role] for role in HOURS.values()])
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of all node-hours")
    axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=len(HOURS), handlelength=0.8, columnspacing=1.2)
    return True


def by_rank(key: str, scale: float, unit: str) -> Draw:
    """A field of ranks.json: of one run a bar, or a dot, for each rank in the colour of its stage; of several lines."""

    def draw(axes: Any, runs: Sequence[Recorded]) -> bool:
        told = [[(scale * number(rank, key), rank.get("stage")) for rank in run.ranks] for run in runs]
        found = [[(value, stage) for value, stage in each if math.isfinite(value)] for each in told]
        for place, each in enumerate(found):
            ranks, values = range(len(each)), [value for value, _ in each]
            if len(runs) > 1:
                axes.step(ranks, values, where="mid", color=LIGHT[color_of(place)], marker="." * (len(values) == 1))
                continue
            stages = [LIGHT[color_of(stage if isinstance(stage, int) else 0)] for _, stage in each]
            if len(values) <= MANY:
                axes.bar(ranks, values, color=stages, width=0.7)
            else:
                axes.scatter(ranks, values, color=stages, s=12)
        axes.set_xlabel("rank")
        axes.set_ylabel(unit)
        axes.set_ylim(bottom=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        return any(found)

    return draw


def per_type(axes: Any, runs: Sequence[Recorded]) -> bool:
    """F1 of the types with the greatest support."""
    found = [run.per_type()[1] for run in runs]
    support = {kind: scores["support"] for each in reversed(found) for kind, scores in each.items()}
    kinds = sorted(support, key=lambda kind: -np.nan_to_num(support[kind]))[:MANY]
    width, height = SMALL
    axes.figure.set_size_inches(width, max(height, 0.7 + 0.13 * len(kinds) * (1 + len(runs))))
    height = 0.72 / len(runs)
    for run, each in enumerate(found):
        places = [place + (run + 0.5) * height - 0.36 for place in range(len(kinds))]
        values = [100 * each.get(kind, {}).get("f1", math.nan) for kind in kinds]
        axes.barh(places, values, height=0.9 * height, color=LIGHT[color_of(run)])
        for place, value in zip(places, values, strict=True):
            if len(runs) * len(kinds) <= MANY // 2 and math.isfinite(value):
                axes.annotate(
                    f"{value:.1f}", (value, place), (4, 0), textcoords="offset points", va="center", fontsize=8
                )
    axes.set_yticks(range(len(kinds)), [short(kind, 18) for kind in kinds])
    axes.invert_yaxis()
    axes.set_xlim(0, 100 if len(kinds) else 1)
    axes.grid(True, axis="x")
    axes.grid(False, axis="y")
    return bool(kinds)
