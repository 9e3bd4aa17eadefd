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
from mpitrain.comm.window import HEADROOM, PAGE, Flags
from mpitrain.runtime.agree import Comm, collect
from mpitrain.runtime.device import place_on_node
from mpitrain.runtime.library import free_shared_memory
from mpitrain.split import part

SLAB = 1 << 20  # bytes of a round, few enough to stay in caches until they are read
TAG = 11

Bounds = Sequence[tuple[int, int]]
Copy = tuple[int, int, int]  # of a slab an address, of a tensor an offset, and how many, all in bytes


@lru_cache(maxsize=1024)
def cut_rows(num_rows: int, size: int) -> Bounds:
    """Bounds of each rank's rows."""
    return [part(rank, num_rows, size) for rank in range(size)]


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
        whole = self._gather(own.contiguous(), num_rows)
        self.seconds += perf_counter() - began
        return whole

    def scatter_sum(self, partial: torch.Tensor) -> torch.Tensor:
        """[num_rows, n] of each rank to the own rows of their sum, added up in the order of ranks, rounded once.

        The sum is left where the own rows of `partial` were, if that is contiguous: memory less to fill, and to move.
        """
        began = perf_counter()
        partial = partial.detach().contiguous()  # else autograd would take the result for a view of what it knows
        self._scatter(partial)
        self.seconds += perf_counter() - began
        start, stop = cut_rows(len(partial), self.size)[self.rank]
        return partial.narrow(0, start, stop - start)

    @property
    def comms(self) -> list[Comm]:
        """In which this rank may wait for others, besides the axis."""
        return []

    @abstractmethod
    def _gather(self, own: torch.Tensor, num_rows: int) -> torch.Tensor:
        """All rows; `own` is contiguous."""

    @abstractmethod
    def _scatter(self, partial: torch.Tensor) -> None:
        """Leave the sum in the own rows of `partial`, which is contiguous."""

    @abstractmethod
    def close(self) -> None:
        """Give memory and communicator back (collective)."""


class MessageGroup(TensorGroup):
    """Every rank sends every other what that one needs."""

    way = "tensor groups send messages"

    @property
    def comms(self) -> list[Comm]:
        """One of its own."""
        return [self._comm]

    def __init__(self, axis: Comm, transport: Transport) -> None:
        """A group of the ranks of `axis`, in a duplicate of it (collective)."""
        super().__init__(axis, transport)
        self._comm = Comm(axis.Dup())

    def _gather(self, own: torch.Tensor, num_rows: int) -> torch.Tensor:
        bounds, whole = cut_rows(num_rows, self.size), own.new_empty((num_rows, own.shape[1]))
        whole[slice(*bounds[self.rank])] = own
        leaving = dict.fromkeys(self._others, own)
        for rank, values in self._exchange(leaving, bounds):
            whole[slice(*bounds[rank])] = values
        return whole

    def _scatter(self, partial: torch.Tensor) -> None:
        bounds = cut_rows(len(partial), self.size)
        parts = {rank: partial[slice(*bounds[rank])] for rank in range(self.size)}
        leaving = {rank: parts[rank] for rank in self._others}
        parts.update(self._exchange(leaving, [bounds[self.rank]] * self.size))
        add_up(list(parts.values()), parts[self.rank])

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
        self._gathers, self._scatters = lru_cache(1024)(self._plan_gather), lru_cache(1024)(self._plan_scatter)
        axis.Barrier()

    def _gather(self, own: torch.Tensor, num_rows: int) -> torch.Tensor:
        whole = own.new_empty((num_rows, own.shape[1]))
        source, target = own.data_ptr(), whole.data_ptr()
        for leaving, mine, arriving in self._gathers(num_rows, own.shape[1] * own.itemsize, self._half):
            place, start, num_bytes = leaving
            memmove(place, source + start, num_bytes)
            self._flags.rise(0)
            memmove(target + mine, source + start, num_bytes)
            self._flags.wait_for(0, self._transport, self._progress)
            for place, start, num_bytes in arriving:
                memmove(target + start, place, num_bytes)
            self._half = 1 - self._half
        return whole

    def _scatter(self, partial: torch.Tensor) -> None:
        source = partial.data_ptr()
        for leaving, own, views in self._scatters(*partial.shape, partial.dtype, self._half):
            for place, start, num_bytes in leaving:
                memmove(place, source + start, num_bytes)
            self._flags.rise(0)
            parts = views.copy()
            parts[self.rank] = partial.narrow(0, *own)
            self._flags.wait_for(0, self._transport, self._progress)
            add_up(parts, parts[self.rank])
            self._half = 1 - self._half

    def _plan_gather(self, num_rows: int, row: int, half: int) -> list[tuple[Copy, int, list[Copy]]]:
        """Of each round the copy into the own slab, where the same bytes begin in all rows, and the copies from others.

        Source or target in slabs are addresses, in tensors they are offsets; `row` is in bytes.
        """
        bounds, step, plan = cut_rows(num_rows, self.size), SLAB // row, []
        for first in range(0, bounds[0][1], step):  # nobody has more rows than rank 0
            pieces = [
                (places[half], (start + first) * row, max(0, min(step, stop - start - first)) * row)
                for places, (start, stop) in zip(self._places, bounds, strict=True)
            ]
            place, start, num_bytes = pieces[self.rank]
            arriving = [pieces[rank] for rank in self._others]
            plan.append(((place, first * row, num_bytes), start, arriving))
            half = 1 - half
        return plan

    def _plan_scatter(
        self, num_rows: int, width: int, dtype: torch.dtype, half: int
    ) -> list[tuple[list[Copy], tuple[int, int], list[torch.Tensor]]]:
        """Of each round the copies into the own slab, the own rows' begin and number, and what others leave of them."""
        bounds, row, plan = cut_rows(num_rows, self.size), width * dtype.itemsize, []
        step = SLAB // self.size // row
        for first in range(0, max(bounds[0][1], 1), step):
            counts = [max(0, min(step, stop - start - first)) for start, stop in bounds]
            leaving = [
                (self._places[self.rank][half] + rank * step * row, (bounds[rank][0] + first) * row, counts[rank] * row)
                for rank in self._others
            ]
            count, begin = counts[self.rank], self.rank * step * width
            left = [slab[half].view(dtype)[begin : begin + count * width].view(count, width) for slab in self._slabs]
            plan.append((leaving, (bounds[self.rank][0] + first, count), left))
            half = 1 - half
        return plan

    def close(self) -> None:
        """Give the memory back; all views of it dangle after this."""
        self._scatters.cache_clear()
        self._slabs = torch.empty(0)
        self._flags.forget()
        self._window.Unlock_all()
        self._window.Free()


def add_up(parts: Sequence[torch.Tensor], into: torch.Tensor) -> None:
    """Sum in the order given, rounded once, of tensors of one shape and dtype; `into` may be one of them."""
    if len(parts) == 2:
        torch.add(*parts, out=into)
        return
    first, *others = parts
    total = first.to(torch.promote_types(first.dtype, torch.float32), copy=True)
    for each in others:
        total += each
    into.copy_(total)


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
