"""Attention over packed sequences: [num_tokens, hidden], sequences end to end, padded inside (`layout.py`).

torch's fused attention would save memory, but it takes its dropout mask from its own generator, and its backward
pass is slow on CPUs for sequences as short as sentences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from mpitrain.model.dropout import KeyedDropout
from mpitrain.model.layout import PackedLayout, Padding

# Of weights: 1 where they are kept and 0 elsewhere, and the scale; None if all are kept.
Draw = Callable[[Tensor], tuple[Tensor, float] | None]


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
                last = out.view(num_heads, -1, *out.shape[1:])[..., -group.mask.shape[-1] :]
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
    first_head: int = 0,
    num_all_heads: int | None = None,
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
        first_head: number of the first of these heads among all, for `dropout`.
        num_all_heads: of the model, if these are not all.

    Returns:
        [num_tokens, hidden], heads side by side.
    """
    num_all_heads = num_all_heads or num_heads
    padding = layout.padded(num_heads, num_all_heads)

    def draw(weights: Tensor) -> tuple[Tensor, float] | None:
        if dropout is None:
            return None
        region = padding.region(num_heads, first_head, num_all_heads) if num_heads < num_all_heads else None
        return dropout.mask(weights, probability, site, region)

    return _attention(projected, padding, num_heads, draw)
