"""Gradients summed and weights kept in memory that the ranks of a node share (MPI-3 windows); rings between nodes.

Of a data group, the ranks on one node share one window:

    | flags | weights, one copy for all | gradients of local rank 0 | of local rank 1 | ...

Gradients are produced in place. Local rank i sums slice i of everybody's gradients, by reading them: no messages, no
copies. Its partner of the same index on every other node holds the sum of slice i there, so these form a ring of their
own, one per slice: every link is busy, and only summed slices cross the network. The owner of a slice updates it in the
one copy of the weights. This is the two-level scheme of hierarchical all-reduce (as in Jia et al., "Highly scalable
deep learning training system with mixed-precision", 2018, section 3.3) with shared memory for the inner level.

Where nodes hold different numbers of ranks, there are as many slices as the smallest node has ranks; the others'
gradients count all the same.

Ranks tell each other how far they are by flags, each in a cache line of its own: a count that only rises, written
after `Win.Sync`, a memory barrier (MPI 4.1, section 12.7.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from numpy.typing import NDArray

from mpitrain.comm import ring
from mpitrain.comm.buckets import Bucket
from mpitrain.comm.buffers import Transport
from mpitrain.comm.exchange import Exchange
from mpitrain.runtime.agree import Comm, collect
from mpitrain.split import part

PAGE = 4096
ALIGNMENT = 32  # elements: every bucket begins on a cache line of its own, in bf16 too
FLAG_STRIDE = 8  # int64, a cache line
FILLED, READ, WRITTEN = range(3)  # what flags count: buckets with gradients, buckets summed, rounds of weights


def _pages(num_bytes: int) -> int:
    return -(-num_bytes // PAGE) * PAGE


@dataclass(frozen=True)
class Layout:
    """Where things lie in a node's window, which holds `num_elements` of weights and, per rank, of gradients."""

    num_ranks: int
    num_elements: int
    itemsize: int

    @classmethod
    def of(cls, num_ranks: int, buckets: Sequence[Bucket], dtype: torch.dtype) -> Layout:
        """For these buckets, one after the other."""
        return cls(num_ranks, offsets_of(buckets)[-1], dtype.itemsize)

    @property
    def weights(self) -> int:
        """Byte at which the weights begin, behind the flags."""
        return _pages(3 * self.num_ranks * FLAG_STRIDE * 8)

    @property
    def gradients(self) -> int:
        """Byte at which the gradients of local rank 0 begin."""
        return self.weights + _pages(self.num_elements * self.itemsize)

    @property
    def row(self) -> int:
        """Bytes of a rank's gradients."""
        return _pages(4 * self.num_elements)

    def segment(self, rank: int) -> tuple[int, int]:
        """Bounds of what a rank brings: its gradients, and local rank 0 all that is held once."""
        return (self.gradients + rank * self.row) if rank else 0, self.gradients + (rank + 1) * self.row


