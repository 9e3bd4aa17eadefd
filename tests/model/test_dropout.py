import pytest
import torch

from mpitrain.model.dropout import KeyedDropout, Region


def kept(dropout, shape=(64, 33), probability=0.25, site=3, dtype=torch.float32):
    return dropout.mask(torch.ones(shape, dtype=dtype), probability, site)[0] == 1


def test_the_same_key_drops_the_same_elements_whatever_was_drawn_before():
    first = kept(KeyedDropout(1, 2, 3))
    other = KeyedDropout(1, 2, 3)
    kept(other, site=9)
    torch.rand(5)
    assert torch.equal(first, kept(other))


@pytest.mark.parametrize("key", [(2, 2, 3), (1, 3, 3), (1, 2, 4)])
def test_another_seed_step_or_micro_batch_drops_others(key):
    assert not torch.equal(kept(KeyedDropout(1, 2, 3)), kept(KeyedDropout(*key)))


@pytest.mark.parametrize("parts", [[(0, 7)], [(5, 14)], [(1, 1), (2, 3), (9, 11)], [(3, 0)], []])
def test_parts_of_a_tensor_drop_what_the_whole_does(parts):
    whole = kept(KeyedDropout(1, 2, 3), (20,))
    own = torch.cat([torch.empty(0, dtype=torch.bool), *(whole[start : start + count] for start, count in parts)])
    mask, _ = KeyedDropout(1, 2, 3).mask(torch.ones(len(own)), 0.25, 3, Region(20, parts))
    assert torch.equal(mask == 1, own)


def test_another_site_drops_others():
    assert not torch.equal(kept(KeyedDropout(1, 2, 3)), kept(KeyedDropout(1, 2, 3), site=4))


def test_the_mask_does_not_depend_on_the_dtype():
    assert torch.equal(kept(KeyedDropout(0, 0, 0)), kept(KeyedDropout(0, 0, 0), dtype=torch.bfloat16))


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_the_share_dropped_is_the_probability_and_the_mean_is_kept(probability):
    x = KeyedDropout(0, 0, 0)(torch.ones(1000, 1000), probability, 0)
    assert (x == 0).double().mean().item() == pytest.approx(probability, abs=0.002)  # 4 standard deviations
    assert x.double().mean().item() == pytest.approx(1, abs=0.013)
    assert x.max().item() == pytest.approx(1 / (1 - probability), rel=2e-4)


def test_neighbouring_elements_and_rows_are_dropped_independently():
    mask = kept(KeyedDropout(0, 0, 0), (1000, 1000), 0.5).double() - 0.5
    for shift, axis in [(1, 0), (1, 1), (2, 1), (3, 1), (4, 1)]:
        assert abs((mask * mask.roll(shift, axis)).mean().item()) < 0.25 * 4e-3


def test_the_gradient_is_dropped_and_scaled_alike():
    x = torch.randn(7, 5, requires_grad=True)
    y = KeyedDropout(0, 0, 0)(x, 0.5, 0)
    y.sum().backward()
    torch.testing.assert_close(x.grad * x, y)


@pytest.mark.parametrize("probability", [0.0, 0.5])
def test_what_is_added_is_neither_dropped_nor_scaled(probability):
    x, residual = (torch.randn(7, 5, requires_grad=True) for _ in range(2))
    weights = torch.randn(7, 5)
    found = KeyedDropout(0, 0, 0).add(x, probability, 3, residual)
    expected = KeyedDropout(0, 0, 0)(x, probability, 3) + residual
    torch.testing.assert_close(found, expected)
    theirs = torch.autograd.grad(expected, (x, residual), weights)
    torch.testing.assert_close(torch.autograd.grad(found, (x, residual), weights), theirs)


def test_a_sum_is_rounded_once():
    x, residual = torch.randn(2, 100, 37, generator=torch.Generator().manual_seed(0)).bfloat16()
    keep, scale = KeyedDropout(0, 0, 0).mask(x, 0.1, 3)
    exact = residual.double() + x.double() * keep.double() * scale
    assert torch.equal(KeyedDropout(0, 0, 0).add(x, 0.1, 3, residual), exact.bfloat16())


def test_probability_zero_and_tensors_without_elements_pass():
    x = torch.randn(3, 3)
    assert KeyedDropout(0, 0, 0)(x, 0.0, 0) is x
    assert KeyedDropout(0, 0, 0)(torch.empty(0, 8), 0.5, 0).shape == (0, 8)
