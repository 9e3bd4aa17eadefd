"""Where sequences lie in a packed micro-batch, [num_tokens, hidden], end to end, and how attention pads them.

Inside of attention, sequences of similar length are padded to the longest of their group, heads apart, so that it is a
few batched matrix products:

    packed   a0 a1 a2 a3 b0 c0 c1 c2                rows of head_size
    padded   a0 a1 a2 a3 / c0 c1 c2 -- / b0 -- ...  rows of one buffer; {a, c} is a group of its own, {b} another
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from mpitrain.model.dropout import Region

# One more group costs as much as this many needless scores of all heads together: on CPU some 150 us for the calls of
# its operators against 5 ns a score; on GPU nine more launches per layer stand against scores that cost almost nothing.
GROUP_WORTH = {"cpu": 1 << 15, "cuda": 1 << 23}
# oneDNN compiles a kernel for every new shape, which takes longer than its product: lengths of groups are multiples
# of this, and their numbers of sequences mostly of twice that, so that the same few shapes come again and again.
LENGTH_UNIT = 4


class Bin(NamedTuple):
    """Sequences that are padded to `length`.

    Attributes:
        length: a multiple of LENGTH_UNIT.
        num_rows: of a padded buffer, num_heads * num_sequences * length.
        mask: bool [num_sequences, 1, n], True at padding, for the last n places: all others are filled everywhere.
    """

    length: int
    num_rows: int
    mask: Tensor | None

    @property
    def num_scores(self) -> int:
        """Of all sequences of all heads."""
        return self.num_rows * self.length


class Padding(NamedTuple):
    """How heads of tokens, rows of head_size, lie in padded buffers.

    Attributes:
        groups: one after the other, heads in them, sequences in these.
        sources: int64 [3 * rows of a buffer], for the buffers of queries, keys and values the row of [num_tokens, 3,
            num_heads] that each of theirs is; padding repeats one of its own sequence, so that what is not finite
            stays there.
        slots: int64 [num_tokens * 3 * num_heads], where each of those rows is in the three buffers.
        context_slots: int64 [num_tokens * num_heads], the same for one buffer and rows of [num_tokens, num_heads].
    """

    groups: list[Bin]
    sources: Tensor
    slots: Tensor
    context_slots: Tensor

    @property
    def num_scores(self) -> int:
        """Of all groups."""
        return sum(group.num_scores for group in self.groups)

    def region(self, num_heads: int, first_head: int, num_all_heads: int) -> Region:
        """Where these heads' scores are among those of all heads."""
        parts, start = [], 0
        for group in self.groups:
            of_one_head = group.num_scores // num_heads
            parts.append((start + first_head * of_one_head, group.num_scores))
            start += num_all_heads * of_one_head
        return Region(start, parts)

    def each(self, *tensors: Tensor) -> Iterator[tuple[Any, ...]]:
        """Each group with its part of all scores (flat), [n, length, length], or of a buffer, [n, length, head_size].

        Here n is num_heads * num_sequences.
        """
        rows = [group.num_rows for group in self.groups]
        scores = [group.num_scores for group in self.groups]
        parts = [torch.split(x, scores if x.dim() == 1 else rows) for x in tensors]
        for group, *found in zip(self.groups, *parts, strict=True):
            yield group, *(x.view(-1, group.length, *(x.shape[1:] or [group.length])) for x in found)


