"""The ranks arranged along the axes data, pipe and tensor, and the communicators of each axis.

A world rank is ((replica * num_stages) + stage) * num_tensor + tensor index, so that stages which exchange
activations most often sit side by side, mostly on one node. 8 ranks as 4 data x 2 pipe x 1 tensor:

                     pipe axis (activations and their gradients)
                     stage 0       stage 1
      replica 0        0    <-->     1
      replica 1        2    <-->     3        data axis: each column
      replica 2        4    <-->     5        sums its gradients
      replica 3        6    <-->     7
"""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType

from mpi4py import MPI

from mpitrain.errors import UsageError

Comm = MPI.Intracomm


@dataclass(frozen=True)
class Mesh:
    """This rank's place and its communicators, all of them duplicates that `free` gives back."""

    world: Comm
    data_axis: Comm
    pipe_axis: Comm
    tensor_axis: Comm
    num_replicas: int
    num_stages: int
    num_tensor: int
    replica: int
    stage: int
    tensor: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Data x pipe x tensor, in the order of world ranks."""
        return self.num_replicas, self.num_stages, self.num_tensor

    def rank_of(self, stage: int) -> int:
        """World rank at a stage of this replica, with this rank's tensor index."""
        return (self.replica * self.num_stages + stage) * self.num_tensor + self.tensor

    def free(self) -> None:
        """Give the communicators back (collective)."""
        for comm in (self.tensor_axis, self.pipe_axis, self.data_axis, self.world):
            comm.Free()

    def __enter__(self) -> Mesh:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        # After an error other ranks may not come: freeing is collective and would wait for them.
        if kind is None:
            self.free()


def build(comm: Comm, data: int, pipe: int, tensor: int = 1) -> Mesh:
    """Split a duplicate of `comm` into `data` replicas of `pipe` stages of `tensor` ranks each (collective).

    Raises:
        UsageError: data x pipe x tensor is not the number of ranks.
    """
    check_shape(comm.size, data, pipe, tensor)
    world = comm.Dup()
    (replica, stage), index = divmod(world.rank // tensor, pipe), world.rank % tensor
    return Mesh(
        world=world,
        data_axis=Comm(world.Split(color=stage * tensor + index, key=replica)),
        pipe_axis=Comm(world.Split(color=replica * tensor + index, key=stage)),
        tensor_axis=Comm(world.Split(color=replica * pipe + stage, key=index)),
        num_replicas=data,
        num_stages=pipe,
        num_tensor=tensor,
        replica=replica,
        stage=stage,
        tensor=index,
    )


def check_shape(num_ranks: int, data: int, pipe: int, tensor: int = 1) -> None:
    """Raise UsageError, with the shapes that would work, unless data x pipe x tensor is the number of ranks."""
    if data * pipe * tensor != num_ranks:
        groups, rest = divmod(num_ranks, tensor)
        choices = ", ".join(f"{groups // n} x {n}" for n in range(1, groups + 1) if groups % n == 0)
        divisors = ", ".join(str(n) for n in range(1, num_ranks + 1) if num_ranks % n == 0)
        would_work = f"tensor may be {divisors}" if rest else f"with {tensor} tensor, data x pipe may be {choices}"
        raise UsageError(
            f"mesh: {data} data x {pipe} pipe x {tensor} tensor = {data * pipe * tensor}, but there are {num_ranks} "
            f"ranks; {would_work}"
        )
