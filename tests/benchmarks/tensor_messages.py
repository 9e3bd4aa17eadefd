"""Seconds that training spends in the messages of a tensor group, by those of MPI_Allreduce in their place.

    mpirun -np 2 python tests/benchmarks/tensor_messages.py [--precision bf16] [--batch 64] [--turns 15] [--aligned]

Turns of some steps alternate in one run between the group's own messages and two others:

- "MPI": the same exchanges, sums by MPI_Allreduce and rows by MPI_Allgatherv;
- "all tokens": every rank keeps all tokens (Megatron-LM without sequence parallelism), so that MPI_Allreduce gives the
  sums of both directions and there is nothing to gather. It computes with made-up rows, for the times alone.

MPI has no bf16: its sums are made in fp32.

Most of these seconds one rank waits for the other, whose core was slower just then; so it would with any messages.
`--aligned` lets ranks meet in a barrier before each, which is not counted: what is left is the messages' own time,
and how much of it goes into moving and adding bytes, the rest being Python and the making of tensors.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter

from mpitrain.runtime import launch

world = launch.start()

import torch  # noqa: E402 - MPI comes first
from mpi4py import MPI  # noqa: E402

from mpitrain import config  # noqa: E402
from mpitrain.bench.step import Workload  # noqa: E402
from mpitrain.comm import group as groups  # noqa: E402
from mpitrain.comm.buffers import memory  # noqa: E402
from mpitrain.observe.console import Console  # noqa: E402
from mpitrain.runtime.agree import Comm, collect  # noqa: E402
from mpitrain.split import part  # noqa: E402

STEPS = 3


class ByMPI:
    """Instead of a group's own calls: `scatter_sum` is an MPI_Allreduce, `gather_rows` an MPI_Allgatherv."""

    def __init__(self, group, comm) -> None:
        self.group, self.comm = group, comm

    def gather_rows(self, own: torch.Tensor, num_rows: int) -> torch.Tensor:
        began = perf_counter()
        own, whole = own.contiguous(), own.new_empty(num_rows, own.shape[1])
        sizes = [
            (stop - start) * own.shape[1] * own.itemsize for start, stop in groups.cut_rows(num_rows, self.group.size)
        ]
        self.comm.Allgatherv([memory(own), MPI.BYTE], [memory(whole), sizes, MPI.BYTE])
        self.group.seconds += perf_counter() - began
        return whole

    def scatter_sum(self, partial: torch.Tensor) -> torch.Tensor:
        began = perf_counter()
        exact = partial.float().contiguous()  # in place, if it is fp32 already
        self.comm.Allreduce(MPI.IN_PLACE, [memory(exact), MPI.FLOAT])
        summed = exact.to(partial.dtype)
        self.group.seconds += perf_counter() - began
        return summed[slice(*part(self.group.rank, len(summed), self.group.size))]


class AllTokens(ByMPI):
    """Nothing is gathered."""

    def gather_rows(self, own: torch.Tensor, num_rows: int) -> torch.Tensor:
        return own.repeat(self.group.size + 1, *[1] * (own.dim() - 1)).narrow(0, 0, num_rows) if len(own) else own


def aligned(comm):
    """A call that begins on all ranks at once."""

    def wrap(call):
        def run(*arguments):
            comm.Barrier()
            return call(*arguments)

        return run

    return wrap


def timed(call, seconds: list[float]):
    """Add what each call takes to `seconds`."""

    def run(*arguments):
        began = perf_counter()
        found = call(*arguments)
        seconds[0] += perf_counter() - began
        return found

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="minilm-l12")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--aligned", action="store_true")
    options = parser.parse_args()
    flags = ["--model", options.model, "--train.precision", options.precision, "--train.batch_size", str(options.batch)]
    settings = config.load([*flags, "--mesh.tensor", str(world.size)])
    console = Console(world.rank == 0)
    lengths = Path(__file__).with_name("lengths.txt")
    work = Workload.of_random_tokens(world, settings, console, lengths, num_steps=10**6)
    group, axis = work.place.group, Comm(work.place.mesh.tensor_axis.Dup())
    ways = {"ours": group, "MPI": ByMPI(group, axis), "all tokens": AllTokens(group, axis)}
    calls = {name: (way.gather_rows, way.scatter_sum) for name, way in ways.items()}
    moving = [0.0]
    if options.aligned:
        groups.memmove, groups.add_up = timed(groups.memmove, moving), timed(groups.add_up, moving)
        calls = {name: tuple(map(aligned(axis), pair)) for name, pair in calls.items()}
        calls["all tokens"] = (ways["all tokens"].gather_rows, calls["all tokens"][1])
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(options.turns + 1):
        for name, pair in calls.items():
            group.gather_rows, group.scatter_sum = pair
            before = group.seconds
            work.run(STEPS)
            seconds[name].append(max(collect(world, group.seconds - before)) / STEPS)
    for name, theirs in seconds.items():
        ratios = [mine / other for mine, other in zip(seconds["ours"][1:], theirs[1:], strict=True)]
        low, middle, high = quantiles(ratios, n=4)
        ratio = f"; ours / {name} {middle:.2f} (quartiles {low:.2f}, {high:.2f})" if name != "ours" else ""
        console.say("messages", f"{name} {1e3 * median(theirs[1:]):.1f} ms a step{ratio}")
    if options.aligned:
        console.say("", f"ours: moving and adding bytes {1e3 * moving[0] / STEPS / (options.turns + 1):.1f} ms a step")
    axis.Free()
    work.close()


if __name__ == "__main__":
    main()