class PackedLayout:
    """Where sequences begin and end in a packed micro-batch.

    Args:
        lengths: tokens of each sequence in packed order, int [num_sequences], each at least 1; may be empty.
        device: of the tensors made here.
        wanted: ascending numbers of the tokens whose logits are wanted; None: all.

    Attributes:
        lengths: int64 [num_sequences]; num_tokens: their sum; longest: their maximum (0 if there are none).
        position_ids: int64 [num_tokens], each token's place in its own sequence.
        wanted: int64 [num_wanted], or None if all tokens are wanted.
    """

    def __init__(
        self, lengths: ArrayLike, device: torch.device | str = "cpu", wanted: NDArray[np.int64] | None = None
    ) -> None:
        self.lengths: NDArray[np.int64] = np.asarray(lengths, np.int64).reshape(-1)
        assert (self.lengths > 0).all(), "a packed sequence holds at least one token"
        self.device = torch.device(device)
        self.num_sequences = len(self.lengths)
        self.num_tokens = int(self.lengths.sum())
        self.longest = int(self.lengths.max(initial=0))
        self._starts = np.cumsum(self.lengths) - self.lengths
        positions = np.arange(self.num_tokens) - np.repeat(self._starts, self.lengths)
        self.position_ids = self._tensor(positions)
        some = wanted is not None and len(wanted) < self.num_tokens
        self.wanted = self._tensor(np.asarray(wanted)) if some else None
        self.num_wanted = self.num_tokens if self.wanted is None else len(self.wanted)
        self._padded: dict[tuple[int, int], Padding] = {}

    def padded(self, num_heads: int, num_all_heads: int) -> Padding:
        """Where rows go when heads are apart, `num_heads` here; all heads of the model are grouped alike."""
        key = num_heads, num_all_heads
        if key not in self._padded:
            self._padded[key] = self._pad(*key)
        return self._padded[key]

    def _pad(self, num_heads: int, num_all_heads: int) -> Padding:
        order = np.argsort(-self.lengths, kind="stable")
        descending = self.lengths[order]
        groups = []
        # Of the rows of a buffer, group by group: where queries come from, and whether they are no padding.
        queries, filled = [np.empty(0, np.int64)], [np.empty(0, np.bool_)]
        worth = GROUP_WORTH.get(self.device.type, GROUP_WORTH["cuda"])
        for start, stop in _cut(descending, worth // num_all_heads):
            lengths = descending[start:stop, None]
            places = np.arange(int(_padded(descending[start])))
            tokens = self._starts[order[start:stop], None] + np.minimum(places, lengths - 1)
            queries.append((tokens * 3 * num_heads + np.arange(num_heads)[:, None, None]).reshape(-1))
            filled.append(np.tile((places < lengths).reshape(-1), num_heads))
            mask = (places >= lengths)[:, None, descending[stop - 1] :]
            groups.append(Bin(len(places), filled[-1].size, self._tensor(mask) if mask.any() else None))
        sources = np.concatenate(queries) + num_heads * np.arange(3)[:, None]
        rows = np.flatnonzero(np.tile(np.concatenate(filled), 3))
        slots = np.empty(self.num_tokens * 3 * num_heads, np.int64)
        slots[sources.reshape(-1)[rows]] = rows
        return Padding(
            groups,
            self._tensor(sources.reshape(-1)),
            self._tensor(slots),
            self._tensor(slots.reshape(-1, 3, num_heads)[:, 0].reshape(-1)),
        )

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self.device)


def _cut(descending: NDArray[np.int64], worth: int) -> list[tuple[int, int]]:
    """Bounds of the groups of lengths, longest first, that have the fewest scores per head plus `worth` for each group.

    By dynamic programming over the places where a cut may be: `least[k]` is the cost of all before the k-th.
    """
    if not (size := len(descending)):
        return []
    places = np.array([0, *(place for place in (1, 2, 4, *range(8, size, 8)) if place < size), size])
    squares = _padded(descending[places[:-1]]) ** 2
    least, came_from = np.zeros(len(places), np.int64), np.zeros(len(places), np.int64)
    for k in range(1, len(places)):
        costs = least[:k] + (places[k] - places[:k]) * squares[:k] + worth
        came_from[k] = costs.argmin()
        least[k] = costs.min()
    bounds, k = [], len(places) - 1
    while k:
        bounds.append((int(places[came_from[k]]), int(places[k])))
        k = int(came_from[k])
    return bounds[::-1]


def _padded(lengths: Any) -> Any:
    """Integers, rounded up to multiples of LENGTH_UNIT."""
    return -(-lengths // LENGTH_UNIT) * LENGTH_UNIT
