"""A run as its directory tells of it, whoever has written it, and however its job has ended."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpitrain.config import flat
from mpitrain.errors import DataError
from mpitrain.files import parse_json
from mpitrain.observe.ledger import Start, node_hours, read_starts, see
from mpitrain.observe.lines import Line, number, read_lines, step_of
from mpitrain.observe.record import EVALUATIONS, EXIT, LEDGER, METRICS

Values = NDArray[np.float64]
SCORES = ("precision", "recall", "f1", "support")


@dataclass
class Recorded:
    """What is known of a run; what is missing is empty.

    Attributes:
        name: of its directory, distinct among those of a page.
        lines: of metrics.jsonl, each step once, in their order.
        evaluations: lines of evaluations.jsonl.
        notes: what its reader should know of the files.
    """

    path: Path
    name: str
    config: dict[str, Any]
    lines: list[Line]
    evaluations: list[Line]
    scores: dict[str, Any]
    exit: dict[str, Any]
    ranks: list[dict[str, Any]]
    starts: list[Start]
    notes: list[str] = field(default_factory=list)

    @property
    def steps(self) -> Values:
        """Numbers of the steps."""
        return np.array([step_of(line) for line in self.lines], np.float64)

    def column(self, key: str) -> Values:
        """A field of each step; NaN where it is not told."""
        return np.array([number(line, key) for line in self.lines], np.float64)

    def asked(self, *keys: str) -> Any:
        """A value in config.json, or None."""
        found: Any = self.config
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        return found

    def settings(self) -> dict[str, Any]:
        """The configuration by dotted names."""
        asked = self.asked("config")
        return flat(asked) if isinstance(asked, dict) else {}

    def dev(self) -> list[Line]:
        """Scores of dev, of each step whose weights were scored, in their order."""
        found = {number(line, "weights"): line for line in self.evaluations if line.get("split") == "dev"}
        return [found[step] for step in sorted(found) if math.isfinite(step) and math.isfinite(_f1(found[step]))]

    def best(self) -> Line | None:
        """The evaluation on dev with the highest F1."""
        return max(self.dev(), key=_f1, default=None)

    def f1(self, split: str) -> float:
        """Of the run's end on a split; NaN if it is not told."""
        found = self.scores.get(split)
        return _f1(found) if isinstance(found, dict) else math.nan

    def per_type(self) -> tuple[str, dict[str, dict[str, float]]]:
        """The split that was scored last, and SCORES of each type."""
        last = next((line for line in reversed(self.dev())), {})
        for split, scores in (("test", self.scores.get("test")), ("dev", self.scores.get("dev")), ("dev", last)):
            types = scores.get("per_type") if isinstance(scores, dict) else None
            if isinstance(types, dict) and types:
                told = ((clean(kind), each) for kind, each in types.items() if isinstance(each, dict))
                return split, {kind: {score: number(each, score) for score in SCORES} for kind, each in told}
        return "", {}

    @cached_property
    def node_hours(self) -> dict[str, float]:
        """See `observe.ledger`; empty if there is no account."""
        return node_hours(self.starts, self.lines, self.evaluations) if self.starts else {}

    def seconds(self) -> float:
        """From the begin of each start to its end, together."""
        return sum(start.seconds for start in self.starts) or float(np.nansum(self.column("seconds")))


def read_runs(paths: Sequence[Path]) -> list[Recorded]:
    """All of them, under names that tell them apart.

    Raises:
        DataError: one of them is no run.
    """
    runs = [read_run(path) for path in paths]
    for length in (2, 3):
        names = [run.name for run in runs]
        for run in runs:
            if names.count(run.name) > 1:
                run.name = clean("/".join(run.path.resolve().parts[-length:]))
    return runs


def read_run(path: Path) -> Recorded:
    """A run, damaged or under way.

    Raises:
        DataError: this is none.
    """
    if not (path / METRICS).is_file():
        raise DataError(f"{path}: holds no {METRICS}: give a run directory (--out of a training)")
    notes: list[str] = []
    try:
        lines, damaged = read_lines(path / METRICS)
        evaluations, unread = read_lines(path / EVALUATIONS)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    kept = once(lines)
    starts = read_starts(_text(path / LEDGER))
    see(starts, kept, evaluations)
    run = Recorded(
        path=path,
        name=clean(path.resolve().name),
        config=_table(path / "config.json", notes),
        lines=kept,
        evaluations=evaluations,
        scores=_table(path / "eval.json", notes, optional=True),
        exit=_table(path / EXIT, notes, optional=True),
        ranks=_ranks(path / "ranks.json"),
        starts=starts,
        notes=notes,
    )
    if unread:
        notes.append(f"{EVALUATIONS}: {unread} line(s) are damaged or cut; they are left out")
    for name, found in ((LEDGER, run.starts), ("ranks.json", run.ranks)):
        if not found and (path / name).exists():
            notes.append(f"{name}: is damaged; what it tells is left out")
    notes += _notes(run, damaged, len(lines) - len(kept))
    return run


def once(lines: Sequence[Line]) -> list[Line]:
    """Each step once: a run that goes on from an earlier step replaces what came behind it.

    A line whose step goes back without the next line going on from there is damaged, and left out.
    """
    kept: list[Line] = []
    for line, after in zip_longest(lines, lines[1:]):
        step = step_of(line)
        if kept and step <= step_of(kept[-1]):
            if after is not None and step_of(after) != step + 1:
                continue
            while kept and step_of(kept[-1]) >= step:
                kept.pop()
        kept.append(line)
    return kept


def _notes(run: Recorded, damaged: int, repeated: int) -> Iterator[str]:
    if damaged:
        yield f"{METRICS}: {damaged} line(s) are damaged or cut, as by a job that died while writing; they are left out"
    if repeated:
        yield f"{METRICS}: {repeated} line(s) are of steps that were done again later; the later ones are shown"
    if not run.lines:
        yield f"{METRICS}: tells of no step"
    skipped = int(np.count_nonzero(~np.isfinite(run.column("grad_norm"))))
    if skipped:
        yield f"{skipped} step(s) had a loss or gradient that is not finite, and changed no weight"
    if not (run.path / EXIT).exists():
        yield "there is no exit.json: the run is under way, or its job was killed"


def _f1(scores: Mapping[str, Any]) -> float:
    return number(scores, "f1_conlleval")


def _ranks(file: Path) -> list[dict[str, Any]]:
    try:
        found = parse_json(_text(file))
        return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []
    except ValueError:
        return []


def _table(file: Path, notes: list[str], *, optional: bool = False) -> dict[str, Any]:
    if optional and not file.exists():
        return {}
    try:
        found = parse_json(_text(file))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        notes.append(f"{file.name}: is missing or damaged")
    return found if isinstance(found, dict) else {}


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def clean(value: Any) -> str:
    """A text that every file can hold, on one line: what is no letter to Unicode or no character is marked as such."""
    text = " ".join(str(value).encode("utf-8", "replace").decode().split())
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
