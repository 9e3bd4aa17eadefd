from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpitrain.errors import UsageError
from mpitrain.pipeline.balance import by_hand, mesh_choices, split_blocks, split_chunks
from mpitrain.pipeline.schedule import in_a_v, in_turn
from mpitrain.split import part

costs_lists = st.lists(st.integers(0, 20), min_size=1, max_size=9)


def slowest(costs, speeds, borders):
    return max(sum(costs[start:stop]) / speed for (start, stop), speed in zip(pairwise(borders), speeds, strict=True))


def best_of_all_splits(costs, speeds):
    inner = combinations(range(1, len(costs)), len(speeds) - 1)
    return min(slowest(costs, speeds, [0, *borders, len(costs)]) for borders in inner)


@given(costs_lists, st.data())
def test_no_split_has_a_faster_slowest_stage(costs, data):
    num_stages = data.draw(st.integers(1, len(costs)))
    speeds = data.draw(st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=num_stages, max_size=num_stages))
    stages = split_blocks(costs, num_stages, speeds)
    borders = [0, *(stop for _, stop in stages)]
    assert stages == list(pairwise(borders)) and borders[-1] == len(costs)
    assert all(start < stop for start, stop in stages)
    assert slowest(costs, speeds, borders) == best_of_all_splits(costs, speeds)


def test_among_equal_splits_later_stages_take_more():
    assert split_blocks([1] * 7, 3) == [(0, 2), (2, 4), (4, 7)]
    assert split_blocks([1] * 14, 4) == [(0, 3), (3, 6), (6, 10), (10, 14)]


def test_a_fast_machine_gets_more_blocks():
    assert split_blocks([1] * 6, 2, [1.0, 2.0]) == [(0, 2), (2, 6)]


def test_more_stages_than_blocks_is_an_error_with_the_numbers():
    with pytest.raises(UsageError, match=r"7 stages .* the model has 6 blocks .*4 layers.* use --mesh.pipe 6 or less"):
        split_blocks([1.0] * 6, 7)


@pytest.mark.parametrize(
    ("layers", "stages"),
    [
        ([3, 3, 4, 2], [(0, 4), (4, 7), (7, 11), (11, 14)]),
        ([12], [(0, 14)]),
        ([0, 12, 0], [(0, 1), (1, 13), (13, 14)]),
    ],
)
def test_a_split_by_hand_counts_layers_and_gives_the_ends_to_the_outer_stages(layers, stages):
    assert by_hand(layers, 12) == stages


@pytest.mark.parametrize(
    ("layers", "problem"),
    [
        ([3, 3, 3, 2], r"3 \+ 3 \+ 3 \+ 2 = 11 layers, the model has 12"),
        ([13, -1], r"13 \+ -1 = 12 layers, the model has 12; .* none negative"),
        ([], "nothing = 0 layers, the model has 12"),
        ([6, 0, 6], "'6,0,6' leaves stage 1 without a block"),
    ],
)
def test_a_split_by_hand_that_cannot_be_is_an_error_with_the_arithmetic(layers, problem):
    with pytest.raises(UsageError, match=problem):
        by_hand(layers, 12)


@given(st.integers(0, 60), st.integers(1, 20))
def test_parts_are_even_contiguous_and_the_first_ones_longer(num_things, num_parts):
    parts = [part(index, num_things, num_parts) for index in range(num_parts)]
    assert [thing for start, stop in parts for thing in range(start, stop)] == list(range(num_things))
    sizes = [stop - start for start, stop in parts]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] - sizes[-1] <= 1


@pytest.mark.parametrize(
    ("num_ranks", "mesh"),
    [
        (1, (1, 1)),
        (2, (2, 1)),
        (3, (3, 1)),
        (4, (4, 1)),
        (5, (5, 1)),
        (6, (3, 2)),
        (7, (7, 1)),
        (8, (4, 2)),
        (16, (4, 4)),
    ],
)
def test_the_mesh_for_eight_micro_batches_and_four_layers(num_ranks, mesh):
    assert next(mesh_choices(num_ranks, 4, 8)) == mesh


def test_ranks_that_are_too_many_for_two_micro_batches_each_get_one_or_none():
    assert next(mesh_choices(12, 2, 8)) == (6, 2)
    assert next(mesh_choices(11, 4, 8)) == (11, 1)


@given(st.integers(1, 200), st.integers(1, 24), st.integers(1, 64))
def test_a_mesh_uses_every_rank_and_fills_every_stage(num_ranks, num_layers, num_micro_batches):
    choices = list(mesh_choices(num_ranks, num_layers, num_micro_batches))
    assert {pipe for _, pipe in choices} == {p for p in range(1, num_layers + 1) if num_ranks % p == 0}
    data, pipe = choices[0]
    assert data * pipe == num_ranks and pipe <= num_layers
    shorter = [other for other in range(1, pipe) if num_ranks % other == 0]
    wanted = 2 if 2 * data <= num_micro_batches else 1
    assert all(num_ranks // other * wanted > num_micro_batches for other in shorter)


def slowest_and_longest(costs, stages, speeds, bounds) -> tuple[float, float]:
    loads = [0.0] * (max(stages) + 1)
    chunks = [sum(costs[start:stop]) / speeds[at] for (start, stop), at in zip(bounds, stages, strict=True)]
    for stage, chunk in zip(stages, chunks, strict=True):
        loads[stage] += chunk
    return max(loads), max(chunks)


def test_among_equally_slow_splits_the_one_with_the_shortest_longest_chunk_is_taken():
    found = split_chunks([1, 1, 3, 4, 4, 1, 1], in_a_v(3).stages)
    assert found == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 7)]


@given(st.sampled_from([in_turn(1, 2), in_turn(2, 2), in_turn(3, 2), in_turn(2, 3), in_a_v(2), in_a_v(3)]), st.data())
def test_chunks_are_cut_as_well_as_by_trying_all_cuts(placement, data):
    stages = placement.stages
    size = st.integers(len(stages), len(stages) + 4)
    costs = data.draw(size.flatmap(lambda n: st.lists(st.integers(1, 9), min_size=n, max_size=n)))
    speeds = data.draw(st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=len(set(stages)), max_size=len(set(stages))))
    found = split_chunks(costs, stages, speeds)
    assert [start for start, _ in found] == [0, *(stop for _, stop in found[:-1])]
    assert found[-1][1] == len(costs)
    every = combinations(range(1, len(costs)), len(stages) - 1)
    best = min(slowest_and_longest(costs, stages, speeds, list(pairwise([0, *cut, len(costs)]))) for cut in every)
    assert slowest_and_longest(costs, stages, speeds, found) == best
