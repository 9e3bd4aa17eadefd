"""Which exchange a run takes: what was asked for, else shared memory where ranks share a node and it has room.

The choice hangs on the topology and on the room in shared memory, never on a timing, so that a resumed run computes
the same bits. `bench allreduce` shows that little is lost by that at the sizes of buckets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from mpi4py import MPI

from mpitrain.comm import native, tree
from mpitrain.comm.buckets import Bucket
from mpitrain.comm.buffers import Transport
from mpitrain.comm.exchange import Exchange, MessageExchange
from mpitrain.comm.node import NodeExchange
from mpitrain.comm.window import HEADROOM, Layout
from mpitrain.errors import UsageError, on_all_ranks
from mpitrain.runtime.agree import Comm, collect
from mpitrain.runtime.device import place_on_node
from mpitrain.runtime.library import SHARED_MEMORY, free_shared_memory

ALONE = "no two replicas on one node"


def choose_exchange(
    world: Comm,
    data_axis: Comm,
    transport: Transport,
    buckets: Sequence[Bucket],
    dtype: torch.dtype,
    *,
    algorithm: str = "auto",
    wire_dtype: torch.dtype | None = None,
    error_feedback: bool = False,
    overlapped: bool = True,
    reproducible: bool = False,
) -> tuple[Exchange, str]:
    """The exchange, which has adopted the buckets, and why it is that one (collective over `world`).

    Args:
        world: all ranks of the run; those of a node share its memory, whatever their data group.
        data_axis: this rank's data group.
        algorithm: auto, node, ring or native.
        wire_dtype: of partial sums between nodes, or between all ranks where no memory is shared; fp32 if None.
        error_feedback: send what the wire's rounding has lost the next time.
        overlapped: gradients are summed in a thread beside the backward pass.
        reproducible: sum in an order that no mesh changes, whatever the algorithm.

    Raises:
        UsageError: `node` was asked for and cannot be had.
    """
    if reproducible:
        by_tree = _planned(tree.reduce_scatter)
        exchange = MessageExchange(data_axis, transport, buckets, dtype, reduce_scatter=by_tree, by_rows=False)
        none = "" if data_axis.size & (data_axis.size - 1) == 0 else " (which this is not)"
        return exchange, f"tree: the same sums, bit for bit, on any mesh of powers of two{none}"
    if algorithm == "native":
        reduce_scatter, all_gather = _planned(native.reduce_scatter), _planned(native.all_gather)
        exchange = MessageExchange(
            data_axis, transport, buckets, dtype, reduce_scatter=reduce_scatter, all_gather=all_gather, by_rows=False
        )
        return exchange, "native: MPI's own collectives"
    wire = f" in {str(wire_dtype).removeprefix('torch.')}" if wire_dtype is not None else ""
    wires: dict[str, Any] = {"wire_dtype": wire_dtype, "error_feedback": error_feedback, "overlapped": overlapped}
    if data_axis.size == 1 and algorithm == "auto" and transport.device.type == "cpu":
        return MessageExchange(data_axis, transport, buckets, dtype), ""
    why = f"ring: messages{wire} between all replicas"
    if algorithm != "ring":
        node = Comm(data_axis.Split_type(MPI.COMM_TYPE_SHARED, key=data_axis.rank))
        obstacle = _obstacle_to_sharing(world, node, transport, Layout.of(node.size, buckets, dtype))
        if not obstacle or (algorithm == "node" and obstacle == ALONE):
            between = f", rings{wire} between nodes" if node.size < data_axis.size else ""
            why = f"node: gradients and weights in shared memory{between}"
            why += "; nothing is sent, so wire_dtype does not matter" if wire and not between else ""
            return NodeExchange(data_axis, node, transport, buckets, dtype, **wires), why
        node.Free()
        if algorithm == "node":
            raise on_all_ranks(UsageError(f"--comm.algorithm node: {obstacle}; auto or ring would work"))
        why += f" ({obstacle})"
    transport = replace(transport, one_host=place_on_node(data_axis)[1] == data_axis.size)
    return MessageExchange(data_axis, transport, buckets, dtype, **wires), why


def _planned(collective: Callable[[Comm, torch.Tensor, Transport], None]) -> Callable[..., Callable[[], None]]:
    """In the form of `ring.ReduceScatter`, for what has nothing to lay out and rounds nothing."""
    return lambda comm, flat, transport, *_: partial(collective, comm, flat, transport)


def _obstacle_to_sharing(world: Comm, node: Comm, transport: Transport, layout: Layout) -> str:
    """Why this run cannot share memory, or would gain nothing; the same words on every rank (collective)."""
    start, stop = layout.segment(node.rank)
    machine = Comm(world.Split_type(MPI.COMM_TYPE_SHARED))
    needed = sum(collect(machine, stop - start))  # by all data groups that have ranks here
    machine.Free()
    free = free_shared_memory()
    mine = ""
    if transport.device.type != "cpu":
        mine = "a GPU's memory is not shared"
    elif free is not None and needed + HEADROOM > free:
        mine = f"{SHARED_MEMORY} has {free >> 20:,} MiB free, {needed >> 20:,} MiB are needed"
        mine += " (killed jobs may have left files there)"
    found = collect(world, [mine, node.size])
    alone = ALONE if max(size for _, size in found) == 1 else ""
    return next((obstacle for obstacle, _ in found if obstacle), alone)
