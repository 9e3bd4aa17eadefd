"""Who sees what at step s: a pure function of (seed, epoch, position), the same on every rank, for any mesh.

Nothing here communicates and nothing is remembered from step to step, so a resumed run, on any number of ranks,
sees the sequences that the uninterrupted one would have seen.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpitrain.split import part

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class StepPlan:
    """What one optimisation step trains on.

    Attributes:
        step: 0-based, over the whole run.
        epoch: 0-based.
        micro_batches: int64 sequence numbers of each micro-batch, none of them empty.
        costs: estimated, of each micro-batch, any unit.
        num_labelled: labelled tokens of the whole batch, the divisor of the loss.
        num_tokens: tokens of the whole batch.
        num_padding: tokens of padding that are computed besides (`pad_lengths`).
    """

    step: int
    epoch: int
    micro_batches: tuple[Indices, ...]
    costs: tuple[float, ...]
    num_labelled: int
    num_tokens: int
    num_padding: int

    def share(self, replica: int, num_replicas: int, *, reproducible: bool = False) -> range:
        """The numbers of a replica's micro-batches."""
        count = len(self.micro_batches)
        # A tree is cut at powers of two: replicas without work are better than other sums.
        num_leaves = 1 << (count - 1).bit_length() if reproducible else count
        return range(count)[slice(*part(replica, num_leaves, num_replicas))]

    def replica_costs(self, num_replicas: int, *, reproducible: bool = False) -> NDArray[np.float64]:
        """Estimated, [num_replicas], any unit."""
        shares = (self.share(replica, num_replicas, reproducible=reproducible) for replica in range(num_replicas))
        return np.array([sum(self.costs[number] for number in share) for share in shares], np.float64)


def sequence_costs(lengths: Indices, hidden_size: int) -> NDArray[np.float64]:
    """Relative compute cost of each sequence: linear layers grow with its length n, attention with n squared.

    An encoder layer takes 24 h^2 + 4 n h operations per token (h = hidden_size), hence n (6 h + n).
    """
    return lengths * (6.0 * hidden_size + lengths)


class TrainPlan:
    """The order of the whole run."""

    def __init__(
        self,
        lengths: Indices,
        num_labelled: Indices,
        *,
        batch_size: int,
        micro_batches: int,
        hidden_size: int,
        seed: int,
    ) -> None:
        """Plan over sequences of `lengths` tokens [num_sequences] with `num_labelled` labels each."""
        self.lengths = lengths
        self.num_labelled = num_labelled
        self.costs = sequence_costs(lengths, hidden_size)
        self.batch_size = batch_size
        self.micro_batches = micro_batches
        self.seed = seed
        self.steps_per_epoch = -(-len(lengths) // batch_size)
        self._order: tuple[int, Indices] = (-1, np.empty(0, np.int64))

    def step(self, step: int) -> StepPlan:
        """The plan of step `step` (0-based)."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            self._order = (epoch, epoch_order(len(self.lengths), self.seed, epoch))
        batch = self._order[1][position * self.batch_size : (position + 1) * self.batch_size]
        micro_batches = tuple(cut_evenly(batch, self.costs[batch], self.micro_batches))
        sizes = [int(self.lengths[sequences].sum()) for sequences in micro_batches]
        return StepPlan(
            step=step,
            epoch=epoch,
            micro_batches=micro_batches,
            costs=tuple(float(self.costs[sequences].sum()) for sequences in micro_batches),
            num_labelled=int(self.num_labelled[batch].sum()),
            num_tokens=sum(sizes),
            num_padding=sum(round_number(size) - size for size in sizes),
        )


def epoch_order(num_sequences: int, seed: int, epoch: int) -> Indices:
    """All sequence numbers in the order of this epoch."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(num_sequences)


def cut_evenly(batch: Indices, costs: NDArray[np.float64], count: int) -> list[Indices]:
    """Cut a batch into at most `count` parts of nearly equal cost, none empty.

    Longest processing time first (Graham, "Bounds on multiprocessing timing anomalies", 1969, theorem 3): the
    largest part costs at most 4/3 of the optimum.
    """
    parts: list[list[int]] = [[] for _ in range(min(count, len(batch)))]
    loads = [(0.0, number) for number in range(len(parts))]
    for place in np.argsort(-costs, kind="stable"):
        load, number = heapq.heappop(loads)
        parts[number].append(int(place))
        heapq.heappush(loads, (load + float(costs[place]), number))
    return [batch[np.sort(places)] for places in parts]


def pad_lengths(lengths: Indices) -> Indices:
    """Lengths, then those of sequences of padding, for a `round_number` of tokens; none is longer than the others."""
    num_tokens, longest = int(lengths.sum()), int(lengths.max(initial=1))
    whole, rest = divmod(round_number(num_tokens) - num_tokens, longest)
    return np.concatenate([lengths, np.array([longest] * whole + [rest] * bool(rest), np.int64)])


def wanted_tokens(labelled: NDArray[np.bool_]) -> Indices:
    """Ascending numbers of the tokens with labels, and of some others for a `round_number`; there is at least one.

    Args:
        labelled: [num_tokens], itself a `round_number`, so that there are others enough.
    """
    num_labelled = int(labelled.sum())
    others = np.flatnonzero(~labelled)[: round_number(max(1, num_labelled)) - num_labelled]
    return np.sort(np.concatenate([np.flatnonzero(labelled), others]))


def round_number(count: int) -> int:
    """The next number with at most six significant binary digits, hence 1 % larger.

    oneDNN compiles its products anew for every number of rows, which takes up to a fifth of their time: so there are
    few numbers.
    """
    return count + -count % (1 << max(0, count.bit_length() - 6))


def evaluation_plan(lengths: Indices, sentences: Indices, tokens_per_micro_batch: int) -> list[Indices]:
    """Every sequence once, in micro-batches of similar lengths; the windows of a sentence stay together, in order.

    Args:
        lengths: tokens of each sequence.
        sentences: number of the sentence that each sequence belongs to, ascending.
        tokens_per_micro_batch: a micro-batch ends before it would hold more, unless one sentence alone does.
    """
    starts = np.flatnonzero(np.diff(sentences, prepend=-1))
    stops = np.append(starts[1:], len(sentences))
    sizes = np.add.reduceat(lengths, starts) if len(starts) else np.empty(0, np.int64)
    plan: list[Indices] = []
    current: list[Indices] = []
    room = tokens_per_micro_batch
    for group in np.argsort(-sizes, kind="stable"):
        if current and sizes[group] > room:
            plan.append(np.concatenate(current))
            current, room = [], tokens_per_micro_batch
        current.append(np.arange(starts[group], stops[group]))
        room -= int(sizes[group])
    return [*plan, np.concatenate(current)] if current else plan
