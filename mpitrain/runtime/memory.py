"""How much memory a rank may use, its share of what its node, its job's control group or its GPU has, and has used.

Not what is free just now: a job that is started again shall find the same.
"""

from __future__ import annotations

import os
import resource
from contextlib import suppress
from pathlib import Path

import torch
from mpi4py import MPI

from mpitrain.runtime.agree import Comm, collect
from mpitrain.runtime.device import gpu_of

CGROUPS = Path("/sys/fs/cgroup")


def least_memory(comm: Comm, device: torch.device) -> int:
    """Bytes that each rank of the job has at least (collective)."""
    if device.type == "cuda":  # each rank may see a GPU of its own as the first one
        holder, size = gpu_of(device), torch.cuda.get_device_properties(device).total_memory
    else:
        holder, size = "", node_memory()
    node = Comm(comm.Split_type(MPI.COMM_TYPE_SHARED))
    mine = size // collect(node, holder).count(holder)
    node.Free()
    return int(min(collect(comm, mine)))


def peak_memory() -> float:
    """Bytes of memory that this process has had at most, shared ones included (peak resident set, getrusage(2))."""
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def node_memory() -> int:
    """Bytes that this node has for this job: all of it, or what the job's control group is limited to."""
    return min(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *group_limits())


def group_limits(told: Path = Path("/proc/self/cgroup"), root: Path = CGROUPS) -> list[int]:
    """Limits in bytes of this process's control group and those above it, of version 1 or 2 (cgroups(7))."""
    limits = [1 << 62]
    with suppress(OSError, ValueError):
        for line in told.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            mounted, name = (root / "memory", "memory.limit_in_bytes") if controllers else (root, "memory.max")
            group = mounted / path.lstrip("/")
            for place in (group, *group.parents):
                if place.is_relative_to(mounted):
                    limits += _limit(place / name)
    return limits


def _limit(file: Path) -> list[int]:
    try:
        return [int(file.read_text())]
    except (OSError, ValueError):  # there is none here, or it is "max"
        return []
