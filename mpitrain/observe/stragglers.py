"""Who holds up the others: each rank's own work, step by step, beside that of ranks which do the same.

A step takes as long on every rank, as all wait for the slowest one. What tells is the time that each rank spends on
work of its own, waiting left out, by the estimated cost of that work.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

WINDOW = 20  # steps that are looked at
OFTEN, SELDOM = 0.8, 0.2  # shares of the window in which a rank is slow when it is named, and when it no longer is
SLOW = 1.5  # times as long as others would take
LEAST = 2e-3  # seconds a step that are worth a word
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Straggler:
    """A slow rank; seconds of a step, medians.

    Attributes:
        work: of its own.
        share: that others would take for it.
        waiting: of the mean of all others.
    """

    rank: int
    work: float
    share: float
    waiting: float


class Stragglers:
    """Looks at every step; a rank is named once, and again after it has kept up in between."""

    def __init__(self, shape: tuple[int, int, int], stage_costs: Sequence[float]) -> None:
        """Watch a mesh of data x pipe x tensor ranks, whose stages have these costs, in any unit.

        Peers are the ranks of a stage; where each stage is a single rank, all ranks are.
        """
        self._shape, self._stage_costs = shape, np.array(stage_costs)
        self._axes = (0, 1, 2) if shape[0] * shape[2] == 1 else (0, 2)
        self._steps: deque[tuple[Array, Array, float]] = deque(maxlen=WINDOW)  # work, share, seconds
        self._named: set[int] = set()

    def add(self, work: Array, replica_costs: Array, seconds: float) -> list[Straggler]:
        """Those that are found after one more step.

        Args:
            work: [ranks], seconds of own work.
            replica_costs: [data], estimated, of what each replica has done, in any unit.
            seconds: of the step.
        """
        costs = replica_costs[:, None, None] * self._stage_costs[None, :, None]
        costs = np.broadcast_to(costs, self._shape)
        pace = np.divide(work.reshape(self._shape), costs, out=np.full(self._shape, np.nan), where=costs > 0)
        usual = np.nanquantile(pace, 0.5, axis=self._axes, keepdims=True, method="lower")
        self._steps.append((work, (usual * costs).reshape(-1), seconds))
        return self._find() if len(self._steps) == WINDOW else []

    def _find(self) -> list[Straggler]:
        work, share = (np.array([step[number] for step in self._steps]) for number in (0, 1))
        seconds = np.array([step[2] for step in self._steps])[:, None]
        often = ((work > SLOW * share) & (work > share + LEAST)).mean(axis=0)
        self._named -= set(np.flatnonzero(often <= SELDOM).tolist())
        found = [rank for rank in np.flatnonzero(often >= OFTEN).tolist() if rank not in self._named]
        self._named.update(found)
        others = np.isin(np.arange(work.shape[1]), found, invert=True)
        waiting = float(np.median((seconds - work)[:, others].mean(axis=1))) if others.any() else 0.0
        mine, usual = np.median(work, axis=0), np.median(share, axis=0)
        return [Straggler(rank, float(mine[rank]), float(usual[rank]), waiting) for rank in found]
