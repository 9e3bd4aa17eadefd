"""Every sequence once per epoch, in parts of nearly equal cost; a plan depends on (seed, epoch, position) alone."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpitrain.dataset.batches import (
    TrainPlan,
    cut_evenly,
    epoch_order,
    evaluation_plan,
    pad_lengths,
    round_number,
    sequence_costs,
    wanted_tokens,
)
from mpitrain.split import part

lengths_of = st.lists(st.integers(2, 200), min_size=1, max_size=60).map(lambda found: np.array(found, np.int64))


def plan_of(lengths, batch_size=4, micro_batches=3, seed=0) -> TrainPlan:
    words = lengths - 1
    return TrainPlan(lengths, words, batch_size=batch_size, micro_batches=micro_batches, hidden_size=32, seed=seed)


@given(lengths_of, st.integers(1, 70), st.integers(1, 9), st.integers(0, 2**32))
@settings(deadline=None)
def test_every_sequence_is_trained_on_once_per_epoch_and_counted_once(lengths, batch_size, micro_batches, seed):
    plan = plan_of(lengths, batch_size, micro_batches, seed)
    for epoch in range(2):
        steps = [plan.step(epoch * plan.steps_per_epoch + number) for number in range(plan.steps_per_epoch)]
        seen = np.concatenate([sequences for step in steps for sequences in step.micro_batches])
        assert sorted(seen) == list(range(len(lengths)))
        assert {step.epoch for step in steps} == {epoch}
        assert sum(step.num_tokens for step in steps) == lengths.sum()
        assert sum(step.num_labelled for step in steps) == (lengths - 1).sum()
        assert all(1 <= len(step.micro_batches) <= micro_batches for step in steps)
        assert all(len(sequences) for step in steps for sequences in step.micro_batches)
        assert all(len(step.costs) == len(step.micro_batches) for step in steps)


@pytest.mark.parametrize("number, steps", [(1, 1), (3, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_the_last_batch_of_an_epoch_may_be_smaller(number, steps):
    plan = plan_of(np.full(number, 7, np.int64), batch_size=4)
    assert plan.steps_per_epoch == steps
    assert sum(map(len, plan.step(steps - 1).micro_batches)) == number - 4 * (steps - 1)


@given(lengths_of, st.integers(1, 9), st.booleans())
def test_replicas_share_a_step_and_are_told_how_evenly(lengths, num_replicas, reproducible):
    step = plan_of(lengths, batch_size=len(lengths), micro_batches=8).step(0)
    shares = [step.share(replica, num_replicas, reproducible=reproducible) for replica in range(num_replicas)]
    assert [number for share in shares for number in share] == list(range(len(step.micro_batches)))
    costs = [sum(sequence_costs(lengths[step.micro_batches[n]], 32).sum() for n in share) for share in shares]
    assert step.replica_costs(num_replicas, reproducible=reproducible) == pytest.approx(costs)


@given(lengths_of, st.lists(st.integers(0, 40), min_size=1, max_size=8), st.integers(0, 9))
@settings(deadline=None)
def test_a_step_is_the_same_whatever_was_asked_before(lengths, steps, seed):
    used = plan_of(lengths, seed=seed)
    for step in steps:
        fresh, again = plan_of(lengths, seed=seed).step(step), used.step(step)
        assert [a.tolist() for a in fresh.micro_batches] == [b.tolist() for b in again.micro_batches]
        assert (fresh.epoch, fresh.num_labelled, fresh.num_tokens) == (
            again.epoch,
            again.num_labelled,
            again.num_tokens,
        )


def test_epochs_and_seeds_differ_and_the_order_is_pinned():
    # A release that changes this order breaks the promise that a resumed run is the uninterrupted one.
    assert epoch_order(8, 0, 0).tolist() == [5, 0, 6, 1, 7, 2, 4, 3]
    orders = [epoch_order(50, seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


@given(lengths_of, st.integers(1, 12))
def test_parts_have_nearly_equal_costs_and_lose_nothing(lengths, count):
    costs = sequence_costs(lengths, 32)
    batch = np.arange(100, 100 + len(lengths))
    parts = cut_evenly(batch, costs, count)
    assert len(parts) == min(count, len(batch)) and all(len(found) for found in parts)
    assert sorted(np.concatenate(parts)) == batch.tolist()
    # Graham's bound against what no cut can beat: the mean, and the longest sequence.
    best = max(costs.sum() / len(parts), costs.max())
    assert max(costs[found - 100].sum() for found in parts) <= 2 * best


@given(lengths_of)
def test_padding_makes_few_different_sums_of_lengths_and_little_work(lengths):
    padded = pad_lengths(lengths)
    assert padded[: len(lengths)].tolist() == lengths.tolist()
    assert all(0 < length <= lengths.max() for length in padded[len(lengths) :])
    assert len(f"{padded.sum():b}".rstrip("0")) <= 6
    assert padded.sum() < lengths.sum() * (1 + 1 / 32)


@given(st.lists(st.booleans(), max_size=300))
def test_all_tokens_with_labels_are_wanted_and_few_others(labelled):
    labelled = np.array(labelled + [False] * (round_number(max(1, len(labelled))) - len(labelled)))
    wanted = wanted_tokens(labelled)
    assert set(np.flatnonzero(labelled)) <= set(wanted)
    assert wanted.tolist() == sorted(set(wanted))
    assert len(wanted) == round_number(max(1, int(labelled.sum()))) <= len(labelled)


@given(st.integers(0, 40), st.integers(1, 9))
def test_replicas_share_micro_batches_evenly_and_completely(total, count):
    bounds = [part(index, total, count) for index in range(count)]
    assert [number for start, stop in bounds for number in range(start, stop)] == list(range(total))
    assert max(stop - start for start, stop in bounds) - min(stop - start for start, stop in bounds) <= 1


@given(st.lists(st.lists(st.integers(2, 60), min_size=1, max_size=4), max_size=30), st.integers(1, 150))
def test_evaluation_takes_every_window_once_and_keeps_a_sentence_together(windows, room):
    lengths = np.array([length for sentence in windows for length in sentence], np.int64)
    sentences = np.repeat(np.arange(len(windows)), [len(found) for found in windows])
    plan = evaluation_plan(lengths, sentences, room)
    assert sorted(number for found in plan for number in found) == list(range(len(lengths)))
    places: dict[int, list[tuple[int, int]]] = {}
    for micro_batch, found in enumerate(plan):
        held = sentences[found]
        assert lengths[found].sum() <= room or len(set(held)) == 1
        for place, number in enumerate(found):
            places.setdefault(int(sentences[number]), []).append((micro_batch, place - int(number)))
    assert all(len(set(found)) == 1 for found in places.values()), "windows in order, side by side"
    for found, following in pairwise(plan):
        next_sentence = following[sentences[following] == sentences[following[0]]]
        assert lengths[found].sum() + lengths[next_sentence].sum() > room, "as full as can be"
