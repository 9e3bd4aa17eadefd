"""Files with a JSON object in each line, which a job may have died while writing: what is whole of them counts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpitrain.files import parse_json

Line = dict[str, Any]
MOST_STEPS = 1 << 40
HUGE = 1e30


def read_lines(file: Path) -> tuple[list[Line], int]:
    """The objects with a step in a file, of which there may be none, and the number of lines that are damaged.

    What stands behind the last newline was cut by a kill: it is damaged, even if it could be read.
    """
    *lines, rest = file.read_text(encoding="utf-8", errors="replace").split("\n") if file.exists() else [""]
    found = [line for line in map(read_line, filter(None, lines)) if line is not None]
    return found, sum(map(bool, lines)) - len(found) + bool(rest)


def read_line(text: str) -> Line | None:
    """The object of a line, if it is one and has a step; a log must not keep a run from going on."""
    try:
        line = parse_json(text)
        return line if 0 < step_of(line) < MOST_STEPS else None
    except (ValueError, KeyError, TypeError, OverflowError):
        return None


def step_of(line: Mapping[str, Any]) -> int:
    """The number of a line's step, from 1 on."""
    return int(line["step"])


def number(line: Mapping[str, Any], key: str) -> float:
    """A field that should be a number; NaN if it is none, or none that can be added up, or is not there."""
    value = line.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not -HUGE < value < HUGE:
        return math.nan
    return float(value)


def amount(line: Mapping[str, Any], key: str) -> float:
    """The same of what adds up: what is no number, or no sensible one, is 0."""
    value = number(line, key)
    return value if 0 <= value < 1e12 else 0.0
