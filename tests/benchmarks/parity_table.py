"""How far the numbers of a mesh are from those of one rank: relative differences after 1, 10 and 40 steps.

    for n in 2 3 4 8; do mpirun -np $n python tests/benchmarks/parity_table.py; done
    mpirun -np 4 python tests/benchmarks/parity_table.py schedules

The second takes 2 stages by 2 ranks that share layers through every schedule and every kind of recomputation.
Unequal sentence lengths, dropout on, clipping active, fp32.
"""

from __future__ import annotations

import math
import sys
from itertools import product
from pathlib import Path

import torch
from mpi4py import MPI

sys.path.insert(0, str(Path(__file__).parent.parent / "support"))

from small import train_small

from mpitrain.pipeline.schedule import SCHEDULES
from mpitrain.runtime.agree import total

MESHES = {
    1: [(1, 1, 1)],
    2: [(2, 1, 1), (1, 2, 1), (1, 1, 2)],
    3: [(3, 1, 1)],
    4: [(2, 2, 1), (1, 4, 1), (1, 1, 4), (2, 1, 2), (1, 2, 2)],
    8: [(4, 2, 1), (2, 2, 2)],
}
STEPS = (1, 10, 40)


def main() -> None:
    torch.set_num_threads(1)
    comm = MPI.COMM_WORLD
    reference = train_small(MPI.COMM_SELF, 1, 1, max(STEPS), keep_weights=STEPS)
    cases: list[tuple[tuple[int, int, int], dict[str, str]]] = [(mesh, {}) for mesh in MESHES[comm.size]]
    if sys.argv[1:] == ["schedules"]:
        ways = product(SCHEDULES, ("none", "attention", "block"))
        cases = [((1, 2, 2), {"schedule": schedule, "recompute": recompute}) for schedule, recompute in ways]
    for (data, pipe, tensor), options in cases:
        run = train_small(comm, data, pipe, max(STEPS), tensor=tensor, keep_weights=STEPS, **options)
        for step in STEPS:
            sums = torch.zeros(2, dtype=torch.float64)
            for name, values in run.weights[step].items():
                expected = reference.weights[step][name][run.shards[name].slices].double()
                sums += torch.stack([(values.double() - expected).square().sum(), expected.square().sum()])
            difference, size = total(comm, sums.numpy())
            loss, norm = (
                abs(mine[step - 1] / theirs[step - 1] - 1)
                for mine, theirs in ((run.losses, reference.losses), (run.grad_norms, reference.grad_norms))
            )
            if comm.rank == 0:
                cells = f"loss {loss:.1e}  gradient norm {norm:.1e}  weights {math.sqrt(difference / size):.1e}"
                case = "  ".join([f"{data} data x {pipe} pipe x {tensor} tensor", *options.values()])
                print(f"{case}  step {step:>2}  {cells}", flush=True)


if __name__ == "__main__":
    main()
