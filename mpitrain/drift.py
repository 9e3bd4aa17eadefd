"""Whether replicas still hold the same bits, and each rank what its last update has left.

Replicas get all weights anew at each update, so what differs between them is lost at the next one; but what the
gradients of that step were made of is not. An owner's master weights and moments nobody else has. So all are summed up
as integers when an update is done: any bit that changes alone changes the sum. The sums of weights are compared between
replicas, and all are compared with what is there when the next update is due.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch

from mpitrain.errors import MpitrainError, on_all_ranks
from mpitrain.model.bert import BertStage
from mpitrain.optim import ShardedAdamW
from mpitrain.runtime.agree import Comm, collect
from mpitrain.runtime.mesh import Mesh

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
Sums = dict[str, int]


def sum_of_bits(values: torch.Tensor) -> int:
    """Of a contiguous tensor of any dtype, as integers of its size."""
    return int(values.detach().reshape(-1).view(BITS[values.itemsize]).sum(dtype=torch.int64))


class DriftCheck:
    """Looks after every so many steps."""

    def __init__(self, mesh: Mesh, stage: BertStage, optimizer: ShardedAdamW, every: int) -> None:
        """Watch this rank's weights and what it owns of the optimizer; every 0 steps is never."""
        self._mesh, self._stage, self._optimizer, self._every = mesh, stage, optimizer, every
        self._step, self._sums = 0, Sums()

    def begin(self, step: int) -> None:
        """After the update of a step (counted from 1): compare replicas, if it is time, and remember (collective).

        Raises:
            MpitrainError: on all ranks, with parameter and ranks.
        """
        self._sums = Sums()
        if self._every == 0 or step % self._every:
            return
        self._step, self._sums = step, dict(self._all())
        weights = {name: self._sums[f"weight {name}"] for name, _ in self._stage.named_parameters()}
        shared = {name: weights[name] for name in self._stage.shared}
        found = _differences(self._mesh.data_axis, weights, self._world_ranks(self._mesh.data_axis))
        found += _differences(self._mesh.tensor_axis, shared, self._world_ranks(self._mesh.tensor_axis))
        raise_together(self._mesh.world, [f"after step {step} {each}" for each in found])

    def changed(self) -> list[str]:
        """What is no longer what the last update left, if that was remembered; before the next one."""
        if not self._sums:
            return []
        return [
            f"rank {self._mesh.world.rank}: {name} has changed since the update of step {self._step}"
            for name, found in self._all()
            if found != self._sums[name]
        ]

    def _all(self) -> Iterator[tuple[str, int]]:
        for name, parameter in self._stage.named_parameters():
            yield f"weight {name}", sum_of_bits(parameter)
        for piece in self._optimizer.slices():
            kind = "master weight" if piece.kind == "weight" else piece.kind
            yield f"{kind} {piece.name}, elements from {piece.start} on,", sum_of_bits(piece.values)

    def _world_ranks(self, axis: Comm) -> list[int]:
        return [int(rank) for rank in collect(axis, self._mesh.world.rank)]


def _differences(axis: Comm, sums: Sums, ranks: list[int]) -> list[str]:
    """Names whose sums are not the same on all of an axis, with the ranks that differ from most."""
    everyone: list[Sums] = collect(axis, sums)
    found = []
    for name in sums:
        most, _ = Counter(each[name] for each in everyone).most_common(1)[0]
        odd = [rank for rank, each in zip(ranks, everyone, strict=True) if each[name] != most]
        if odd:
            others = [rank for rank in ranks if rank not in odd]
            found.append(f"{name} differs: on ranks {_listed(odd)} from ranks {_listed(others)}")
    return found


def _listed(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))


def raise_together(world: Comm, mine: list[str]) -> None:
    """Raise what any rank has found, on all of them (collective).

    Raises:
        MpitrainError: if any rank has found something.
    """
    found = sorted({line for lines in collect(world, mine) for line in lines})
    if found:
        raise on_all_ranks(
            MpitrainError(
                "replicas or state have drifted (faulty memory, network or library?); checkpoints are of before:"
                + "".join(f"\n  {line}" for line in found)
            )
        )
