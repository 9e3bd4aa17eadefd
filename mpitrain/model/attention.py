"""Attention over packed sequences: [num_tokens, hidden], sequences end to end, no padding outside of this file.

Inside, sequences of similar length are padded to the longest of their group, heads apart, so that attention is a few
batched matrix products:

    packed   a0 a1 a2 b0 c0 c1         rows of [num_tokens * num_heads, head_size]
    padded   a0 a1 a2 / c0 c1 -- / b0  rows of one buffer; {a, c} is a group of length 3, {b} one of length 1

torch's fused attention would save memory, but it takes its dropout mask from its own generator, and its backward
pass is slow on CPUs for sequences as short as sentences.
"""

from __future__ import annotations

from collections.abc import Callable
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


class Group(NamedTuple):
    """Sequences that are padded to one length; `mask` is bool [num_sequences, 1, 1, longest], True at padding."""

    num_sequences: int
    longest: int
    mask: Tensor | None


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
        starts = np.cumsum(self.lengths) - self.lengths
        self._positions = np.arange(self.num_tokens) - np.repeat(starts, self.lengths)
        self.position_ids = torch.from_numpy(self._positions).to(self.device)
        self._padded: dict[int, tuple[list[Group], Tensor]] = {}

    def padded(self, num_heads: int) -> tuple[list[Group], Tensor]:
        """The groups, and for each row of [num_tokens * num_heads, head_size] its row in the padded buffer."""
        if num_heads not in self._padded:
            self._padded[num_heads] = self._pad(num_heads)
        return self._padded[num_heads]

    def _pad(self, num_heads: int) -> tuple[list[Group], Tensor]:
        order = np.argsort(-self.lengths, kind="stable")
        descending = self.lengths[order]
        bases, strides = np.empty_like(self.lengths), np.empty_like(self.lengths)
        groups, base = [], 0
        for start, stop in _cut(descending, GROUP_WORTH.get(self.device.type, GROUP_WORTH["cuda"])):
            longest, members = int(descending[start]), order[start:stop]
            bases[members] = base + np.arange(stop - start) * (num_heads * longest)
            strides[members] = longest
            base += (stop - start) * num_heads * longest
            mask = np.arange(longest) >= descending[start:stop, None]
            tensor = torch.from_numpy(mask[:, None, None, :]).to(self.device) if mask.any() else None
            groups.append(Group(stop - start, longest, tensor))
        first_heads = np.repeat(bases, self.lengths) + self._positions
        slots = first_heads[:, None] + np.repeat(strides, self.lengths)[:, None] * np.arange(num_heads)
        return groups, torch.from_numpy(slots.reshape(-1)).to(self.device)


def _cut(descending: NDArray[np.int64], worth: int) -> list[tuple[int, int]]:
    """Cut lengths, longest first, in groups; a cut is made where it saves at least `worth` scores per head."""
    cuts = [0]
    for place in range(1, len(descending)):
        if (len(descending) - place) * (descending[cuts[-1]] ** 2 - descending[place] ** 2) >= worth:
            cuts.append(place)
    return list(zip(cuts, [*cuts[1:], len(descending)], strict=True)) if len(descending) else []


class _Scatter(torch.autograd.Function):
    """Rows of `x` to the rows `slots` of a zero buffer; backward is `_Gather`, with no additions as slots differ."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slots: Tensor, num_rows: int) -> Tensor:
        ctx.save_for_backward(slots)
        return x.new_zeros(num_rows, x.shape[1]).index_copy_(0, slots, x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.index_select(0, ctx.saved_tensors[0]), None, None


class _Gather(torch.autograd.Function):
    """The rows `slots` of a buffer; backward is `_Scatter`."""

    @staticmethod
    def forward(ctx: Any, buffer: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        ctx.num_rows = buffer.shape[0]
        return buffer.index_select(0, slots)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        zeros = gradient.new_zeros(ctx.num_rows, gradient.shape[1])
        return zeros.index_copy_(0, ctx.saved_tensors[0], gradient), None


# torch has no types for `apply`.
_scatter = cast("Callable[[Tensor, Tensor, int], Tensor]", _Scatter.apply)
_gather = cast("Callable[[Tensor, Tensor], Tensor]", _Gather.apply)


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
    hidden = query.shape[1]
    if layout.num_tokens == 0:
        return query + key + value  # no rows; the sum keeps all three in the graph
    groups, slots = layout.padded(num_heads)
    sizes = [group.num_sequences * num_heads * group.longest for group in groups]

    def pad(x: Tensor) -> tuple[Tensor, ...]:
        return torch.split(_scatter(x.reshape(-1, hidden // num_heads), slots, sum(sizes)), sizes)

    contexts = []
    for part, (group, *rows) in enumerate(zip(groups, pad(query), pad(key), pad(value), strict=True)):
        shape = (group.num_sequences * num_heads, group.longest, hidden // num_heads)
        queries, keys, values = (x.view(shape) for x in rows)
        weights = _probabilities(queries, keys, group, num_heads)
        if dropout is not None:
            weights = dropout(weights, probability, site, part)
        contexts.append(torch.bmm(weights, values).view(-1, hidden // num_heads))
    return _gather(torch.cat(contexts), slots).view(-1, hidden)


def _probabilities(queries: Tensor, keys: Tensor, group: Group, num_heads: int) -> Tensor:
    """[num_sequences * num_heads, longest, longest], in the dtype of the queries; padding has probability 0."""
    scores = torch.bmm(queries * queries.shape[-1] ** -0.5, keys.transpose(1, 2))
    if group.mask is not None:
        apart = scores.view(group.num_sequences, num_heads, group.longest, group.longest)
        scores = apart.masked_fill_(group.mask, -torch.inf).view_as(scores)
    return F.softmax(scores, dim=-1, dtype=torch.float32).to(queries.dtype)
