import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from mpitrain.model import attention
from mpitrain.model.attention import PackedLayout, packed_attention
from mpitrain.model.dropout import KeyedDropout

HEADS, HIDDEN = 3, 12


def inputs(num_tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (num_tokens, HIDDEN)
    return [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(3)]


def one_by_one(query, key, value, lengths):
    """Each sequence on its own through torch's attention: the oracle."""

    def heads(x):
        return x.view(len(x), HEADS, -1).transpose(0, 1)

    parts = zip(*(x.split(list(lengths)) for x in (query, key, value)), strict=True)
    outputs = [scaled_dot_product_attention(*map(heads, part)).transpose(0, 1).reshape(-1, HIDDEN) for part in parts]
    return torch.cat(outputs)


@pytest.fixture(params=[1, 1 << 40], ids=["many groups", "one group"])
def worth(request, monkeypatch):
    monkeypatch.setitem(attention.GROUP_WORTH, "cpu", request.param)
    return request.param


@pytest.mark.parametrize("lengths", [[1], [5], [4, 4, 4], [1, 7, 2, 7, 1, 3], [9, 1, 1, 1]])
def test_packed_attention_and_its_gradients_equal_attention_of_each_sequence_alone(lengths, worth):
    packed, alone = inputs(sum(lengths)), inputs(sum(lengths))
    result = packed_attention(*packed, PackedLayout(lengths), HEADS, None, 0.1, 0)
    expected = one_by_one(*alone, lengths)
    torch.testing.assert_close(result.float(), expected.float(), atol=1e-6, rtol=1e-5)
    weights = torch.randn(expected.shape, dtype=torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad(result, packed, weights), torch.autograd.grad(expected, alone, weights), strict=True
    ):
        torch.testing.assert_close(ours.float(), theirs.float(), atol=1e-5, rtol=1e-5)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 40), max_size=12), st.sampled_from([1, 300, 1 << 40]))
def test_the_padded_rows_of_any_layout_are_distinct_and_hold_each_sequence_in_order(lengths, worth):
    patch = pytest.MonkeyPatch()
    patch.setitem(attention.GROUP_WORTH, "cpu", worth)
    groups, slots, sources = PackedLayout(lengths).padded(HEADS)
    patch.undo()
    rows = sum(group.num_sequences * HEADS * group.length for group in groups)
    assert len(set(slots.tolist())) == len(slots) == HEADS * sum(lengths)
    assert rows >= len(slots) and (len(slots) == 0 or int(slots.max()) < rows)
    for sequence in slots.view(-1, HEADS).split(lengths):
        assert (sequence.diff(dim=0) == 1).all()
    assert sources[slots].tolist() == list(range(len(slots)))
    owners = np.repeat(np.arange(len(lengths)), lengths)
    for group, part in zip(groups, sources.split([g.num_sequences * HEADS * g.length for g in groups]), strict=True):
        of_rows = part.view(group.num_sequences, HEADS, group.length)
        assert (of_rows % HEADS == torch.arange(HEADS)[:, None]).all()
        for sequence in owners[of_rows // HEADS].reshape(group.num_sequences, -1):
            assert len(set(sequence)) == 1  # padding repeats its own sequence


def test_similar_lengths_share_a_group_and_very_different_ones_do_not():
    assert len(PackedLayout([30, 28, 29, 31]).padded(HEADS).groups) == 1
    assert len(PackedLayout([500, 3, 4, 5, 3]).padded(HEADS).groups) == 2


def test_a_sequence_sees_neither_its_neighbours_nor_padding(worth):
    query, key, value = (x.detach() for x in inputs(9))
    layout = PackedLayout([2, 4, 3])
    before = packed_attention(query, key, value, layout, HEADS, None, 0.0, 0)
    for x in (query, key, value):
        x[2:6] = 1e6
    after = packed_attention(query, key, value, layout, HEADS, None, 0.0, 0)
    assert torch.equal(before[:2], after[:2]) and torch.equal(before[6:], after[6:])


def test_an_empty_layout_gives_no_rows_and_zero_gradients():
    packed = inputs(0)
    result = packed_attention(*packed, PackedLayout(np.array([], np.int64)), HEADS, KeyedDropout(0, 0, 0), 0.1, 0)
    result.sum().backward()
    assert result.shape == (0, HIDDEN) and all(x.grad is not None for x in packed)


def test_dropout_hangs_on_the_key_alone(worth):
    layout, packed = PackedLayout([6, 2, 6, 2]), inputs(16)
    first, again, other = (
        packed_attention(*packed, layout, HEADS, KeyedDropout(0, step, 0), 0.5, 0) for step in (4, 4, 5)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_each_group_has_a_dropout_mask_of_its_own(worth):
    drawn = []

    class Recorder(KeyedDropout):
        def mask(self, x, probability, site, part=0):
            drawn.append((site, part))
            return super().mask(x, probability, site, part)

    packed_attention(*inputs(16), PackedLayout([6, 2, 7, 1]), HEADS, Recorder(0, 0, 0), 0.5, 9)
    assert len(set(drawn)) == len(drawn) == (3 if worth == 1 else 1)


def test_positions_count_from_zero_in_each_sequence():
    layout = PackedLayout([3, 1, 2])
    assert layout.position_ids.tolist() == [0, 1, 2, 0, 0, 1]
    assert (layout.num_tokens, layout.num_sequences, layout.longest) == (6, 3, 3)
