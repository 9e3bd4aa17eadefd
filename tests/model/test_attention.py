from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from mpitrain.model import attention
from mpitrain.model import layout as layouts
from mpitrain.model.attention import packed_attention
from mpitrain.model.dropout import KeyedDropout
from mpitrain.model.layout import PackedLayout

HEADS, HIDDEN = 3, 12


def projections(num_tokens, seed=0):
    """Queries, keys and values side by side."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, 3 * HIDDEN, generator=generator, dtype=torch.float64, requires_grad=True)


def one_by_one(projected, lengths):
    """Each sequence on its own through torch's attention: the oracle."""

    def heads(x):
        return x.view(len(x), HEADS, -1).transpose(0, 1)

    parts = zip(*(x.split(list(lengths)) for x in projected.split(HIDDEN, dim=1)), strict=True)
    outputs = [scaled_dot_product_attention(*map(heads, part)).transpose(0, 1).reshape(-1, HIDDEN) for part in parts]
    return torch.cat(outputs)


@pytest.fixture(params=[1, 1 << 40], ids=["many groups", "one group"])
def worth(request, monkeypatch):
    monkeypatch.setitem(layouts.GROUP_WORTH, "cpu", request.param)
    return request.param


@pytest.mark.parametrize("lengths", [[1], [5], [4, 4, 4], [1, 7, 2, 7, 1, 3], [9, 1, 1, 1]])
def test_packed_attention_and_its_gradients_equal_attention_of_each_sequence_alone(lengths, worth):
    packed, alone = projections(sum(lengths)), projections(sum(lengths))
    result = packed_attention(packed, PackedLayout(lengths), HEADS, None, 0.1, 0)
    expected = one_by_one(alone, lengths)
    torch.testing.assert_close(result.float(), expected.float(), atol=1e-6, rtol=1e-5)
    weights = torch.randn(expected.shape, dtype=torch.float64)
    (ours,), (theirs,) = torch.autograd.grad(result, packed, weights), torch.autograd.grad(expected, alone, weights)
    torch.testing.assert_close(ours.float(), theirs.float(), atol=1e-5, rtol=1e-5)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 40), max_size=12), st.sampled_from([1, 300, 1 << 40]))
def test_the_padded_rows_of_any_layout_are_distinct_and_hold_each_sequence_in_order(lengths, worth):
    patch = pytest.MonkeyPatch()
    patch.setitem(layouts.GROUP_WORTH, "cpu", worth)
    padding = PackedLayout(lengths).padded(HEADS, HEADS)
    patch.undo()
    rows, slots = sum(group.num_rows for group in padding.groups), padding.slots.view(-1, 3, HEADS)
    assert len(padding.sources) == 3 * rows and len(set(padding.slots.tolist())) == 3 * HEADS * sum(lengths)
    assert padding.sources[padding.slots].tolist() == list(range(len(padding.slots)))
    assert torch.equal(slots // max(rows, 1), torch.arange(3)[None, :, None].expand(slots.shape))
    assert torch.equal(padding.context_slots.view(-1, HEADS), slots[:, 0])
    for sequence in slots.split(lengths):
        assert (sequence.diff(dim=0) == 1).all()
    owners = np.repeat(np.arange(len(lengths)), lengths)
    for buffer in padding.sources.view(3, rows):
        for _, part in padding.each(buffer[:, None]):
            of_rows = part.view(HEADS, -1, part.shape[1])
            assert (of_rows % HEADS == torch.arange(HEADS)[:, None, None]).all()
            for sequence in owners[of_rows // (3 * HEADS)].reshape(-1, part.shape[1]):
                assert len(set(sequence)) == 1  # padding repeats its own sequence


def test_similar_lengths_share_a_group_and_very_different_ones_do_not():
    assert len(PackedLayout([30, 28, 29, 31]).padded(HEADS, HEADS).groups) == 1
    assert len(PackedLayout([500, 3, 4, 5, 3]).padded(HEADS, HEADS).groups) == 2


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=30), st.integers(0, 20000))
def test_no_other_cut_costs_less(lengths, worth):
    descending = np.sort(lengths)[::-1]
    places = [place for place in (1, 2, 4, 8, 16, 24) if place < len(lengths)]

    def cost(bounds):
        return sum((stop - start) * layouts._padded(descending[start]) ** 2 + worth for start, stop in bounds)

    choices = (cuts for count in range(len(places) + 1) for cuts in combinations(places, count))
    least = min(cost(pairwise([0, *cuts, len(lengths)])) for cuts in choices)
    found = layouts._cut(descending, worth)
    assert list(found) == list(pairwise([0, *(stop for _, stop in found)])) and found[-1][1] == len(lengths)
    assert cost(found) == least


