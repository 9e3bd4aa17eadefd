"""Gradients summed and weights kept in memory that the ranks of a node share; rings between nodes.

Gradients are produced in a window (`window.py`). Local rank i sums slice i of everybody's gradients, by reading them:
no messages, no copies. Its partner of the same index on every other node holds the sum of slice i there, so these form
a ring of their own, one per slice: every link is busy, and only summed slices cross the network. The owner of a slice
updates it in the one copy of the weights. This is the two-level scheme of hierarchical all-reduce (as in Jia et al.,
"Highly scalable deep learning training system with mixed-precision", 2018, section 3.3) with shared memory for the
inner level.

Where nodes hold different numbers of ranks, there are as many slices as the smallest node has ranks; the others'
gradients count all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mpitrain.comm import ring, rows
from mpitrain.comm.buckets import Bucket, square_sum
from mpitrain.comm.buffers import Transport
from mpitrain.comm.exchange import Exchange
from mpitrain.comm.segments import Landing
from mpitrain.comm.window import FILLED, WRITTEN, Layout, Window
from mpitrain.runtime.agree import Comm, collect
from mpitrain.runtime.survive import can_survive
from mpitrain.split import UNIT, aligned_part

CHUNK = 1 << 18  # elements


@dataclass(frozen=True)
class _Share:
    """This rank's part in the reduction of one bucket: a slice of it.

    Attributes:
        start: where in the bucket the slice begins.
        summed: [size of the slice], of this rank's own gradients, which nobody else reads: here the sum appears.
        others: [size of the slice] each, of the other ranks of the node, in the order of their ranks.
        lists: of the other ranks, as in `Window`.
        weights: [size of the slice].
        chunks: `summed` and `others` cut at the same places, for as many elements as stay in a core's cache.
    """

    start: int
    summed: torch.Tensor
    others: list[torch.Tensor]
    lists: list[torch.Tensor]
    weights: torch.Tensor
    chunks: list[tuple[torch.Tensor, ...]]


class NodeExchange(Exchange):
    """The ranks of a node share gradients and weights; CPU only."""

    name = "shared memory"

    def __init__(
        self,
        data_axis: Comm,
        node: Comm,
        transport: Transport,
        buckets: Sequence[Bucket],
        dtype: torch.dtype,
        *,
        wire_dtype: torch.dtype | None = None,
        error_feedback: bool = False,
        overlapped: bool = True,
    ) -> None:
        """Give the buckets memory in the node's window (collective).

        Args:
            data_axis: the data group.
            node: its ranks that share memory with this one, in the same order; freed by `close`.
            transport: how to wait, and how slices travel between nodes.
            buckets: without memory yet.
            dtype: of the weights.
            wire_dtype: of partial sums between nodes, if not fp32.
            error_feedback: send what rounding has lost the next time.
            overlapped: `reduce` is called in a thread beside the backward pass; not done where ranks share cores and
                nothing is sent, as such a thread would only take its core from another rank.
        """
        overlapped = overlapped and not (transport.patient and node.size == data_axis.size)
        super().__init__(
            transport, buckets, wire_dtype=wire_dtype, error_feedback=error_feedback, overlapped=overlapped
        )
        self._node = node
        self._num_slices = min(collect(data_axis, node.size))
        # Who has no slice has no partners either, and forms a ring of one with nothing to say.
        has_slice = node.rank < self._num_slices
        self._partners = Comm(data_axis.Split(node.rank if has_slice else data_axis.size + data_axis.rank))
        self._alone = self._partners.size == 1
        # MPI need not go on with what was sent to other nodes unless it is called, nor tell that a rank died.
        probed = node if can_survive() else self._partners
        self._progress = None if probed.size == 1 else probed.Iprobe
        self._window = Window(node, Layout.of(node.size, buckets, dtype), dtype)
        self._shares = [self._adopt(number, bucket) for number, bucket in enumerate(buckets)]
        landing = Landing()
        self._sums: list[ring.ReduceScatter] = []
        for share in self._shares:
            wire = self._add_wire(self._partners, share.start, len(share.summed))
            self._sums.append(ring.ReduceScatter(self._partners, share.summed, self.reducing, wire, landing))
        self._gathers = [ring.AllGather(self._partners, share.weights, transport) for share in self._shares]
        node.Barrier()

    def _adopt(self, number: int, bucket: Bucket) -> _Share:
        node, window = self._node, self._window
        start, stop = aligned_part(node.rank, bucket.size, self._num_slices) if node.rank < self._num_slices else (0, 0)
        weights, gradients, lists = (part[number] for part in (window.weights, window.gradients, window.lists))
        ranks = [node.rank, *(rank for rank in range(node.size) if rank != node.rank)]
        summed, *others = (gradients[rank, start:stop] for rank in ranks)
        chunks = list(zip(*(torch.split(part, CHUNK) for part in (summed, *others)), strict=True))
        share = _Share(start, summed, others, [lists[rank] for rank in ranks[1:]], weights[start:stop], chunks)
        first, last = aligned_part(self._partners.rank, stop - start, self._partners.size)
        bucket.attach(weights, gradients[node.rank], (start + first, start + last), share.summed[first:last])
        return share

    @property
    def comms(self) -> list[Comm]:
        """Of the node, and of those with the same slice on others."""
        return [self._node, self._partners]

    def reduce(self, number: int) -> None:
        """Sum the own slice over the node, then that sum over nodes."""
        bucket = self.buckets[number]
        touched = self._announce_rows(number) if bucket.num_rows else None
        self._window.flags.rise(FILLED)
        self._window.flags.wait_for(FILLED, self.reducing, self._progress)
        if touched is not None:
            self._reduce_rows(number, touched)
            return
        wanted = self._alone and self.wants_squares
        squares: list[torch.Tensor] = []
        for summed, *others in self._shares[number].chunks:
            for other in others:
                summed += other
            # These sums are final, and still in the core's cache: who clips need not read them again.
            if wanted:
                squares.append(square_sum(summed))
        if wanted:
            bucket.squares = float(sum(squares))
        self._sums[number]()

    def _announce_rows(self, number: int) -> torch.Tensor:
        """Write down for the others, and return, which rows of the table this rank has gradients of."""
        touched = self.buckets[number].touched_rows()
        own = self._window.lists[number][self._node.rank]
        own[0] = len(touched)
        own[1 : 1 + len(touched)] = touched
        return touched

    def _reduce_rows(self, number: int, touched_rows: torch.Tensor) -> None:
        """As `reduce`, of what is not zero in the slice: whole blocks of it."""
        bucket, share = self.buckets[number], self._shares[number]
        stop = share.start + len(share.summed)
        shape = (len(share.summed) // UNIT, UNIT)
        summed = share.summed.view(shape)
        blocks = [bucket.blocks_of(touched_rows, share.start, stop)]
        for other, found in zip(share.others, share.lists, strict=True):
            theirs = bucket.blocks_of(found[1 : 1 + int(found[0])].long(), share.start, stop)
            summed.index_add_(0, theirs, other.view(shape).index_select(0, theirs))
            blocks.append(theirs)
        touched = torch.unique(torch.cat(blocks))
        if self._alone and self.wants_squares:
            bucket.squares = float(square_sum(summed.index_select(0, touched)))
        arrived = rows.reduce_scatter(
            self._partners, share.summed, touched, self.reducing, self._wires[number], self._sums[number]
        )
        bucket.spoil(torch.cat([touched, arrived]) + share.start // UNIT if arrived is not None else None)

    def spread(self) -> None:
        """Fetch from partners what they own of the slice; then wait for the other slices of the node."""
        for gather in self._gathers:
            gather()
        self._window.flags.rise(WRITTEN)
        self._window.flags.wait_for(WRITTEN, self.transport, self._progress)

    def close(self) -> None:
        """Give window and communicators back too."""
        super().close()
        self._shares, self._sums, self._gathers = [], [], []
        self._window.close()
        self._partners.Free()
        self._node.Free()
