"""Our ring all-reduce against MPI_Allreduce, fp32, at several sizes.

    mpirun -np 4 python tests/benchmarks/bench_reduce.py

The two take turns, so that what else the machine does meets both alike. The time of a repetition is that of its slowest
rank. Printed are the median over repetitions, and in brackets the quartiles. Before timing, both must sum correctly.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

import numpy as np
import torch
from mpi4py import MPI
from rich.console import Console
from rich.table import Table

from mpitrain.comm import ring
from mpitrain.comm.buffers import Transport

WARM_UP = 3


def check(comm: MPI.Intracomm, values: torch.Tensor, contenders: dict[str, Callable[[], None]]) -> None:
    """Both sums of (rank + 1) x values agree with n (n + 1) / 2 x values."""
    original = values.clone()
    for name, reduce in contenders.items():
        values.copy_(original * (comm.rank + 1))
        reduce()
        expected = original * (comm.size * (comm.size + 1) / 2)
        assert torch.allclose(values, expected, rtol=1e-5), f"{name} is wrong on rank {comm.rank}"
        values.copy_(original)


def seconds(comm: MPI.Intracomm, reduce: Callable[[], None]) -> float:
    """How long the slowest rank took."""
    comm.Barrier()
    began = MPI.Wtime()
    reduce()
    slowest = np.array([MPI.Wtime() - began])
    comm.Allreduce(MPI.IN_PLACE, slowest, MPI.MAX)
    return float(slowest[0])


def measure(comm: MPI.Intracomm, num_bytes: int, repetitions: int, patient: bool) -> dict[str, np.ndarray]:
    """Quartiles [3] in milliseconds of each contender."""
    values = torch.full((num_bytes // 4,), 0.5)
    as_numpy = values.numpy()
    contenders: dict[str, Callable[[], None]] = {
        "MPI_Allreduce": lambda: comm.Allreduce(MPI.IN_PLACE, as_numpy, MPI.SUM),
        "ring": lambda: ring.all_reduce(comm, values, Transport(patient=patient)),
    }
    check(comm, values, contenders)
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for repetition in range(WARM_UP + repetitions):
        values.zero_()  # sums of sums would overflow
        for name, reduce in contenders.items():
            elapsed = seconds(comm, reduce)
            if repetition >= WARM_UP:
                taken[name].append(1e3 * elapsed)
    return {name: np.percentile(times, [25, 50, 75]) for name, times in taken.items()}


def main() -> None:
    """Print a table on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kib", type=int, nargs="+", default=[4, 64, 1024, 8192, 65536], help="sizes of the tensor")
    parser.add_argument("--repetitions", type=int, default=21)
    options = parser.parse_args()
    torch.set_num_threads(1)
    comm = MPI.COMM_WORLD.Dup()
    cores = len(os.sched_getaffinity(0))
    table = Table(box=None)
    for column in ("KiB", "MPI_Allreduce, ms", "ring, ms", "MPI / ring"):
        table.add_column(column, justify="right")
    for kib in options.kib:
        quartiles = measure(comm, 1024 * kib, options.repetitions, patient=comm.size > cores)
        cells = [f"{middle:.3f} [{low:.3f}, {high:.3f}]" for low, middle, high in quartiles.values()]
        ratio = quartiles["MPI_Allreduce"][1] / quartiles["ring"][1]
        table.add_row(f"{kib:,}", *cells, f"{ratio:.2f}")
    if comm.rank == 0:
        library = MPI.Get_library_version().splitlines()[0].strip("\x00 ")
        print(f"{comm.size} ranks, {cores} cores in reach of rank 0, {library}, {options.repetitions} repetitions")
        Console(width=100).print(table)
    comm.Free()


if __name__ == "__main__":
    main()
