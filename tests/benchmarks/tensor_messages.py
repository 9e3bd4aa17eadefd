"""Seconds in the messages of a tensor group, by those of MPI_Allreduce, which would do in their place.

    mpirun -np 2 python tests/benchmarks/tensor_messages.py

A sub-layer gathers rows before it and scatters a sum behind it; without sequence parallelism it would call
MPI_Allreduce. Both take turns. MPI has no bf16: there MPI_Allreduce sums the same numbers in fp32.
"""

from __future__ import annotations

from statistics import quantiles
from time import perf_counter

from mpitrain.runtime import launch

launch.start()

import numpy as np  # noqa: E402 - MPI comes first
import torch  # noqa: E402
from mpi4py import MPI  # noqa: E402

from mpitrain.comm.buffers import Transport  # noqa: E402
from mpitrain.comm.group import open_group  # noqa: E402
from mpitrain.runtime.agree import Comm  # noqa: E402
from mpitrain.runtime.device import keep_freed_memory  # noqa: E402
from mpitrain.split import part  # noqa: E402

ROWS, WIDTHS = (128, 512, 1024, 4096), (384, 768)
TURNS = 60


def main() -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    comm = Comm(MPI.COMM_WORLD)
    group = open_group(comm, comm, Transport())
    for dtype in (torch.float32, torch.bfloat16):
        for width in WIDTHS:
            for rows in ROWS:
                ratios, ours = compare(comm, group, rows, width, dtype)
                if comm.rank == 0:
                    low, median, high = quantiles(ratios, n=4)
                    size = f"{rows} x {width} {str(dtype).removeprefix('torch.')}"
                    print(f"{size:>22}: {median:.2f} ({low:.2f}, {high:.2f}), {1e6 * ours:,.0f} us", flush=True)
    group.close()


def compare(comm, group, rows: int, width: int, dtype: torch.dtype) -> tuple[list[float], float]:
    partial = torch.ones(rows, width, dtype=dtype)
    own = torch.ones(rows, width, dtype=dtype)[slice(*part(comm.rank, rows, comm.size))]
    plain = np.ones(rows * width, np.float32)

    def by_us() -> None:
        group.gather_rows(own, rows)
        group.scatter_sum(partial)

    def by_mpi() -> None:
        comm.Allreduce(MPI.IN_PLACE, plain)

    times = np.array([[time(comm, work) for work in (by_us, by_mpi)] for _ in range(TURNS)])
    times = np.array(comm.allgather(times)).max(axis=0)[5:]  # who comes last has it; the first turns warm up
    return (times[:, 0] / times[:, 1]).tolist(), float(np.median(times[:, 0]))


def time(comm, work) -> float:
    comm.Barrier()
    began = perf_counter()
    for _ in range(4):
        work()
    return (perf_counter() - began) / 4


if __name__ == "__main__":
    main()