def test_a_sequence_sees_neither_its_neighbours_nor_padding(worth):
    projected = projections(9).detach()
    layout = PackedLayout([2, 4, 3])
    before = packed_attention(projected, layout, HEADS, None, 0.0, 0)
    projected[2:6] = 1e6
    after = packed_attention(projected, layout, HEADS, None, 0.0, 0)
    assert torch.equal(before[:2], after[:2]) and torch.equal(before[6:], after[6:])


def test_an_empty_layout_gives_no_rows_and_zero_gradients():
    packed = projections(0)
    result = packed_attention(packed, PackedLayout(np.array([], np.int64)), HEADS, KeyedDropout(0, 0, 0), 0.1, 0)
    result.sum().backward()
    assert result.shape == (0, HIDDEN) and packed.grad is not None


def test_dropout_hangs_on_the_key_alone(worth):
    layout, packed = PackedLayout([6, 2, 6, 2]), projections(16)
    first, again, other = (
        packed_attention(packed, layout, HEADS, KeyedDropout(0, step, 0), 0.5, 0) for step in (4, 4, 5)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def dense(projected, length, dropout, probability, site):
    """Attention of sequences of one length by plain operators, with dropout of the probabilities: the oracle."""
    query, key, value = projected.view(-1, length, 3, HEADS, HIDDEN // HEADS).permute(2, 3, 0, 1, 4)
    weights = (query @ key.transpose(-1, -2) / (HIDDEN // HEADS) ** 0.5).softmax(-1)
    return (dropout(weights, probability, site) @ value).permute(1, 2, 0, 3).reshape(-1, HIDDEN)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_dropout_meets_probabilities_and_scales_them(dtype, tolerance):
    packed = projections(16).detach().to(dtype).requires_grad_()
    exact = packed.detach().double().requires_grad_()
    result = packed_attention(packed, PackedLayout([8, 8]), HEADS, KeyedDropout(0, 0, 0), 0.3, 5)
    expected = dense(exact, 8, KeyedDropout(0, 0, 0), 0.3, 5)
    weights = torch.randn(16, HIDDEN, generator=torch.Generator().manual_seed(1))
    (ours,) = torch.autograd.grad(result, packed, weights.to(dtype))
    (theirs,) = torch.autograd.grad(expected, exact, weights.to(dtype).double())
    for found, wanted in ((result, expected), (ours, theirs)):
        assert float((found.detach().double() - wanted.detach()).norm() / wanted.detach().norm()) < tolerance


def test_dropout_drops_the_same_in_both_directions(worth):
    layout, packed = PackedLayout([3, 1, 5, 2]), projections(11)
    weights, direction = projections(11, seed=1)[:, :HIDDEN].detach(), projections(11, seed=2).detach()

    def output(x):
        return (packed_attention(x, layout, HEADS, KeyedDropout(0, 0, 0), 0.3, 5) * weights).sum()

    slope = (torch.autograd.grad(output(packed), packed)[0] * direction).sum()
    ahead, behind = (output(packed.detach() + step * direction) for step in (1e-2, -1e-2))
    torch.testing.assert_close(slope, (ahead - behind) / 2e-2, rtol=1e-3, atol=1e-3)


def test_a_product_is_rounded_once():
    a, b = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    out = torch.empty(1, 16, 16, dtype=torch.bfloat16)
    attention._product(a, b, 1 / 0.9, out)
    assert torch.equal(out, (a.double() @ b.double() / 0.9).bfloat16())


def test_positions_count_from_zero_in_each_sequence():
    layout = PackedLayout([3, 1, 2])
    assert layout.position_ids.tolist() == [0, 1, 2, 0, 0, 1]
    assert (layout.num_tokens, layout.num_sequences, layout.longest) == (6, 3, 3)
