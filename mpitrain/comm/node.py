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
after `Win.Sync`, which orders memory accesses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mpi4py import MPI

from mpitrain.comm import ring
from mpitrain.comm.buckets import Bucket
from mpitrain.comm.buffers import Transport
from mpitrain.comm.exchange import Exchange
from mpitrain.runtime.agree import Comm, collect
from mpitrain.split import aligned_part

PAGE = 4096
FLAG_STRIDE = 8  # int64, a cache line
FILLED, WRITTEN = range(2)  # what flags count: buckets with gradients, rounds of weights


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
        return cls(num_ranks, sum(bucket.size for bucket in buckets), dtype.itemsize)

    @property
    def weights(self) -> int:
        """Byte at which the weights begin, behind the flags."""
        return _pages(2 * self.num_ranks * FLAG_STRIDE * 8)

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
        node: Comm,
        transport: Transport,
        buckets: Sequence[Bucket],
        dtype: torch.dtype,
        *,
        wire_dtype: torch.dtype | None = None,
    ) -> None:
        """Give the buckets memory in the node's window (collective).

        Args:
            data_axis: the data group.
            node: its ranks that share memory with this one, in the same order; freed by `close`.
            transport: how to wait, and how slices travel between nodes.
            buckets: without memory yet.
            dtype: of the weights.
            wire_dtype: of partial sums between nodes, if not fp32.
        """
        super().__init__(transport, buckets)
        self._node, self._wire_dtype = node, wire_dtype
        self._num_slices = min(collect(data_axis, node.size))
        # Who has no slice has no partners either, and forms a ring of one with nothing to say.
        has_slice = node.rank < self._num_slices
        self._partners = Comm(data_axis.Split(node.rank if has_slice else data_axis.size + data_axis.rank))
        layout = Layout.of(node.size, buckets, dtype)
        start, stop = layout.segment(node.rank)
        self._window = MPI.Win.Allocate_shared(stop - start, 1, comm=node)
        self._window.Lock_all()
        whole = self._map_window(layout)
        self._flags = whole[: layout.weights].view(torch.int64).numpy()[: 2 * node.size * FLAG_STRIDE]
        self._flags = self._flags.reshape(2, node.size, FLAG_STRIDE)[:, :, 0]
        self._flags[:, node.rank] = 0
        self._shares = [self._adopt(*parts) for parts in zip(buckets, *self._cut(whole, layout, dtype), strict=True)]
        node.Barrier()

    def _map_window(self, layout: Layout) -> torch.Tensor:
        """The node's shared memory as bytes."""
        node = self._node
        addresses = [self._window.Shared_query(rank)[0].address for rank in range(node.size)]
        assert [address - addresses[0] for address in addresses] == [layout.segment(r)[0] for r in range(node.size)]
        memory: Any = MPI.buffer.fromaddress(addresses[0], layout.segment(node.size - 1)[1])
        return torch.frombuffer(memory, dtype=torch.uint8)

    def _cut(
        self, whole: torch.Tensor, layout: Layout, dtype: torch.dtype
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Weights [size] and everybody's gradients [num_ranks, size] of each bucket."""
        sizes = [bucket.size for bucket in self.buckets]
        weights = whole[layout.weights : layout.gradients].view(dtype)[: sum(sizes)]
        rows = whole[layout.gradients :].view(torch.float32).view(layout.num_ranks, -1)[:, : sum(sizes)]
        return list(torch.split(weights, sizes)), list(torch.split(rows, sizes, dim=1))

    def _adopt(self, bucket: Bucket, weights: torch.Tensor, rows: torch.Tensor) -> _Share:
        node = self._node
        start, stop = aligned_part(node.rank, bucket.size, self._num_slices) if node.rank < self._num_slices else (0, 0)
        mine = slice(start, stop)
        share = _Share(rows[:, mine], torch.empty(stop - start) if node.size > 1 else rows[0, mine], weights[mine])
        first, last = aligned_part(self._partners.rank, stop - start, self._partners.size)
        own_gradients = rows[node.rank]
        own_gradients.zero_()  # by its owner, so that the pages lie in this rank's memory domain
        bucket.attach(weights, own_gradients, (start + first, start + last), share.summed[first:last])
        return share

    def reduce(self, number: int) -> None:
        """Sum the own slice over the node, then that sum over nodes."""
        self._raise(FILLED)
        self._wait_for(FILLED, self.patient)
        share = self._shares[number]
        if self._node.size == 2:
            torch.add(share.rows[0], share.rows[1], out=share.summed)  # twice as fast as the general sum
        elif self._node.size > 2:
            torch.sum(share.rows, 0, out=share.summed)
        ring.reduce_scatter(self._partners, share.summed, self.patient, self._wire_dtype)

    def spread(self) -> None:
        """Fetch from partners what they own of the slice; then wait for the other slices of the node."""
        for share in self._shares:
            ring.all_gather(self._partners, share.weights, self.transport)
        self._raise(WRITTEN)
        self._wait_for(WRITTEN, self.transport)

    def close(self) -> None:
        """Give window and communicators back too."""
        super().close()
        self._shares, self._flags = [], self._flags.copy()
        self._window.Unlock_all()
        self._window.Free()
        self._partners.Free()
        self._node.Free()

    def _raise(self, flag: int) -> None:
        self._window.Sync()  # what was written before is seen by whoever sees the flag
        self._flags[flag, self._node.rank] += 1

    def _wait_for(self, flag: int, transport: Transport) -> None:
        """Return once every rank of the node has come as far as this one."""
        wanted = self._flags[flag, self._node.rank]
        transport.wait_until(lambda: self._have_come(flag, wanted))
        self._window.Sync()

    def _have_come(self, flag: int, wanted: int) -> bool:
        if self._partners.size > 1:
            self._partners.Iprobe()  # MPI need not go on with what was sent to other nodes unless it is called
        return bool((self._flags[flag] >= wanted).all())
