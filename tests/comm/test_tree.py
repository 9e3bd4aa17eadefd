"""Sums in a fixed order: NumPy's sums, wherever the tree is cut; and a norm that no order changes."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpitrain.comm import tree
from mpitrain.comm.buffers import Transport
from mpitrain.runtime.agree import collect
from mpitrain.split import aligned_part, part


def numbers(count: int, length: int = 33) -> list[torch.Tensor]:
    """Values of very different sizes, whose sum depends on the order."""
    generator = torch.Generator().manual_seed(count)
    scales = 10.0 ** torch.randint(-6, 7, (count, length), generator=generator)
    return list(torch.randn(count, length, generator=generator) * scales)


def tree_of(values: list[torch.Tensor]) -> torch.Tensor:
    found = tree.TreeSum()
    for value in values:
        found.add([value])
    return found.take()[0]


@given(st.integers(1, 20))
def test_a_tree_sums_all_it_was_given_and_begins_anew(count):
    values = numbers(count)
    found = tree.TreeSum()
    for _ in range(2):
        for value in values:
            found.add([value, -value])
        total, negative = found.take()
        assert torch.equal(total, -negative)
        np.testing.assert_allclose(total.numpy(), np.sum([v.double().numpy() for v in values], axis=0), rtol=1e-3)
    assert found.take() is None


@pytest.mark.parametrize("num_parts", [1, 2, 4, 8])
def test_a_tree_has_the_same_bits_wherever_it_is_cut(num_parts):
    values = numbers(16)
    parts = [tree_of(values[slice(*part(index, 16, num_parts))]) for index in range(num_parts)]
    assert torch.equal(tree_of(parts), tree_of(values))
    assert not torch.equal(tree_of(values), sum(values)), "or the order would not matter"


@pytest.mark.mpi(min_size=1)
@pytest.mark.parametrize("length", [0, 1, 64, 1000, 70001])
def test_reduce_scatter_leaves_the_tree_sum_in_the_own_chunk(comm, length):
    values = numbers(comm.size, length)
    flat = values[comm.rank].clone()
    tree.reduce_scatter(comm, flat, Transport())
    own = slice(*aligned_part(comm.rank, length, comm.size))
    assert torch.equal(flat[own], tree_of(values)[own])


@given(st.lists(st.floats(-(2.0**60), 2.0**60, width=32), max_size=50), st.integers(0, 50))
def test_squares_are_summed_exactly_up_to_the_last_limb(values, cut):
    scale = tree.power_of_two_above(max(map(abs, values), default=0.0))
    pieces = [torch.tensor(part, dtype=torch.float32) for part in (values[:cut], values[cut:])]
    limbs = [sum(limb) for limb in zip(*(tree.square_limbs([piece], scale) for piece in pieces), strict=True)]
    assert limbs == tree.square_limbs([torch.cat(pieces)], scale), "no order and no cut matters"
    exact = sum(Fraction(value) ** 2 for value in values)
    assert abs(Fraction(tree.from_limbs(limbs, scale)) - exact) <= exact / 2**50 + Fraction(scale) ** 2 * 50 / 2**96


@pytest.mark.mpi(min_size=2)
def test_every_rank_has_the_same_chunk_bounds(comm):
    bounds = collect(comm, list(aligned_part(comm.rank, 1001, comm.size)))
    assert [start for start, _ in bounds][1:] == [stop for _, stop in bounds][:-1]
