"""Which cores ranks may use, and how many each rank has of those that it shares with others of its node."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from fractions import Fraction
from itertools import chain, groupby
from pathlib import Path

Masks = Sequence[Sequence[int]]  # the cores that each rank of a node is bound to
SIBLINGS = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


def shares(masks: Masks) -> list[Fraction]:
    """Cores that each rank has if ranks share a core evenly."""
    held = Counter(chain(*masks))
    return [sum((Fraction(1, held[core]) for core in mask), start=Fraction(0)) for mask in masks]


def are_crowded(masks: Masks) -> bool:
    """Whether some ranks are more than the cores they have."""
    return len(masks) > len(set(chain(*masks))) or any(masks.count(mask) > len(mask) for mask in masks)


def ranges(numbers: Sequence[int]) -> str:
    """0-3, 8: runs of ascending numbers."""
    runs = [list(run) for _, run in groupby(numbers, lambda number: number - numbers.index(number))]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def usable_cores() -> list[list[int]]:
    """All cores that this job may use on this node, whatever this process is bound to; of each, its hardware threads.

    A thread of its own asks for all cores and is given those of the job's control group (sched_setaffinity(2)).
    """
    with ThreadPoolExecutor(1) as other:
        usable = other.submit(_unbound).result()
    return [[thread for thread in core if thread in usable] for core in sorted(set(map(_core_of, usable)))]


def _core_of(thread: int) -> tuple[int, ...]:
    """The hardware threads of the core that this one is of; this one alone where the system does not tell."""
    with suppress(OSError):
        return read_ranges(Path(SIBLINGS.format(thread)).read_text())
    return (thread,)


def read_ranges(text: str) -> tuple[int, ...]:
    """The numbers of runs such as 0-3,8."""
    runs = [run.split("-") for run in text.strip().split(",")]
    return tuple(chain(*(range(int(run[0]), int(run[-1]) + 1) for run in runs)))


def _unbound() -> list[int]:
    with suppress(OSError):
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
    return sorted(os.sched_getaffinity(0))
