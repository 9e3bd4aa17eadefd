"""A rank that cannot measure leaves none of the others waiting; neighbouring nodes are paired, each once at a time."""

from __future__ import annotations

import pytest

from mpitrain.comm.pingpong import neighbours
from mpitrain.doctor.ground import everywhere
from mpitrain.errors import MpitrainError


@pytest.mark.mpi(min_size=1)
def test_all_ranks_are_told_what_each_has_measured(comm):
    assert everywhere(comm, "counting", lambda: comm.rank**2) == [rank**2 for rank in range(comm.size)]


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("culprits", [{1}, {0, 1}])
def test_what_fails_on_one_rank_is_an_error_on_all(comm, culprits):
    def measure() -> float:
        return 1 / (comm.rank not in culprits)

    with pytest.raises(MpitrainError, match=rf"rank {min(culprits)}, while dividing: ZeroDivisionError") as error:
        everywhere(comm, "dividing", measure)
    assert error.value.agreed


@pytest.mark.parametrize(
    "leaders, rounds",
    [([0], [[], []]), ([0, 4], [[(0, 4)], []]), ([0, 2, 4, 6], [[(0, 2), (4, 6)], [(2, 4)]])],
)
def test_neighbouring_nodes_are_paired(leaders, rounds):
    assert neighbours(leaders) == rounds
