"""Votes: the same answer, or the same error, on every rank."""

from __future__ import annotations

import numpy as np
import pytest

from mpitrain.errors import DataError, ExitCode, MpitrainError
from mpitrain.runtime.agree import any_rank, collect, gather, require_same, share, share_array, together, total

pytestmark = pytest.mark.mpi(min_size=1)


def test_share_gives_everyone_the_roots_value(comm):
    root = comm.size - 1
    assert share(comm, {"from": comm.rank, "text": "naïve"}, root) == {"from": root, "text": "naïve"}


@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5)])
def test_share_array_keeps_shape_dtype_and_bits(comm, shape):
    made = np.arange(np.prod(shape), dtype=np.int16).reshape(shape) if comm.rank == 0 else None
    received = share_array(comm, made)
    assert received.dtype == np.int16
    assert np.array_equal(received, np.arange(np.prod(shape)).reshape(shape))


def test_collect_is_in_rank_order_for_values_of_unequal_size(comm):
    assert collect(comm, "x" * comm.rank) == ["x" * rank for rank in range(comm.size)]


def test_gather_brings_values_of_unequal_size_to_the_first_rank_alone(comm):
    expected = [{"rank": rank, "text": "é" * 1000 * rank} for rank in range(comm.size)]
    assert gather(comm, expected[comm.rank]) == (expected if comm.rank == 0 else [])


def test_total_has_the_same_bits_everywhere(comm):
    summed = total(comm, np.array([0.1 * (comm.rank + 1), 1e16 if comm.rank == 0 else 1.0]))
    assert len(set(collect(comm, summed.tobytes().hex()))) == 1
    assert summed[0] == pytest.approx(0.1 * comm.size * (comm.size + 1) / 2)


def test_one_rank_is_enough_for_any_rank(comm):
    assert any_rank(comm, comm.rank == comm.size - 1)
    assert not any_rank(comm, False)


def test_together_raises_the_lowest_failed_ranks_error_on_all_ranks(comm):
    with pytest.raises(DataError, match=f"file {comm.size // 2} is bad") as caught, together(comm, "reading"):
        if comm.rank >= comm.size // 2:
            raise DataError(f"file {comm.rank} is bad")
    assert caught.value.code == ExitCode.BAD_DATA
    assert caught.value.agreed


def test_together_names_the_rank_of_an_unexpected_error(comm):
    last = comm.size - 1
    expected = ZeroDivisionError if comm.rank == last else MpitrainError
    with pytest.raises(expected) as caught, together(comm, "counting"):
        if comm.rank == last:
            raise ZeroDivisionError("by zero")
    if comm.rank != last:
        assert f"rank {last}, while counting: by zero" in str(caught.value)


def test_what_all_ranks_must_share_is_refused_with_each_difference_of_the_first_rank_that_differs(comm):
    require_same(comm, "settings", {"--seed": "0"})
    if comm.size == 1:
        return
    mine = {"--seed": "7", "--more": "1"} if comm.rank == comm.size - 1 else {"--seed": "0", "--less": "2"}
    with pytest.raises(DataError) as caught:
        require_same(comm, "settings", mine, DataError)
    assert caught.value.agreed
    first, *lines = str(caught.value).split("\n  ")
    assert first == "settings: ranks differ, and all must have the same"
    starts = ["--seed: 7", "--less: None", "--more: 1"]
    assert [line.partition(" on")[0] for line in lines] == starts
    assert all(f" on rank {comm.size - 1} (" in line and " on rank 0 (" in line for line in lines)


def test_together_is_silent_when_all_is_well(comm):
    with together(comm, "resting"):
        pass
