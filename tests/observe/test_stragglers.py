"""A rank that takes longer than its peers is named soon, once, and nobody else is."""

from __future__ import annotations

import numpy as np
import pytest

from mpitrain.observe.stragglers import WINDOW, Straggler, Stragglers

NOISE = 0.3  # of the time of a step, by chance


def run_steps(
    watch: Stragglers, shape: tuple[int, int, int], stages: list[float], num_steps: int, slow: dict[int, float]
) -> list[tuple[int, Straggler]]:
    """Random unequal replicas, a rank's time its cost by chance, and `slow` seconds more; what is found when."""
    generator, found = np.random.Generator(np.random.Philox(key=3)), []
    for step in range(num_steps):
        replicas = generator.uniform(0.5, 1.5, shape[0])
        costs = np.broadcast_to(replicas[:, None, None] * np.array(stages)[None, :, None], shape).reshape(-1)
        work = 0.1 * costs * generator.uniform(1, 1 + NOISE, costs.size)
        for rank, seconds in slow.items():
            work[rank] += seconds
        found += [(step, each) for each in watch.add(work, replicas, float(work.max()))]
    return found


@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 1, 1), (2, 2, 1), (1, 1, 4), (1, 3, 1), (3, 2, 2)])
def test_equal_ranks_are_never_named(shape):
    stages = list(np.linspace(1, 2, shape[1]))
    assert run_steps(Stragglers(shape, stages), shape, stages, 500, {}) == []


@pytest.mark.parametrize(
    "shape, rank", [((4, 1, 1), 1), ((2, 1, 1), 0), ((2, 2, 1), 3), ((1, 1, 4), 2), ((1, 3, 1), 1)]
)
def test_a_slow_rank_is_named_once_with_its_times(shape, rank):
    stages = [1.0] * shape[1]
    [(step, found)] = run_steps(Stragglers(shape, stages), shape, stages, 100, {rank: 0.25})
    assert step == WINDOW - 1
    assert found.rank == rank
    assert found.work == pytest.approx(0.25 + found.share, rel=0.2)
    assert 0.15 < found.waiting < 0.3


def test_it_is_named_again_when_it_has_kept_up_in_between():
    watch, shape = Stragglers((3, 1, 1), [1.0]), (3, 1, 1)
    assert len(run_steps(watch, shape, [1.0], 30, {2: 0.3})) == 1
    assert run_steps(watch, shape, [1.0], 30, {}) == []
    assert len(run_steps(watch, shape, [1.0], 30, {2: 0.3})) == 1


def test_a_replica_without_work_is_no_measure():
    watch = Stragglers((3, 1, 1), [1.0])
    for _ in range(WINDOW - 1):
        assert watch.add(np.array([0.1, 0.3, 1e-4]), np.array([1.0, 1.0, 0.0]), 0.3) == []
    [found] = watch.add(np.array([0.1, 0.3, 1e-4]), np.array([1.0, 1.0, 0.0]), 0.3)
    assert found.rank == 1 and found.share == pytest.approx(0.1)
