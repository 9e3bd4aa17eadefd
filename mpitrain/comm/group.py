"""What the ranks of a tensor group exchange: rows gathered before shared layers, partial sums scattered behind them.

Ranks that share memory write what others need into a slab of their own, raise a flag, and read each other's slabs:
nothing is copied that its reader has not asked for, and the reader adds while it reads. Slabs have two halves, used in
turns: who has seen everybody's flag of one round knows that nobody still reads the half of the round before. Other
ranks send messages, each to each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from ctypes import memmove
from functools import lru_cache
from math import prod
from time import perf_counter
from typing import Any

import torch
from mpi4py import MPI

from mpitrain.comm.buffers import Transport
from mpitrain.comm.window import HEADROOM, PAGE, Flags, free_shared_memory
from mpitrain.runtime.agree import Comm, collect
from mpitrain.runtime.device import place_on_node
from mpitrain.split import part

SLAB = 1 << 20  # bytes of a round, few enough to stay in caches until they are read
TAG = 11

Bounds = Sequence[tuple[int, int]]


@lru_cache(maxsize=1024)
def cut_rows(num_rows: int, width: int, size: int) -> Bounds:
    """Bounds of each rank's elements among those of [num_rows, width]."""
    cuts = (part(rank, num_rows, size) for rank in range(size))
    return [(start * width, stop * width) for start, stop in cuts]


def _count(bounds: tuple[int, int], first: int, step: int) -> int:
    """Elements of a rank in the round that begins with its element `first`."""
    return max(0, min(step, bounds[1] - bounds[0] - first))


class TensorGroup(ABC):
    """Ranks that share layers, as `model.tensor_parallel.Group` describes them; all make the same calls.

    Attributes:
        way: by which data go, in words.
        seconds: in all calls so far, waiting for others included.
    """

    way: str

    def __init__(self, axis: Comm, transport: Transport) -> None:
        """A group of the ranks of `axis`."""
        self.rank, self.size = axis.rank, axis.size
        self.seconds = 0.0
        self._transport = transport
        self._others = [rank for rank in range(self.size) if rank != self.rank]

    def gather_rows(self, own: torch.Tensor, num_rows: int) -> torch.Tensor:
        """[own rows, n] of each rank to [num_rows, n]; rows are cut by `split.part`."""
        began = perf_counter()
        whole = own.new_empty((num_rows, *own.shape[1:]))
        self._gather(own.contiguous(), whole, cut_rows(num_rows, prod(own.shape[1:]), self.size))
        self.seconds += perf_counter() - began
        return whole

    def scatter_sum(self, partial: torch.Tensor) -> torch.Tensor:
        """[num_rows, n] of each rank to the own rows of their sum, added up in the order of ranks, rounded once."""
        began = perf_counter()
        start, stop = part(self.rank, len(partial), self.size)
        own = partial.new_empty((stop - start, *partial.shape[1:]))
        self._scatter(partial.contiguous(), own, cut_rows(len(partial), prod(own.shape[1:]), self.size))
        self.seconds += perf_counter() - began
        return own

    @abstractmethod
    def _gather(self, own: torch.Tensor, whole: torch.Tensor, bounds: Bounds) -> None:
        """Fill `whole`, in which rank i's elements have the i-th bounds; all tensors are contiguous."""

    @abstractmethod
    def _scatter(self, partial: torch.Tensor, own: torch.Tensor, bounds: Bounds) -> None:
        """Fill `own`."""

    @abstractmethod
    def close(self) -> None:
        """Give memory and communicator back (collective)."""


class MessageGroup(TensorGroup):
    """Every rank sends every other what that one needs."""

    way = "tensor groups send messages"

    def __init__(self, axis: Comm, transport: Transport) -> None:
        """A group of the ranks of `axis`, in a duplicate of it (collective)."""
        super().__init__(axis, transport)
        self._comm = Comm(axis.Dup())

    def _gather(self, own: torch.Tensor, whole: torch.Tensor, bounds: Bounds) -> None:
        own, whole = own.view(-1), whole.view(-1)
        whole[slice(*bounds[self.rank])] = own
        leaving = dict.fromkeys(self._others, own)
        sizes = [stop - start for start, stop in bounds]
        for rank, values in self._exchange(leaving, sizes, own.dtype):
            whole[slice(*bounds[rank])] = values

    def _scatter(self, partial: torch.Tensor, own: torch.Tensor, bounds: Bounds) -> None:
        own, partial = own.view(-1), partial.view(-1)
        leaving = {rank: partial[slice(*bounds[rank])] for rank in self._others}
        arrived = dict(self._exchange(leaving, [len(own)] * self.size, own.dtype))
        arrived[self.rank] = partial[slice(*bounds[self.rank])]
        add_up([arrived[rank] for rank in range(self.size)], own)

    def _exchange(
        self, leaving: dict[int, torch.Tensor], sizes: list[int], dtype: torch.dtype
    ) -> list[tuple[int, torch.Tensor]]:
        """What comes from each of the others, so many elements, for what goes to them."""
        comm, transport = self._comm, self._transport
        arriving = {rank: transport.post(comm, (sizes[rank],), dtype, rank, TAG) for rank in self._others}
        sent = [transport.send(comm, leaving[rank], rank, TAG) for rank in self._others]
        found = [(rank, parcel.received()) for rank, parcel in arriving.items()]
        for parcel in sent:
            parcel.sent()
        return found

    def close(self) -> None:
        """Give the communicator back."""
        self._comm.Free()


