"""What each rank has taken in this start: ranks.json, from what all tell each other in the vote of every step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Ranks:
    """Sums over the steps of a start."""

    def __init__(self, shape: tuple[int, int, int], nodes: Sequence[str]) -> None:
        """Of a mesh of data x pipe x tensor ranks on these nodes, which rank 0 alone knows."""
        self._shape, self.nodes = shape, nodes
        self._work, self._memory = np.zeros(shape).reshape(-1), np.zeros(shape).reshape(-1)
        self.num_steps = 0

    def add(self, work: NDArray[np.float64], memory: NDArray[np.float64]) -> None:
        """A step: seconds of own work and bytes at most so far, [ranks]."""
        self._work += work
        self._memory = memory
        self.num_steps += 1

    def bubble(self, passes: NDArray[np.float64], waits: NDArray[np.float64]) -> float:
        """Mean of all ranks of the seconds in which they have no pass to do, while a stage of their replica still has.

        Args:
            passes: seconds of passes, [ranks].
            waits: seconds of waiting between them, [ranks].
        """
        own, last = passes.reshape(self._shape), (passes + waits).reshape(self._shape).max(axis=1, keepdims=True)
        return float((last - own).mean())

    def document(self) -> list[dict[str, Any]]:
        """An object for each rank: where it is, `memory` in bytes at most, and `work`, seconds a step on average."""
        places = (list(map(int, place)) for place in np.ndindex(self._shape))
        work = (self._work / max(1, self.num_steps)).tolist()
        table = enumerate(zip(places, self.nodes, self._memory.tolist(), work, strict=True))
        return [
            {
                **{"rank": rank, "node": node, "replica": replica, "stage": stage, "tensor": tensor},
                **{"memory": int(memory), "work": seconds},
            }
            for rank, ((replica, stage, tensor), node, memory, seconds) in table
        ]
