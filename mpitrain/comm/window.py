"""Memory that the ranks of a node share (an MPI-3 window), laid out for weights and gradients, with flags to wait on.

    | flags | weights, one copy for all | gradients and row numbers of local rank 0 | of local rank 1 | ...

Ranks tell each other how far they are by flags, each in a cache line of its own: a count that only rises, written
after `Win.Sync`, which orders memory accesses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mpi4py import MPI

from mpitrain.comm.buckets import Bucket
from mpitrain.comm.buffers import Transport
from mpitrain.runtime.agree import Comm

PAGE = 4096
FLAG_STRIDE = 8  # int64, a cache line
FILLED, WRITTEN = KINDS = range(2)  # what flags count: buckets with gradients, rounds of weights

HEADROOM = 64 << 20  # bytes left to others, MPI's own buffers among them


def pages(num_bytes: int) -> int:
    """Bytes of the whole pages that hold so many."""
    return -(-num_bytes // PAGE) * PAGE


@dataclass(frozen=True)
class Layout:
    """Where things lie in a node's window, in bytes.

    Attributes:
        num_ranks: of the node.
        sizes: elements of each bucket.
        num_rows: of each bucket whose gradient is a few rows of a table, 0 for others.
        itemsize: of a weight.
    """

    num_ranks: int
    sizes: tuple[int, ...]
    num_rows: tuple[int, ...]
    itemsize: int

    @classmethod
    def of(cls, num_ranks: int, buckets: Sequence[Bucket], dtype: torch.dtype) -> Layout:
        """For these buckets, one after the other."""
        num_rows = tuple(bucket.num_rows for bucket in buckets)
        return cls(num_ranks, tuple(bucket.size for bucket in buckets), num_rows, dtype.itemsize)

    @property
    def weights(self) -> int:
        """Where the weights begin, behind the flags."""
        return Flags.num_bytes(self.num_ranks, len(KINDS))

    @property
    def gradients(self) -> int:
        """Where the gradients of local rank 0 begin."""
        return self.weights + pages(sum(self.sizes) * self.itemsize)

    @property
    def lists(self) -> int:
        """Where, from the beginning of a rank's gradients on, its lists of row numbers begin."""
        return pages(4 * sum(self.sizes))

    @property
    def stride(self) -> int:
        """From a rank's gradients to the next rank's."""
        return self.lists + pages(4 * sum(1 + count for count in self.num_rows))

    def segment(self, rank: int) -> tuple[int, int]:
        """Bounds of what a rank brings: its gradients, and local rank 0 all that is held once."""
        return (self.gradients + rank * self.stride) if rank else 0, self.gradients + (rank + 1) * self.stride


class Flags:
    """How far each rank is, in each kind of thing."""

    def __init__(self, memory: Any, window: MPI.Win, node: Comm, num_kinds: int) -> None:
        """At the beginning of `memory` that all ranks of `node` see; a barrier must come before their first use."""
        self._window, self._rank = window, node.rank
        size = node.size * FLAG_STRIDE
        flags = memory[: num_kinds * size * 8].cast("q")
        self._kinds = [flags[kind * size : (kind + 1) * size : FLAG_STRIDE] for kind in range(num_kinds)]
        for kind in self._kinds:
            kind[node.rank] = 0

    @staticmethod
    def num_bytes(num_ranks: int, num_kinds: int) -> int:
        """Whole pages of memory that flags take."""
        return pages(num_kinds * num_ranks * FLAG_STRIDE * 8)

    def rise(self, kind: int) -> None:
        """Tell the others that this rank has come one further."""
        self._window.Sync()  # what was written before is seen by whoever sees the flag
        self._kinds[kind][self._rank] += 1

    def wait_for(self, kind: int, transport: Transport, meanwhile: Callable[[], object] | None) -> None:
        """Return once every rank of the node has come as far as this one.

        Args:
            kind: of flag.
            transport: how to wait.
            meanwhile: called before each look.
        """
        flags = self._kinds[kind]
        wanted = flags[self._rank]

        def done() -> bool:
            if meanwhile is not None:
                meanwhile()
            return bool(min(flags.tolist()) >= wanted)

        if min(flags.tolist()) < wanted:
            transport.wait_until(done)
        self._window.Sync()

    def forget(self) -> None:
        """The memory, which is given back."""
        self._kinds = []


class Window:
    """A node's shared memory.

    Attributes:
        weights: of each bucket, [size] in their dtype, the same memory on all ranks.
        gradients: of each bucket, fp32 [num_ranks, size].
        flags: of both kinds.
        lists: of each bucket, int32 [num_ranks, 1 + num_rows]: how many rows of the table a rank's gradient has, and
            their numbers.
    """

    def __init__(self, node: Comm, layout: Layout, dtype: torch.dtype) -> None:
        """Allocate (collective over `node`); gradients are zero."""
        start, stop = layout.segment(node.rank)
        self._window = MPI.Win.Allocate_shared(stop - start, 1, comm=node)
        self._window.Lock_all()
        addresses = [self._window.Shared_query(rank)[0].address for rank in range(node.size)]
        assert [address - addresses[0] for address in addresses] == [layout.segment(r)[0] for r in range(node.size)]
        memory: Any = MPI.buffer.fromaddress(addresses[0], layout.segment(node.size - 1)[1])
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        self.weights = list(
            torch.split(whole[layout.weights : layout.gradients].view(dtype)[: sum(layout.sizes)], list(layout.sizes))
        )
        ranks = whole[layout.gradients :].view(node.size, layout.stride)
        self.gradients = list(
            torch.split(ranks[:, : 4 * sum(layout.sizes)].view(torch.float32), list(layout.sizes), dim=1)
        )
        ranks[node.rank].zero_()  # by its owner, so that the pages lie in this rank's memory domain
        list_sizes = [1 + count for count in layout.num_rows]
        lists = ranks[:, layout.lists : layout.lists + 4 * sum(list_sizes)].view(torch.int32)
        self.lists = list(torch.split(lists, list_sizes, dim=1))
        self.flags = Flags(memory, self._window, node, len(KINDS))
        node.Barrier()

    def close(self) -> None:
        """Give the memory back; all views of it dangle after this (collective)."""
        self.weights, self.gradients, self.lists = [], [], []
        self.flags.forget()
        self._window.Unlock_all()
        self._window.Free()
