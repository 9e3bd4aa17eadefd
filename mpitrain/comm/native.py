"""MPI's own collectives under the interface of our ring: to compare with, and where a vendor's are better."""

from __future__ import annotations

import numpy as np
import torch
from mpi4py import MPI

from mpitrain.comm.buffers import Transport
from mpitrain.runtime.agree import Comm
from mpitrain.split import aligned_part


def all_reduce(comm: Comm, flat: torch.Tensor) -> None:
    """Sum in place; fp32 on the CPU (collective)."""
    comm.Allreduce(MPI.IN_PLACE, flat.numpy(), MPI.SUM)


def reduce_scatter(comm: Comm, flat: torch.Tensor, transport: Transport) -> None:
    """Leave the sum over ranks in this rank's chunk (`split.aligned_part`); fp32 only (collective)."""
    values = flat.cpu().numpy()
    start, stop = aligned_part(comm.rank, len(values), comm.size)
    own = np.empty(stop - start, np.float32)
    comm.Reduce_scatter(values, own, _sizes(comm, len(values)), MPI.SUM)
    flat[start:stop].copy_(torch.from_numpy(own))


def all_gather(comm: Comm, flat: torch.Tensor, transport: Transport) -> None:
    """Fill every chunk from the rank that owns it; any dtype, as bytes (collective)."""
    values = flat.cpu().view(torch.uint8).numpy()
    start, stop = (flat.element_size() * bound for bound in aligned_part(comm.rank, len(flat), comm.size))
    sizes = [flat.element_size() * size for size in _sizes(comm, len(flat))]
    everything = np.empty_like(values)
    comm.Allgatherv([values[start:stop].copy(), MPI.BYTE], [everything, sizes, MPI.BYTE])
    flat.view(torch.uint8).copy_(torch.from_numpy(everything))


def _sizes(comm: Comm, total: int) -> list[int]:
    bounds = [aligned_part(index, total, comm.size) for index in range(comm.size)]
    return [stop - start for start, stop in bounds]
