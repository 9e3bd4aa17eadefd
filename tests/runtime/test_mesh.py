"""Ranks along the axes: who sits where, who the neighbours are, and what does not multiply."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mpi4py import MPI

from mpitrain.errors import UsageError
from mpitrain.runtime import mesh as meshes
from mpitrain.runtime.agree import collect


def shapes_of(size: int) -> list[tuple[int, int, int]]:
    sizes = range(1, size + 1)
    return [shape for shape in product(sizes, sizes, sizes) if math.prod(shape) == size]


@pytest.mark.mpi(min_size=1)
def test_ranks_of_a_stage_sit_side_by_side_then_stages_and_each_axis_holds_its_ranks(comm):
    for data, pipe, tensor in shapes_of(comm.size):
        with meshes.build(comm, data, pipe, tensor) as mesh:
            assert (mesh.num_replicas, mesh.num_stages, mesh.num_tensor) == (data, pipe, tensor)
            at = np.arange(comm.size).reshape(data, pipe, tensor)
            here = mesh.replica, mesh.stage, mesh.tensor
            assert at[here] == comm.rank
            for dim, axis in enumerate((mesh.data_axis, mesh.pipe_axis, mesh.tensor_axis)):
                assert axis.rank == here[dim]
                assert collect(axis, comm.rank) == np.moveaxis(at, dim, -1)[here[:dim] + here[dim + 1 :]].tolist()


@pytest.mark.mpi(min_size=1)
def test_communicators_are_given_back_but_not_after_an_error(comm):
    with meshes.build(comm, comm.size, 1) as mesh:
        pass
    assert mesh.world == mesh.data_axis == mesh.pipe_axis == mesh.tensor_axis == MPI.COMM_NULL
    with pytest.raises(ZeroDivisionError), meshes.build(comm, 1, comm.size) as broken:
        raise ZeroDivisionError
    assert broken.world != MPI.COMM_NULL, "freeing is collective; after an error others may not come"
    broken.free()


@pytest.mark.mpi(min_size=1, max_size=2)
def test_many_meshes_do_not_use_up_communicators(comm):
    for _ in range(700):  # MPICH has about 2,000 context ids
        meshes.build(comm, comm.size, 1).free()


def test_sizes_that_do_not_multiply_to_the_ranks_show_the_arithmetic_and_what_works():
    with pytest.raises(UsageError) as caught:
        meshes.check_shape(6, 2, 2)
    assert str(caught.value) == (
        "mesh: 2 data x 2 pipe x 1 tensor = 4, but there are 6 ranks; with 1 tensor, data x pipe may be 6 x 1, 3 x 2, "
        "2 x 3, 1 x 6"
    )
    with pytest.raises(UsageError, match=r"with 3 tensor, data x pipe may be 2 x 1, 1 x 2$"):
        meshes.check_shape(6, 2, 2, 3)
    with pytest.raises(UsageError, match="x 4 tensor = 16, but there are 6 ranks; tensor may be 1, 2, 3, 6"):
        meshes.check_shape(6, 2, 2, 4)


@given(st.integers(1, 64), st.integers(1, 16), st.integers(1, 16), st.integers(1, 4))
def test_exactly_the_shapes_that_multiply_are_accepted(num_ranks, data, pipe, tensor):
    if data * pipe * tensor == num_ranks:
        meshes.check_shape(num_ranks, data, pipe, tensor)
    else:
        with pytest.raises(UsageError, match=f"there are {num_ranks} ranks"):
            meshes.check_shape(num_ranks, data, pipe, tensor)
