"""Train a few steps over all ranks, and rank 0 alone as well; say in JSON how, where, and with which numbers.

    python train_on_hosts.py STEPS [PAUSE]

`progress` counts the steps begun; PAUSE seconds go by before each.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from pathlib import Path

import torch
from mpi4py import MPI
from small import train_small

from mpitrain.files import replace_file
from mpitrain.runtime.agree import collect

num_steps, pause = int(sys.argv[1]), float((*sys.argv, "0")[2])
world = MPI.COMM_WORLD
torch.set_num_threads(1)


def report(step: int, *_: object) -> None:
    if world.rank == 0:
        replace_file(Path("progress"), str(step))
    time.sleep(pause)


run = train_small(world, world.size, 1, num_steps, spoil=report)
places = collect(world, [platform.node(), world.Split_type(MPI.COMM_TYPE_SHARED).size])
if world.rank == 0:
    alone = train_small(MPI.COMM_SELF, 1, 1, num_steps)
    found = {name: [getattr(trained, name) for trained in (run, alone)] for name in ("losses", "grad_norms")}
    print(json.dumps(found | {"why": run.why, "places": places}))