class MemoryGroup(TensorGroup):
    """Ranks of one host read each other's slabs; CPU only."""

    way = "tensor groups share memory"

    def __init__(self, axis: Comm, transport: Transport) -> None:
        """A group of the ranks of `axis`, which share memory (collective)."""
        super().__init__(axis, transport)
        flags = Flags.num_bytes(self.size, 1)
        own = 2 * SLAB + (flags if self.rank == 0 else 0)
        self._window = MPI.Win.Allocate_shared(own, 1, comm=axis)
        self._window.Lock_all()
        everything: Any = MPI.buffer.fromaddress(self._window.Shared_query(0)[0].address, flags + self.size * 2 * SLAB)
        self._flags = Flags(everything, self._window, axis, 1)
        self._slabs = torch.frombuffer(everything, dtype=torch.uint8)[flags:].view(self.size, 2, SLAB)
        self._slabs[self.rank].zero_()  # by its owner, so that the pages lie in this rank's memory domain
        self._places = [[half.data_ptr() for half in slab] for slab in self._slabs]
        # MPI need not go on with what was sent to other stages unless it is called, and they may wait for that.
        self._progress = axis.Iprobe
        self._half = 0
        self._views = lru_cache(maxsize=1024)(self._view)
        axis.Barrier()

    def _gather(self, own: torch.Tensor, whole: torch.Tensor, bounds: Bounds) -> None:
        itemsize, source, target = own.element_size(), own.data_ptr(), whole.data_ptr()
        step = SLAB // itemsize
        for first in range(0, bounds[0][1], step):  # nobody has more rows than rank 0
            half = self._half = 1 - self._half
            start, count = bounds[self.rank][0] + first, _count(bounds[self.rank], first, step)
            memmove(self._places[self.rank][half], source + first * itemsize, count * itemsize)
            self._flags.rise(0)
            memmove(target + start * itemsize, source + first * itemsize, count * itemsize)
            self._flags.wait_for(0, self._transport, self._progress)
            for rank in self._others:
                num_bytes = _count(bounds[rank], first, step) * itemsize
                memmove(target + (bounds[rank][0] + first) * itemsize, self._places[rank][half], num_bytes)

    def _scatter(self, partial: torch.Tensor, own: torch.Tensor, bounds: Bounds) -> None:
        itemsize, source = own.element_size(), partial.data_ptr()
        step = SLAB // self.size // itemsize
        for first in range(0, bounds[0][1], step):
            half = self._half = 1 - self._half
            for rank in self._others:
                place = self._places[self.rank][half] + rank * step * itemsize
                num_bytes = _count(bounds[rank], first, step) * itemsize
                memmove(place, source + (bounds[rank][0] + first) * itemsize, num_bytes)
            self._flags.rise(0)
            self._flags.wait_for(0, self._transport, self._progress)
            start, count = bounds[self.rank][0] + first, _count(bounds[self.rank], first, step)
            parts = [self._views(rank, half, own.dtype, step, count) for rank in range(self.size)]
            parts[self.rank] = partial.view(-1)[start : start + count]
            add_up(parts, own.view(-1)[first : first + count])

    def _view(self, rank: int, half: int, dtype: torch.dtype, step: int, count: int) -> torch.Tensor:
        """What a rank has left for this one."""
        slab: torch.Tensor = self._slabs[rank, half].view(dtype)
        return slab[self.rank * step :][:count]

    def close(self) -> None:
        """Give the memory back; all views of it dangle after this."""
        self._views.cache_clear()
        self._slabs = torch.empty(0)
        self._flags.forget()
        self._window.Unlock_all()
        self._window.Free()


def add_up(parts: Sequence[torch.Tensor], out: torch.Tensor) -> None:
    """Sum in the order given, rounded once, of tensors of one shape and dtype."""
    if len(parts) <= 2:
        torch.add(parts[0], parts[1], out=out) if len(parts) == 2 else out.copy_(parts[0])
        return
    exact = torch.promote_types(out.dtype, torch.float32)
    total = out if out.dtype == exact else torch.empty_like(out, dtype=exact)
    torch.add(parts[0], parts[1], out=total) if total is out else total.copy_(parts[0]).add_(parts[1])
    for each in parts[2:]:
        total += each
    if total is not out:
        out.copy_(total)


def open_group(world: Comm, axis: Comm, transport: Transport) -> TensorGroup:
    """The group of the ranks of `axis`, in shared memory if it has room for all groups (collective over `world`)."""
    if axis.size == 1:
        return MessageGroup(axis, transport)
    host = axis.Split_type(MPI.COMM_TYPE_SHARED)
    together = host.size == axis.size and transport.device.type == "cpu"
    host.Free()
    free = free_shared_memory()  # before anybody takes any: the next call waits for all
    needed = (2 * SLAB + PAGE) * place_on_node(world)[1]
    has_room = free is None or needed + HEADROOM <= free
    shares = all(collect(axis, together and has_room))
    return MemoryGroup(axis, transport) if shares else MessageGroup(axis, transport)
