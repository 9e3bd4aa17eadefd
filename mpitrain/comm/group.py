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
def cut_rows(num_rows: int, size: int) -> Bounds:
    """Bounds of each rank's rows."""
    return [part(rank, num_rows, size) for rank in range(size)]


def _count(bounds: tuple[int, int], first: int, step: int) -> int:
    """Rows of a rank in the round that begins with its row `first`."""
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
        whole = own.new_empty((num_rows, own.shape[1]))
        self._gather(own.contiguous(), whole, cut_rows(num_rows, self.size))
        self.seconds += perf_counter() - began
        return whole

    def scatter_sum(self, partial: torch.Tensor) -> torch.Tensor:
        """[num_rows, n] of each rank to the own rows of their sum, added up in the order of ranks, rounded once."""
        began = perf_counter()
        own = self._scatter(partial.contiguous(), cut_rows(len(partial), self.size))
        self.seconds += perf_counter() - began
        return own

    @abstractmethod
    def _gather(self, own: torch.Tensor, whole: torch.Tensor, bounds: Bounds) -> None:
        """Fill `whole`, in which rank i's rows have the i-th bounds; all tensors are contiguous."""

    @abstractmethod
    def _scatter(self, partial: torch.Tensor, bounds: Bounds) -> torch.Tensor:
        """The own rows of the sum."""

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
        whole[slice(*bounds[self.rank])] = own
        leaving = dict.fromkeys(self._others, own)
        for rank, values in self._exchange(leaving, bounds):
            whole[slice(*bounds[rank])] = values

    def _scatter(self, partial: torch.Tensor, bounds: Bounds) -> torch.Tensor:
        leaving = {rank: partial[slice(*bounds[rank])] for rank in self._others}
        arrived = dict(self._exchange(leaving, [bounds[self.rank]] * self.size))
        arrived[self.rank] = partial[slice(*bounds[self.rank])]
        return add_up([arrived[rank] for rank in range(self.size)])

    def _exchange(self, leaving: dict[int, torch.Tensor], bounds: Bounds) -> list[tuple[int, torch.Tensor]]:
        """What comes from each of the others, rows within its bounds, for what goes to them."""
        comm, transport, arriving = self._comm, self._transport, {}
        for rank, values in leaving.items():
            shape = (bounds[rank][1] - bounds[rank][0], values.shape[1])
            arriving[rank] = transport.post(comm, shape, values.dtype, rank, TAG)
        sent = [transport.send(comm, values, rank, TAG) for rank, values in leaving.items()]
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
        row, source, target = own.shape[1] * own.itemsize, own.data_ptr(), whole.data_ptr()
        step = SLAB // row
        for first in range(0, bounds[0][1], step):  # nobody has more rows than rank 0
            half = self._half = 1 - self._half
            start, num_bytes = bounds[self.rank][0] + first, _count(bounds[self.rank], first, step) * row
            memmove(self._places[self.rank][half], source + first * row, num_bytes)
            self._flags.rise(0)
            memmove(target + start * row, source + first * row, num_bytes)
            self._flags.wait_for(0, self._transport, self._progress)
            for rank in self._others:
                start, num_bytes = bounds[rank][0] + first, _count(bounds[rank], first, step) * row
                memmove(target + start * row, self._places[rank][half], num_bytes)

    def _scatter(self, partial: torch.Tensor, bounds: Bounds) -> torch.Tensor:
        width, row, source = partial.shape[1], partial.shape[1] * partial.itemsize, partial.data_ptr()
        step, found = SLAB // self.size // row, []
        for first in range(0, max(bounds[0][1], 1), step):
            half = self._half = 1 - self._half
            for rank in self._others:
                place, start = self._places[self.rank][half] + rank * step * row, bounds[rank][0] + first
                memmove(place, source + start * row, _count(bounds[rank], first, step) * row)
            self._flags.rise(0)
            count = _count(bounds[self.rank], first, step)
            parts = [self._views(rank, half, partial.dtype, step, count, width) for rank in self._others]
            parts.insert(self.rank, partial.narrow(0, bounds[self.rank][0] + first, count))
            self._flags.wait_for(0, self._transport, self._progress)
            found.append(add_up(parts))
        return found[0] if len(found) == 1 else torch.cat(found)

    def _view(self, rank: int, half: int, dtype: torch.dtype, step: int, count: int, width: int) -> torch.Tensor:
        """Of shape [count, width], what a rank has left for this one."""
        slab: torch.Tensor = self._slabs[rank, half].view(dtype)
        return slab[self.rank * step * width :][: count * width].view(count, width)

    def close(self) -> None:
        """Give the memory back; all views of it dangle after this."""
        self._views.cache_clear()
        self._slabs = torch.empty(0)
        self._flags.forget()
        self._window.Unlock_all()
        self._window.Free()


def add_up(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum in the order given, rounded once, of tensors of one shape and dtype."""
    first, *others = parts
    if len(others) > 1:
        first = first.to(torch.promote_types(first.dtype, torch.float32))
    total = first + others[0] if others else first.clone()
    for each in others[1:]:
        total += each
    return total.to(parts[0].dtype)


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
