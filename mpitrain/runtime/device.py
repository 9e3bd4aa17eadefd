"""Where this rank computes: its GPU or its share of the cores."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain

import torch
from mpi4py import MPI

from mpitrain.errors import UsageError, on_all_ranks
from mpitrain.runtime.agree import Comm, any_rank, collect, share
from mpitrain.runtime.cores import are_crowded, ranges, shares
from mpitrain.sections import MOST_THREADS

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's mallopt


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


def gpu_of(device: torch.device) -> str:
    """A GPU's UUID: numbers are a process's own, which may see one GPU alone."""
    return str(torch.cuda.get_device_properties(device).uuid)


def keep_freed_memory() -> None:
    """Have malloc keep what is freed: pages of large temporaries would come anew, and zeroed, in every step."""
    with suppress(OSError, AttributeError):  # not in other C libraries
        libc = ctypes.CDLL(None)  # see mallopt(3)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def place_on_node(comm: Comm) -> tuple[int, int]:
    """This rank's number among the ranks on its node, and their count (collective)."""
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    place = (node.rank, node.size)
    node.Free()
    return place


def node_of_each_rank(comm: Comm) -> list[int]:
    """The lowest rank on each rank's node (collective)."""
    node = Comm(comm.Split_type(MPI.COMM_TYPE_SHARED))
    first = share(node, comm.rank)
    node.Free()
    return collect(comm, first)


def processors_of_node(comm: Comm, device: torch.device) -> int:
    """How many GPUs, or cores, the ranks on the fullest node may use (collective)."""
    node = Comm(comm.Split_type(MPI.COMM_TYPE_SHARED))
    held = collect(node, [gpu_of(device)] if device.type == "cuda" else sorted(os.sched_getaffinity(0)))
    node.Free()
    return int(max(collect(comm, len(set(chain(*held))))))


@dataclass(frozen=True)
class Cores:
    """Where this rank's threads run.

    Attributes:
        num_threads: that compute.
        crowded: ranks outnumber cores, on some node.
        excess: ranks of the job with more threads than their share of the cores has room for.
        binding: to which of this node's cores this rank is bound, and whether the others are elsewhere, in words.
        misread: what OMP_NUM_THREADS says if that is no number of threads.
    """

    num_threads: int
    crowded: bool
    excess: int
    binding: str
    misread: str = ""


def share_cores(comm: Comm, threads: int | None) -> Cores:
    """Set the compute threads of this rank (collective).

    Ranks share a core evenly with all others on the node whose affinity masks have it too; `threads` or
    OMP_NUM_THREADS may say otherwise.
    """
    node = Comm(comm.Split_type(MPI.COMM_TYPE_SHARED))
    masks = collect(node, sorted(os.sched_getaffinity(0)))
    mine = masks[node.rank]
    share = shares(masks)[node.rank]
    node.Free()
    told = os.environ.get("OMP_NUM_THREADS", "")  # job scripts say it there
    outermost = told.partition(",")[0].strip()  # others are for regions inside of parallel regions
    understood = outermost.isdigit() and 1 <= int(outermost) <= MOST_THREADS
    num_threads = threads or (int(outermost) if understood else max(1, int(share)))
    torch.set_num_threads(num_threads)
    excess = sum(collect(comm, num_threads > 1 and num_threads > share))
    binding = f"on core(s) {ranges(mine)} of {os.cpu_count()}"
    binding += "" if masks.count(mine) == len(masks) else ", others on others"
    return Cores(num_threads, any_rank(comm, are_crowded(masks)), excess, binding, "" if understood else told)
