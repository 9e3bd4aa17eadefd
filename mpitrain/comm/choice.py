"""Which exchange a run takes: what was asked for, else shared memory where ranks share a node and it has room."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from mpi4py import MPI

from mpitrain.comm.buckets import Bucket
from mpitrain.comm.buffers import Transport
from mpitrain.comm.exchange import Exchange, MessageExchange
from mpitrain.comm.node import Layout, NodeExchange
from mpitrain.errors import UsageError, on_all_ranks
from mpitrain.runtime.agree import Comm, collect

SHARED_MEMORY = Path("/dev/shm")  # where MPICH and Open MPI keep windows
HEADROOM = 64 << 20  # bytes left to others, MPI's own buffers among them


def choose_exchange(
    world: Comm,
    data_axis: Comm,
    transport: Transport,
    buckets: Sequence[Bucket],
    dtype: torch.dtype,
    *,
    algorithm: str = "auto",
    wire_dtype: torch.dtype | None = None,
) -> tuple[Exchange, str]:
    """The exchange, which has adopted the buckets, and why it is that one (collective over `world`).

    Args:
        world: all ranks of the run; those of a node share its memory, whatever their data group.
        data_axis: this rank's data group.
        algorithm: auto, node, ring or native.
        wire_dtype: of partial sums between nodes, or between all ranks where no memory is shared; fp32 if None.

    Raises:
        UsageError: `node` was asked for and cannot be had.
    """
    obstacle = ""
    if algorithm in ("auto", "node"):
        obstacle = _obstacle_to_sharing(world, data_axis, transport, buckets, dtype, forced=algorithm == "node")
        if obstacle and algorithm == "node":
            raise on_all_ranks(UsageError(f"--comm.algorithm node: {obstacle}; auto or ring would work"))
    exchange: Exchange
    if algorithm in ("auto", "node") and not obstacle:
        exchange = NodeExchange(data_axis, transport, wire_dtype=wire_dtype)
        why = "node: gradients and weights in shared memory, rings between nodes"
    else:
        exchange = MessageExchange(data_axis, transport, use_native=algorithm == "native", wire_dtype=wire_dtype)
        why = "native: MPI's own collectives" if algorithm == "native" else "ring: messages between all ranks"
        why += f" ({obstacle})" if obstacle else ""
    exchange.adopt(buckets, dtype)
    return exchange, why


def _obstacle_to_sharing(
    world: Comm, data_axis: Comm, transport: Transport, buckets: Sequence[Bucket], dtype: torch.dtype, *, forced: bool
) -> str:
    """Why this run cannot, or had better not, share memory; the same words on every rank (collective)."""
    group = Comm(data_axis.Split_type(MPI.COMM_TYPE_SHARED))
    start, stop = Layout.of(group.size, buckets, dtype).segment(group.rank)
    shares = group.size > 1
    group.Free()
    node = Comm(world.Split_type(MPI.COMM_TYPE_SHARED))
    needed = sum(collect(node, stop - start))
    node.Free()
    free = _free_shared_memory()
    mine = ""
    if transport.device.type != "cpu":
        mine = "gradients on a GPU are not in shared memory"
    elif free is not None and needed + HEADROOM > free:
        mine = f"{SHARED_MEMORY} has {free >> 20:,} MiB free, {needed >> 20:,} MiB are needed"
    found = collect(world, [mine, shares])
    if not forced and not any(shared for _, shared in found):
        return "no two replicas on one node"
    return next((obstacle for obstacle, _ in found if obstacle), "")


def _free_shared_memory() -> int | None:
    """Bytes, or None where windows live elsewhere. Touching more than there is would kill the rank (SIGBUS)."""
    if not SHARED_MEMORY.is_dir():
        return None
    status = os.statvfs(SHARED_MEMORY)
    return status.f_bavail * status.f_frsize
