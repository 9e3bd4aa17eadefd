"""Attention over packed sequences: [num_tokens, hidden], sequences end to end, no padding outside of this file.

Inside, sequences of similar length are padded to the longest of their group, heads apart, so that attention is a few
batched matrix products:

    packed   a0 a1 a2 a3 b0 c0 c1 c2                rows of head_size
    padded   a0 a1 a2 a3 / c0 c1 c2 -- / b0 -- ...  rows of one buffer; {a, c} is a group of its own, {b} another

torch's fused attention would save memory, but it takes its dropout mask from its own generator, and its backward
pass is slow on CPUs for sequences as short as sentences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from mpitrain.model.dropout import KeyedDropout

# One more group costs as much as this many needless scores of all heads together: on CPU some 150 us for the calls of
# its operators against 5 ns a score; on GPU nine more launches per layer stand against scores that cost almost nothing.
GROUP_WORTH = {"cpu": 1 << 15, "cuda": 1 << 23}
# oneDNN compiles a kernel for every new shape, which takes longer than its product: lengths of groups are multiples
# of this, and their numbers of sequences mostly of twice that, so that the same few shapes come again and again.
LENGTH_UNIT = 4


class Group(NamedTuple):
    """Sequences that are padded to `length`.

    Attributes:
        length: a multiple of LENGTH_UNIT.
        num_rows: of a padded buffer, num_sequences * num_heads * length.
        mask: bool [num_sequences, 1, 1, n], True at padding, for the last n places: all others are filled everywhere.
    """

    length: int
    num_rows: int
    mask: Tensor | None

    @property
    def num_scores(self) -> int:
        """Of all heads of all sequences."""
        return self.num_rows * self.length


class Padding(NamedTuple):
    """How heads of tokens, rows of head_size, lie in padded buffers.

    Attributes:
        groups: one after the other, sequences in them, heads in these.
        sources: int64 [3 * rows of a buffer], for the buffers of queries, keys and values the row of [num_tokens, 3,
            num_heads] that each of theirs is; padding repeats one of its own sequence, so that what is not finite
            stays there.
        slots: int64 [num_tokens * 3 * num_heads], where each of those rows is in the three buffers.
        context_slots: int64 [num_tokens * num_heads], the same for one buffer and rows of [num_tokens, num_heads].
    """

    groups: list[Group]
    sources: Tensor
    slots: Tensor
    context_slots: Tensor

    @property
    def num_scores(self) -> int:
        """Of all groups."""
        return sum(group.num_scores for group in self.groups)

    def each(self, *tensors: Tensor) -> Iterator[tuple[Any, ...]]:
        """Each group with its part of all scores (flat), [n, length, length], or of a buffer, [n, length, head_size].

        Here n is num_sequences * num_heads.
        """
        rows = [group.num_rows for group in self.groups]
        scores = [group.num_scores for group in self.groups]
        parts = [torch.split(x, scores if x.dim() == 1 else rows) for x in tensors]
        for group, *found in zip(self.groups, *parts, strict=True):
            yield group, *(x.view(-1, group.length, *(x.shape[1:] or [group.length])) for x in found)


# Of weights: 1 where they are kept and 0 elsewhere, and the scale; None if all are kept.
Draw = Callable[[Tensor], tuple[Tensor, float] | None]


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
        self._padded: dict[int, Padding] = {}

    def padded(self, num_heads: int) -> Padding:
        """Where rows go when heads are apart."""
        if num_heads not in self._padded:
            self._padded[num_heads] = self._pad(num_heads)
        return self._padded[num_heads]

    def _pad(self, num_heads: int) -> Padding:
        order = np.argsort(-self.lengths, kind="stable")
        descending = self.lengths[order]
        groups = []
        # Of the rows of a buffer, group by group: where queries come from, and whether they are no padding.
        queries, filled = [np.empty(0, np.int64)], [np.empty(0, np.bool_)]
        worth = GROUP_WORTH.get(self.device.type, GROUP_WORTH["cuda"])
        for start, stop in _cut(descending, worth // num_heads):
            lengths = descending[start:stop, None]
            places = np.arange(int(_padded(descending[start])))
            tokens = self._starts[order[start:stop], None] + np.minimum(places, lengths - 1)
            queries.append((tokens[:, None] * 3 * num_heads + np.arange(num_heads)[:, None]).reshape(-1))
            filled.append(np.repeat(places < lengths, num_heads, axis=0).reshape(-1))
            mask = (places >= lengths)[:, None, None, descending[stop - 1] :]
            groups.append(Group(len(places), filled[-1].size, self._tensor(mask) if mask.any() else None))
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


class _PackedAttention(torch.autograd.Function):
    """See `packed_attention`; one node of the graph, where its many small operators would each be several.

    What goes element by element is done for the scores of all groups at once.
    """

    @staticmethod
    def forward(ctx: Any, projected: Tensor, padding: Padding, num_heads: int, draw: Draw) -> Tensor:
        head_size = projected.shape[1] // (3 * num_heads)
        rows = projected.reshape(-1, head_size).index_select(0, padding.sources).view(3, -1, head_size)
        scores, context = rows.new_empty(padding.num_scores), torch.empty_like(rows[0])
        for group, out, queries, keys in padding.each(scores, *rows[:2]):
            _product(queries, keys.transpose(1, 2), head_size**-0.5, out)
            if group.mask is not None:
                last = out.view(-1, num_heads, *out.shape[1:])[..., -group.mask.shape[-1] :]
                last.masked_fill_(group.mask, -torch.inf)
        softmax = scores.float()
        for _, part in padding.each(softmax):
            torch._softmax(part, -1, False, out=part)  # torch.softmax would make one more copy
        weights, keep, ctx.dropout_scale = softmax.to(rows.dtype), None, 1.0
        if (mask := draw(weights)) is not None:
            keep, ctx.dropout_scale = mask
            weights = weights * keep
        for _, part, values, out in padding.each(weights, rows[2], context):
            _product(part, values, ctx.dropout_scale, out)
        ctx.save_for_backward(rows, softmax, weights, keep)
        ctx.padding = padding
        return context.index_select(0, padding.context_slots).view(len(projected), num_heads * head_size)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, softmax, weights, keep = ctx.saved_tensors
        padding, head_size = ctx.padding, rows.shape[2]
        # Zero where there is padding: nothing must come from what stands there.
        context = torch.zeros_like(rows[0])
        context.index_copy_(0, padding.context_slots, gradient.reshape(-1, head_size))
        sums, for_weights = torch.empty_like(rows), torch.empty_like(weights)
        for _, part, out, contexts, values, for_values in padding.each(weights, for_weights, context, rows[2], sums[2]):
            _product(part.transpose(1, 2), contexts, ctx.dropout_scale, for_values)
            _product(contexts, values.transpose(1, 2), ctx.dropout_scale, out)
        if keep is not None:
            for_weights.mul_(keep)
        for_scores = for_weights.float()
        for _, part, of_softmax in padding.each(for_scores, softmax):
            torch._softmax_backward_data(part, of_softmax, -1, torch.float32, grad_input=part)
        for_scores = for_scores.to(rows.dtype)
        for _, part, queries, keys, for_queries, for_keys in padding.each(for_scores, *rows[:2], *sums[:2]):
            _product(part, keys, head_size**-0.5, for_queries)
            _product(part.transpose(1, 2), queries, head_size**-0.5, for_keys)
        projected = sums.view(-1, head_size).index_select(0, padding.slots)
        return projected.view(len(gradient), 3 * gradient.shape[1]), None, None, None


def _product(a: Tensor, b: Tensor, factor: float, out: Tensor) -> None:
    """Batched product of a and b times `factor`, which meets sums that are not rounded yet."""
    torch.baddbmm(out, a, b, beta=0, alpha=factor, out=out)


# torch has no types for `apply`.
_attention = cast("Callable[[Tensor, Padding, int, Draw], Tensor]", _PackedAttention.apply)


def packed_attention(
    projected: Tensor,
    layout: PackedLayout,
    num_heads: int,
    dropout: KeyedDropout | None,
    probability: float,
    site: int,
) -> Tensor:
    """Scaled dot-product attention of every sequence with itself (Vaswani et al. 2017, section 3.2).

    Args:
        projected: [num_tokens, 3 * hidden], queries, keys and values side by side, heads side by side in each. Scores
            are normalised in float32.
        layout: of the micro-batch.
        num_heads: divides hidden.
        dropout: of the attention probabilities; None in evaluation.
        probability: of dropping one of them.
        site: number of this place for `dropout`.

    Returns:
        [num_tokens, hidden], heads side by side.
    """

    def draw(weights: Tensor) -> tuple[Tensor, float] | None:
        return dropout.mask(weights, probability, site) if dropout is not None else None

    return _attention(projected, layout.padded(num_heads), num_heads, draw)
