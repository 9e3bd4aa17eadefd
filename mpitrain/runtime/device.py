"""Where this rank computes: its GPU or its share of the cores."""

from __future__ import annotations

import os

import torch
from mpi4py import MPI

from mpitrain.errors import UsageError, on_all_ranks
from mpitrain.runtime.agree import Comm, any_rank, collect


def choose_device(comm: Comm, wanted: str) -> torch.device:
    """This rank's device; GPUs go round by place on the node (collective).

    Raises:
        UsageError: `cuda` was asked for and a rank has none.
    """
    available = torch.cuda.is_available()
    with_gpu = collect(comm, available)
    if wanted == "cuda" and not all(with_gpu):
        without = [rank for rank, gpu in enumerate(with_gpu) if not gpu]
        raise on_all_ranks(UsageError(f"--train.device cuda: no GPU on rank(s) {', '.join(map(str, without))}"))
    if wanted == "cpu" or not all(with_gpu):
        return torch.device("cpu")
    device = torch.device("cuda", place_on_node(comm)[0] % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def place_on_node(comm: Comm) -> tuple[int, int]:
    """This rank's number among the ranks on its node, and their count (collective)."""
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    place = (node.rank, node.size)
    node.Free()
    return place


def share_cores(comm: Comm, threads: int | None) -> tuple[int, bool]:
    """Set the compute threads of this rank; returns them and whether ranks outnumber cores anywhere (collective).

    Ranks whose affinity masks are equal share those cores evenly, unless `threads` or OMP_NUM_THREADS says otherwise.
    """
    mask = sorted(os.sched_getaffinity(0))
    node = Comm(comm.Split_type(MPI.COMM_TYPE_SHARED))
    num_sharing = collect(node, mask).count(mask)
    node.Free()
    told = os.environ.get("OMP_NUM_THREADS", "")  # job scripts say it there
    num_threads = threads or (int(told) if told.isdigit() and int(told) else max(1, len(mask) // num_sharing))
    torch.set_num_threads(num_threads)
    return num_threads, any_rank(comm, num_sharing > len(mask))
