"""Sums in an order that no mesh changes: a binary tree over micro-batches, first on each rank, then over ranks.

A replica's micro-batches are neighbours, as many as a power of two (there may be fewer at the end). If the number of
replicas is one as well, then the tree over all micro-batches,

    ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7)),

falls into a tree on each rank and one over ranks wherever it is cut: the same additions, so the same bits. The gradient
norm is summed exactly instead, because its terms are owned by whoever owns the weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from mpi4py import MPI

from mpitrain.comm.buffers import Transport, messages
from mpitrain.runtime.agree import Comm
from mpitrain.split import aligned_part

TAG = 8
LIMB = 2.0**24  # a limb of a fixed-point number: 2 ** 29 of them are summed exactly in fp64
NUM_LIMBS = 4


class TreeSum:
    """The sum of a sequence of tensors by a binary tree, holding one partial sum per level."""

    def __init__(self) -> None:
        """Nothing added yet."""
        self._levels: list[list[torch.Tensor] | None] = []

    def add(self, tensors: Sequence[torch.Tensor]) -> None:
        """The next element, as one or more tensors; it is copied."""
        carry = [tensor.clone() for tensor in tensors]
        for level, waiting in enumerate(self._levels):
            if waiting is None:
                self._levels[level] = carry
                return
            carry = [left.add_(right) for left, right in zip(waiting, carry, strict=True)]
            self._levels[level] = None
        self._levels.append(carry)

    def take(self) -> list[torch.Tensor] | None:
        """The sum, None of nothing, and begin anew; what is left over at the end is added from the right."""
        total: list[torch.Tensor] | None = None
        for waiting in self._levels:
            if waiting is not None and total is not None:
                total = [left.add_(right) for left, right in zip(waiting, total, strict=True)]
            total = total or waiting
        self._levels = []
        return total


def reduce_scatter(comm: Comm, flat: torch.Tensor, transport: Transport) -> None:
    """Leave the sum over ranks, by a tree, in this rank's chunk (collective).

    Every rank sends each chunk to its owner: as many bytes as a ring, but k - 1 buffers of a chunk.

    Args:
        comm: the ranks, in the order of the tree.
        flat: [n], contiguous.
        transport: how to wait, and how device memory travels.
    """
    if comm.size == 1:
        return
    host = transport.host(flat)
    if host is not flat:
        host.copy_(flat)
    transport.synchronize()
    own = slice(*aligned_part(comm.rank, flat.numel(), comm.size))
    others = [rank for rank in range(comm.size) if rank != comm.rank]
    arrived = {rank: torch.empty_like(host[own]) for rank in others}
    requests = [comm.Irecv([part, MPI.BYTE], rank, TAG) for rank in others for part in messages(arrived[rank])]
    for rank in others:
        chunk = host[slice(*aligned_part(rank, flat.numel(), comm.size))]
        requests += [comm.Isend([part, MPI.BYTE], rank, TAG) for part in messages(chunk)]
    transport.wait(requests)
    tree = TreeSum()
    for rank in range(comm.size):
        tree.add([arrived.pop(rank) if rank != comm.rank else host[own]])
    total = tree.take()
    assert total is not None
    flat[own].copy_(total[0])


def square_limbs(tensors: Iterable[torch.Tensor], scale: float) -> list[float]:
    """The sum of squares over scale squared, as whole limbs whose sums over ranks are exact in any order.

    Each square is rounded down to a fixed-point number of NUM_LIMBS limbs, whatever its neighbours, and these are
    summed without rounding (after Demmel and Nguyen, "Fast reproducible floating-point summation", 2013, who do it with
    fewer bits and in one pass).

    Args:
        tensors: fp32.
        scale: a power of two above every absolute value on every rank.
    """
    sums = torch.zeros(NUM_LIMBS, dtype=torch.float64)
    for tensor in tensors:
        rest = (tensor.double() / scale).square_()
        for number in range(NUM_LIMBS):
            limb = rest.mul_(LIMB).floor()
            rest -= limb
            sums[number] += limb.sum().cpu()
    return [float(value) for value in sums]


def from_limbs(limbs: Iterable[float], scale: float) -> float:
    """The sum of squares that limbs stand for."""
    return math.fsum(limb * LIMB ** -(number + 1) for number, limb in enumerate(limbs)) * scale**2


def power_of_two_above(value: float) -> float:
    """The scale for numbers up to `value`."""
    return math.ldexp(1.0, math.frexp(value)[1])
