"""Attention over packed sequences: [num_tokens, hidden], sequences end to end, no padding outside of this file.

Inside, sequences of similar length are padded to the longest of their group, heads apart, so that attention is a few
batched matrix products:

    packed   a0 a1 a2 a3 b0 c0 c1 c2                rows of [num_tokens * num_heads, head_size]
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
from torch.nn import functional as F  # noqa: N812 - its customary name

from mpitrain.model.dropout import KeyedDropout

# One more group costs as much as this many needless scores per head: measured on CPU, where times are flat from
# half of it to four times that; on GPU a dozen more launches per layer stand against scores that cost almost nothing.
GROUP_WORTH = {"cpu": 1 << 14, "cuda": 1 << 20}
# oneDNN compiles a kernel for every new shape, which takes longer than its product: lengths of groups are multiples
# of this, and their numbers of sequences mostly of twice that, so that the same few shapes come again and again.
LENGTH_UNIT = 4


class Group(NamedTuple):
    """Sequences that are padded to `length`; `mask` is bool [num_sequences, 1, 1, length], True at padding."""

    num_sequences: int
    length: int
    mask: Tensor | None


class Padding(NamedTuple):
    """How tokens of [num_tokens * num_heads, head_size] lie in the padded buffer.

    Attributes:
        groups: one after the other.
        slots: int64 [num_tokens * num_heads], the row of the buffer where each row of tokens goes.
        sources: int64 [rows of the buffer], the row of tokens that each comes from; padding repeats one of its own
            sequence, so that what is not finite stays there.
    """

    groups: list[Group]
    slots: Tensor
    sources: Tensor

    def split(self, num_heads: int, *buffers: Tensor) -> Iterator[tuple[Any, ...]]:
        """Each group with its part of each buffer, [num_sequences * num_heads, length, head_size]."""
        sizes = [group.num_sequences * num_heads * group.length for group in self.groups]
        for group, *parts in zip(self.groups, *(torch.split(buffer, sizes) for buffer in buffers), strict=True):
            yield group, *(part.view(-1, group.length, part.shape[1]) for part in parts)


# Of a group's weights and its number: 1 where they are kept and 0 elsewhere, and the scale; None if all are kept.
Draw = Callable[[Tensor, int], tuple[Tensor, float] | None]


class PackedLayout:
    """Where sequences begin and end in a packed micro-batch.

    Args:
        lengths: tokens of each sequence in packed order, int [num_sequences], each at least 1; may be empty.
        device: of the tensors made here.

    Attributes:
        lengths: int64 [num_sequences]; num_tokens: their sum; longest: their maximum (0 if there are none).
        position_ids: int64 [num_tokens], each token's place in its own sequence.
    """

    def __init__(self, lengths: ArrayLike, device: torch.device | str = "cpu") -> None:
        self.lengths: NDArray[np.int64] = np.asarray(lengths, np.int64).reshape(-1)
        assert (self.lengths > 0).all(), "a packed sequence holds at least one token"
        self.device = torch.device(device)
        self.num_sequences = len(self.lengths)
        self.num_tokens = int(self.lengths.sum())
        self.longest = int(self.lengths.max(initial=0))
        self._starts = np.cumsum(self.lengths) - self.lengths
        positions = np.arange(self.num_tokens) - np.repeat(self._starts, self.lengths)
        self.position_ids = torch.from_numpy(positions).to(self.device)
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
        # Both of the rows of the buffer, group by group: where they come from, and whether they are no padding.
        sources, filled = [np.empty(0, np.int64)], [np.empty(0, np.bool_)]
        for start, stop in _cut(descending, GROUP_WORTH.get(self.device.type, GROUP_WORTH["cuda"])):
            lengths = descending[start:stop, None]
            places = np.arange(-(-descending[start] // LENGTH_UNIT) * LENGTH_UNIT)
            tokens = self._starts[order[start:stop], None] + np.minimum(places, lengths - 1)
            sources.append((tokens[:, None] * num_heads + np.arange(num_heads)[:, None]).reshape(-1))
            filled.append(np.repeat(places < lengths, num_heads, axis=0).reshape(-1))
            mask = places >= lengths
            tensor = torch.from_numpy(mask[:, None, None, :]).to(self.device) if mask.any() else None
            groups.append(Group(stop - start, len(places), tensor))
        all_sources, rows = np.concatenate(sources), np.flatnonzero(np.concatenate(filled))
        slots = np.empty(self.num_tokens * num_heads, np.int64)
        slots[all_sources[rows]] = rows
        return Padding(groups, torch.from_numpy(slots).to(self.device), torch.from_numpy(all_sources).to(self.device))


def _cut(descending: NDArray[np.int64], worth: int) -> list[tuple[int, int]]:
    """Cut lengths, longest first, in groups; a cut is made where it saves at least `worth` scores per head."""
    cuts = [0]
    for place in [place for place in (1, 2, 4, *range(8, len(descending), 8)) if place < len(descending)]:
        if (len(descending) - place) * (descending[cuts[-1]] ** 2 - descending[place] ** 2) >= worth:
            cuts.append(place)
    return list(zip(cuts, [*cuts[1:], len(descending)], strict=True)) if len(descending) else []


class _PackedAttention(torch.autograd.Function):
    """See `packed_attention`; one node of the graph, where its many small operators would each be several."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, padding: Padding, num_heads: int, draw: Draw
    ) -> Tensor:
        head_size = query.shape[1] // num_heads
        q, k, v = (x.reshape(-1, head_size).index_select(0, padding.sources) for x in (query, key, value))
        context = torch.empty_like(q)
        kept: list[Tensor | None] = []
        ctx.dropout_scale = 1.0
        for number, (group, queries, keys, values, contexts) in enumerate(padding.split(num_heads, q, k, v, context)):
            scores = _product(queries, keys.transpose(1, 2), head_size**-0.5)
            if group.mask is not None:
                scores.view(-1, num_heads, *scores.shape[1:]).masked_fill_(group.mask, -torch.inf)
            softmax = F.softmax(scores, dim=-1, dtype=torch.float32)
            weights, keep = softmax.to(q.dtype), None
            if (mask := draw(weights, number)) is not None:
                keep, ctx.dropout_scale = mask
                weights = (weights * keep).mul_(ctx.dropout_scale)
            torch.bmm(weights, values, out=contexts)
            kept += [softmax, weights, keep]
        ctx.save_for_backward(q, k, v, *kept)
        ctx.padding, ctx.num_heads = padding, num_heads
        return context.index_select(0, padding.slots).view(query.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        slots, head_size = ctx.padding.slots, q.shape[1]
        # Zero where there is padding: nothing must come from what stands there.
        context = torch.zeros_like(q).index_copy_(0, slots, gradient.reshape(-1, head_size))
        sums = [torch.empty_like(q) for _ in range(3)]
        groups = ctx.padding.split(ctx.num_heads, q, k, v, context, *sums)
        for number, (_, queries, keys, values, contexts, for_queries, for_keys, for_values) in enumerate(groups):
            softmax, weights, keep = kept[3 * number : 3 * number + 3]
            torch.bmm(weights.transpose(1, 2), contexts, out=for_values)
            for_weights = torch.bmm(contexts, values.transpose(1, 2))
            if keep is not None:
                for_weights.mul_(keep).mul_(ctx.dropout_scale)
            for_scores = torch._softmax_backward_data(for_weights.float(), softmax, -1, torch.float32).to(q.dtype)
            _product(for_scores, keys, head_size**-0.5, out=for_queries)
            _product(for_scores.transpose(1, 2), queries, head_size**-0.5, out=for_keys)
        return (*(x.index_select(0, slots).view(gradient.shape) for x in sums), None, None, None)


def _product(a: Tensor, b: Tensor, factor: float, out: Tensor | None = None) -> Tensor:
    """Batched product of a and b times `factor`, which meets sums that are not rounded yet."""
    out = a.new_empty(a.shape[0], a.shape[1], b.shape[2]) if out is None else out
    return torch.baddbmm(out, a, b, beta=0, alpha=factor, out=out)


# torch has no types for `apply`.
_attention = cast("Callable[[Tensor, Tensor, Tensor, Padding, int, Draw], Tensor]", _PackedAttention.apply)


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PackedLayout,
    num_heads: int,
    dropout: KeyedDropout | None,
    probability: float,
    site: int,
) -> Tensor:
    """Scaled dot-product attention of every sequence with itself (Vaswani et al. 2017, section 3.2).

    Args:
        query: [num_tokens, hidden]; key, value: likewise, of one dtype. Scores are normalised in float32.
        layout: of the micro-batch.
        num_heads: divides hidden.
        dropout: of the attention probabilities; None in evaluation.
        probability: of dropping one of them.
        site: number of this place for `dropout`.

    Returns:
        [num_tokens, hidden], heads side by side.
    """

    def draw(weights: Tensor, group: int) -> tuple[Tensor, float] | None:
        return dropout.mask(weights, probability, site, group) if dropout is not None else None

    return _attention(query, key, value, layout.padded(num_heads), num_heads, draw)