def offsets_of(buckets: Sequence[Bucket]) -> list[int]:
    """Where each bucket begins in the flat memory of all, and where the last one ends; in elements."""
    return list(accumulate((-(-bucket.size // ALIGNMENT) * ALIGNMENT for bucket in buckets), initial=0))


@dataclass(frozen=True)
class _Share:
    """This rank's part in the reduction of one bucket.

    Attributes:
        rows: [num_ranks, size of the slice], everybody's gradients of this rank's slice.
        summed: [size of the slice], their sum.
        weights: [size of the slice].
    """

    rows: torch.Tensor
    summed: torch.Tensor
    weights: torch.Tensor


class NodeExchange(Exchange):
    """The ranks of a node share gradients and weights; CPU only."""

    def __init__(
        self,
        data_axis: Comm,
        transport: Transport,
        *,
        wire_dtype: torch.dtype | None = None,
        node: Comm | None = None,
    ) -> None:
        """Find the partners on other nodes (collective).

        Args:
            data_axis: this rank's data group.
            transport: how to wait, and how slices travel between nodes.
            wire_dtype: of partial sums between nodes, if not fp32.
            node: the ranks of the group that share memory with this one; found, if not given. Freed by `close`.
        """
        super().__init__(data_axis, transport)
        self._wire_dtype = wire_dtype
        self._node = node or Comm(self.comm.Split_type(MPI.COMM_TYPE_SHARED, key=self.comm.rank))
        self._num_slices = min(collect(self.comm, self._node.size))
        # Who has no slice has no partners either, and forms a ring of one with nothing to say.
        has_slice = self._node.rank < self._num_slices
        self._partners = Comm(self.comm.Split(self._node.rank if has_slice else self.comm.size + self.comm.rank))
        self._has_slice = has_slice
        self._shares: list[_Share] = []
        self._window: MPI.Win | None = None
        self._flags: NDArray[np.int64] = np.zeros((3, self._node.size), np.int64)

    def adopt(self, buckets: Sequence[Bucket], dtype: torch.dtype) -> None:
        """Memory in the node's window."""
        self.buckets = buckets
        layout = Layout.of(self._node.size, buckets, dtype)
        whole = self._open_window(layout)
        elements = slice(0, layout.num_elements)
        weights = whole[layout.weights : layout.gradients].view(dtype)[elements]
        rows = whole[layout.gradients :].view(torch.float32).view(layout.num_ranks, -1)[:, elements]
        for bucket, offset in zip(buckets, offsets_of(buckets), strict=False):
            self._adopt(bucket, weights[offset : offset + bucket.size], rows[:, offset : offset + bucket.size])
        self._node.Barrier()

    def _open_window(self, layout: Layout) -> torch.Tensor:
        """The node's shared memory as bytes."""
        node = self._node
        start, stop = layout.segment(node.rank)
        self._window = window = MPI.Win.Allocate_shared(stop - start, 1, comm=node)
        window.Lock_all()
        addresses = [window.Shared_query(rank)[0].address for rank in range(node.size)]
        assert [address - addresses[0] for address in addresses] == [layout.segment(r)[0] for r in range(node.size)]
        memory: Any = MPI.buffer.fromaddress(addresses[0], layout.segment(node.size - 1)[1])
        self._flags = np.frombuffer(memory, np.int64, 3 * node.size * FLAG_STRIDE).reshape(3, node.size, -1)[:, :, 0]
        self._flags[:, node.rank] = 0
        return torch.frombuffer(memory, dtype=torch.uint8)

    def _adopt(self, bucket: Bucket, weights: torch.Tensor, rows: torch.Tensor) -> None:
        start, stop = part(self._node.rank, bucket.size, self._num_slices) if self._has_slice else (0, 0)
        mine = slice(start, stop)
        summed = torch.empty(stop - start) if self._node.size > 1 else rows[0, mine]
        self._shares.append(_Share(rows[:, mine], summed, weights[mine]))
        first, last = part(self._partners.rank, stop - start, self._partners.size)
        own_gradients = rows[self._node.rank]
        own_gradients.zero_()  # by its owner, so that the pages lie in this rank's memory domain
        bucket.attach(weights, own_gradients, (start + first, start + last), summed[first:last])

    def begin(self) -> None:
        """Wait until the others have read this rank's gradients of the step before."""
        self._wait_for(READ, self.transport)
        super().begin()

    def reduce(self, number: int) -> None:
        """Sum the own slice over the node, then that sum over nodes."""
        self._raise(FILLED)
        self._wait_for(FILLED, self.patient)
        share = self._shares[number]
        if self._node.size == 2:
            torch.add(share.rows[0], share.rows[1], out=share.summed)  # twice as fast as the general sum
        elif self._node.size > 2:
            torch.sum(share.rows, 0, out=share.summed)
        self._raise(READ)
        ring.reduce_scatter(self._partners, share.summed, self.patient, self._wire_dtype)

    def spread(self) -> None:
        """Fetch from partners what they own of the slice; then wait for the other slices of the node."""
        for share in self._shares:
            ring.all_gather(self._partners, share.weights, self.transport)
        self._raise(WRITTEN)
        self._wait_for(WRITTEN, self.transport)

    def close(self) -> None:
        """Give window and communicators back; the parameters are empty after this."""
        super().close()
        self._shares = []
        if self._window is not None:
            self._window.Unlock_all()
            self._window.Free()
        self._partners.Free()
        self._node.Free()

    def _raise(self, flag: int) -> None:
        assert self._window is not None
        self._window.Sync()  # what was written before is seen by whoever sees the flag
        self._flags[flag, self._node.rank] += 1

    def _wait_for(self, flag: int, transport: Transport) -> None:
        """Return once every rank of the node has come as far as this one."""
        assert self._window is not None
        wanted = self._flags[flag, self._node.rank]
        transport.wait_until(lambda: bool((self._flags[flag] >= wanted).all()))
        self._window.Sync()
