"""The gradient of an embedding table, summed over ranks as the few rows that a batch touches.

A step looks up a few hundred of the thirty thousand rows of a vocabulary; the gradient of the others is zero and need
not travel. Every rank sends each owner the blocks (`split.UNIT` elements of a row) that fall into its part, if all
ranks together find that this is less than what a ring would send; else the ring runs.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from mpitrain.comm.buffers import Transport
from mpitrain.comm.wire import Wire
from mpitrain.runtime.agree import Comm
from mpitrain.split import UNIT, aligned_part

TAG = 9
NUMBER_BYTES = 8  # of a block's number, which travels with it


def reduce_scatter(
    comm: Comm,
    flat: torch.Tensor,
    blocks: torch.Tensor,
    transport: Transport,
    wire: Wire | None,
    otherwise: Callable[[], None],
) -> torch.Tensor | None:
    """Leave the sum over ranks in this rank's chunk of a tensor that is mostly zero (collective).

    Args:
        comm: the ranks, each of which owns a chunk (`split.aligned_part`).
        flat: fp32 [n], contiguous, n a multiple of UNIT; zero outside of `blocks`.
        blocks: int64, ascending numbers of the blocks of UNIT elements that may differ from zero.
        transport: how to wait, and how device memory travels.
        wire: rounds what is sent; nothing is rounded if None.
        otherwise: runs a ring's reduce-scatter of `flat`.

    Returns:
        The blocks of the own chunk that others have brought, or None if the ring ran: then all of `flat` is changed.
    """
    if comm.size == 1:
        return blocks.new_empty(0)
    ends = [aligned_part(rank, flat.numel(), comm.size)[1] // UNIT for rank in range(comm.size)]
    parts = torch.tensor_split(blocks, torch.searchsorted(blocks, torch.tensor(ends[:-1], device=blocks.device)).cpu())
    counts = _gather_counts(comm, [len(part) for part in parts], transport)
    dtype = wire.dtype if wire else flat.dtype
    if _busiest(counts) * (UNIT * dtype.itemsize + NUMBER_BYTES) >= _ring_bytes(flat.numel(), comm.size, dtype):
        otherwise()
        return None
    table = flat.view(flat.numel() // UNIT, UNIT)
    senders = [rank for rank in range(comm.size) if rank != comm.rank and counts[rank, comm.rank]]
    incoming = [
        (
            transport.post(comm, (int(counts[rank, comm.rank]),), torch.int64, rank, TAG),
            transport.post(comm, (int(counts[rank, comm.rank]), UNIT), dtype, rank, TAG + 1),
        )
        for rank in senders
    ]
    outgoing = []
    for rank, part in enumerate(parts):
        if rank != comm.rank and len(part):
            values = table.index_select(0, part)
            outgoing.append(transport.send(comm, part, rank, TAG))
            outgoing.append(transport.send(comm, wire.round_rows(values, part) if wire else values, rank, TAG + 1))
    arrived = [blocks.new_empty(0)]
    for numbers, block_values in incoming:
        arrived.append(numbers.received())
        table.index_add_(0, arrived[-1], block_values.received().to(flat.dtype))
    for parcel in outgoing:
        parcel.sent()
    return torch.cat(arrived)


def _gather_counts(comm: Comm, own: list[int], transport: Transport) -> np.ndarray:
    """How many blocks rank i has for owner j: int64 [size, size], the same everywhere."""
    counts = np.empty((comm.size, comm.size), np.int64)
    transport.wait([comm.Iallgather(np.array(own, np.int64), counts)])
    return counts


def _busiest(counts: np.ndarray) -> int:
    """Blocks that the rank which sends or receives most has to send or receive."""
    apart = counts - np.diag(np.diag(counts))
    return int(max(apart.sum(axis=0).max(), apart.sum(axis=1).max()))


def _ring_bytes(num_elements: int, size: int, dtype: torch.dtype) -> float:
    """What each rank of a ring sends in a reduce-scatter."""
    return num_elements * dtype.itemsize * (size - 1) / size
