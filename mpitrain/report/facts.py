"""The words and numbers of a page: what a run was, how it went, what it has cost, and how runs differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mpitrain.errors import ExitCode
from mpitrain.observe.ledger import PARTS
from mpitrain.observe.lines import Line
from mpitrain.report.recorded import Recorded, clean
from mpitrain.report.style import HOURS

NONE = "-"
UNCOMPARED = {"out", "resume"}  # settings that say nothing about what was trained
STATES = {str(ExitCode.DONE): ("good", "done"), str(ExitCode.STOPPED): ("held", "stopped")}


class Fact(NamedTuple):
    """A number, or a word, and what else there is to say of it."""

    value: str
    more: str = ""


def facts(run: Recorded) -> dict[str, Fact]:
    """The summary of a run; the first four are what people ask for."""
    best, cost = run.best(), run.node_hours
    return {
        "Best F1 on dev": Fact(percent(best["f1_conlleval"] if best else math.nan), _told_of(run, best)),
        "Speed": Fact(_speed(run), f"and {percent(_padding(run))} % padding beside them"),
        "Time": Fact(duration(run.seconds()), f"in {len(run.starts)} starts" if len(run.starts) > 1 else ""),
        "Node-hours": Fact(hours(cost.get("used", math.nan)), _computing(cost)),
        "Model": Fact(clean(_stem(run.asked("config", "model"))), _shape(run)),
        "Data": Fact(clean(_stem(run.asked("config", "data"))), _labels(run)),
        "Ranks": _mesh(run),
        "Steps": Fact(_steps(run), _batch(run)),
    }


def state(run: Recorded) -> tuple[str, str, str]:
    """A class for its colour, a word, and the reason why the run has ended."""
    code = clean(run.exit.get("code"))
    kind, word = STATES.get(code, ("bad", f"exit code {code}")) if run.exit else ("open", "not ended")
    reason = clean(run.exit.get("reason", ""))
    return kind, word, "" if reason == word else reason


def _told_of(run: Recorded, best: Line | None) -> str:
    where = [f"at step {int(best['weights']):,}"] if best else []
    return ", ".join([*where, *([f"on test {percent(run.f1('test'))}"] if math.isfinite(run.f1("test")) else [])])


def _computing(cost: dict[str, float]) -> str:
    return f"{cost['computing'] / cost['used']:.0%} of them computing" if cost.get("used") else ""


def _padding(run: Recorded) -> float:
    padding, tokens = np.nansum(run.column("padding")), np.nansum(run.column("tokens"))
    return float(padding / (padding + tokens)) if padding + tokens > 0 else math.nan


def _shape(run: Recorded) -> str:
    layers, width = (run.asked("problem", "model", key) for key in ("num_hidden_layers", "hidden_size"))
    return f"{clean(layers)} layers x {clean(width)}" if layers and width else ""


def _labels(run: Recorded) -> str:
    labels = run.asked("problem", "labels")
    return f"{len(labels)} labels" if isinstance(labels, list) else ""


def _batch(run: Recorded) -> str:
    precision, size = (run.asked("config", "train", key) for key in ("precision", "batch_size"))
    return f"of {clean(size)} sequences, in {clean(precision)}" if precision and size else ""


def _stem(path: Any) -> str:
    """The last part of a path that may end in a slash."""
    return str(path).rstrip("/").rpartition("/")[2].removesuffix(".toml") if path else NONE


def _mesh(run: Recorded) -> Fact:
    mesh = {axis: run.asked("mesh", axis) for axis in ("data", "pipe", "tensor")}
    if not all(isinstance(size, int) for size in mesh.values()):
        return Fact(NONE)
    shape = " x ".join(f"{size} {axis}" for axis, size in mesh.items() if size > 1 or axis == "data")
    nodes = run.starts[-1].nodes if run.starts else 0
    memory = run.column("memory")
    more = [f"on {nodes} nodes"] if nodes > 1 else []
    more += [f"up to {np.nanmax(memory) / 2**30:.2f} GiB each"] if np.isfinite(memory).any() else []
    return Fact(f"{math.prod(mesh.values())} = {shape}", ", ".join(more))


def _steps(run: Recorded) -> str:
    if not run.lines:
        return NONE
    planned, done = run.asked("num_steps"), int(run.steps[-1])
    return f"{done:,}" + (f" of {planned:,}" if isinstance(planned, int) and planned != done else "")


def _speed(run: Recorded) -> str:
    seconds, tokens = np.nansum(run.column("seconds")), np.nansum(run.column("tokens"))
    return f"{tokens / seconds:,.0f} tokens/s" if seconds > 0 else NONE


def percent(share: float) -> str:
    """With two digits, as papers have F1."""
    return f"{100 * share:.2f}" if math.isfinite(share) else NONE


def hours(number: float) -> str:
    """With three digits that tell."""
    if not math.isfinite(number):
        return NONE
    digits = max(0, min(6, 2 - math.floor(math.log10(number)))) if number > 0 else 0
    return f"{number:,.{digits}f}"


def duration(seconds: float) -> str:
    """In two units."""
    if not seconds < 1e12:
        return NONE
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {seconds} s"
    whole, minutes = divmod(minutes, 60)
    return f"{whole:,} h {minutes} min"


def type_table(runs: Sequence[Recorded]) -> tuple[str, list[str], list[list[str]]]:
    """A caption, the header and the rows: of one run all scores of each type, of several their F1."""
    found = [run.per_type() for run in runs]
    kinds = {kind: scores["support"] for _, each in reversed(found) for kind, scores in each.items()}
    order = sorted(kinds, key=lambda kind: -np.nan_to_num(kinds[kind]))
    splits = sorted({split for split, _ in found if split})
    if len(runs) > 1:
        rows = [[kind, *(percent(each.get(kind, {}).get("f1", math.nan)) for _, each in found)] for kind in order]
        return f"F1 on {', '.join(splits)}", ["type", *(run.name for run in runs)], rows
    _, scores = found[0]
    rows = [[kind, *(percent(scores[kind][score]) for score in ("precision", "recall", "f1"))] for kind in order]
    rows = [[*row, _count(scores[row[0]]["support"])] for row in rows]
    return f"Scores on {', '.join(splits)}", ["type", "precision", "recall", "F1", "support"], rows


def _count(number: float) -> str:
    return f"{number:,.0f}" if math.isfinite(number) else NONE


def hour_bars(runs: Sequence[Recorded]) -> list[tuple[str, list[tuple[str, str, float]]]]:
    """For each run that has an account: its name, and (part, colour, percent of its node-hours)."""
    told = [(run.name, run.node_hours) for run in runs]
    return [
        (name, [(part, HOURS[part], 100 * each[part] / each["used"]) for part in PARTS])
        for name, each in told
        if each.get("used")
    ]


def hour_table(runs: Sequence[Recorded]) -> list[tuple[str, list[str], str]]:
    """For each part of node-hours: its name, a cell for each run, and what counts as such."""
    told = [run.node_hours for run in runs]
    if not any(told):
        return []

    def cell(each: dict[str, float], part: str) -> str:
        return f"{hours(each[part])} ({each[part] / each['used']:.1%})" if each.get("used") else NONE

    rows = [(part, [cell(each, part) for each in told], meaning) for part, meaning in PARTS.items()]
    total = [hours(each.get("used", math.nan)) for each in told]
    return [*rows, ("used", total, "all starts: nodes times the time from the start of the program to its end")]


def setting_table(runs: Sequence[Recorded]) -> list[list[str]]:
    """Dotted names and a value for each run: of several those that differ, of one all."""
    settings = [run.settings() for run in runs]
    names = dict.fromkeys(name for each in settings for name in each)
    rows = [[name, *(_value(each, name) for each in settings)] for name in names]
    return rows if len(runs) == 1 else [r for r in rows if len(set(r[1:])) > 1 and r[0] not in UNCOMPARED]


def _value(settings: dict[str, Any], name: str) -> str:
    value = settings.get(name)
    return NONE if value is None else clean(str(value).lower() if isinstance(value, bool) else value)
