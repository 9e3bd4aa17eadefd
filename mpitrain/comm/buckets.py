"""Weights and gradients of a stage in flat buckets, so that they travel in few large messages.

Buckets hold whole parameters, last layers first: in backward order they fill one after the other, and the first
can travel while the next is computed. Once attached, `parameter.data` is a view of flat memory, which an exchange has
chosen, and gradients are taken from `parameter.grad` into such memory as they appear: the first micro-batch's are
copied, the others' added, so that nothing is set to zero beforehand. They are fp32 whatever the weights are. Each rank
owns one part of every bucket: it holds the sum of that part's gradients, and its masters.

An embedding table is a bucket of its own. Its gradient is the few rows that were looked up: the rest of the memory is
zero, stays so, and need not travel, as long as rows consist of whole blocks of `split.UNIT` elements.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from mpitrain.split import UNIT, Shard


@dataclass(frozen=True)
class Member:
    """Where a parameter lies in its bucket: elements [start, stop), from a multiple of `split.UNIT` on.

    Attributes:
        shard: what it is of the parameter of the whole model.
    """

    name: str
    parameter: torch.nn.Parameter
    start: int
    stop: int
    shard: Shard

    def slice(self, kind: str, start: int, values: torch.Tensor) -> StateSlice:
        """State of the parameter's own elements from `start` on."""
        start += self.shard.offset
        return StateSlice(kind, self.name, self.shard.shape, start, start + len(values), values, self.shard.columns)


@dataclass(frozen=True)
class Piece:
    """The part of a parameter that this rank owns: elements of the flattened parameter from `start` on.

    Attributes:
        weights: in the compute dtype, as the model reads them.
        master: in fp32; `weights` itself if that is fp32.
        gradients: fp32, summed over replicas once the bucket is reduced.
    """

    member: Member
    start: int
    weights: torch.Tensor
    master: torch.Tensor
    gradients: torch.Tensor

    @property
    def name(self) -> str:
        """Of the parameter."""
        return self.member.name

    @property
    def stop(self) -> int:
        """Where it ends."""
        return self.start + len(self.weights)


@dataclass(frozen=True)
class StateSlice:
    """Elements [start, stop) of a flattened parameter's fp32 master weight or moment, to be saved or filled.

    Attributes:
        shape: of the whole parameter.
        columns: [first, last) if the elements are counted in these columns of it alone.
    """

    kind: str
    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    values: torch.Tensor
    columns: tuple[int, int] | None = None


class Bucket:
    """Some parameters side by side.

    Attributes:
        size: number of elements, gaps included, which are zero.
        weights, gradients: [size], of the compute dtype and fp32, once attached.
        owned: bounds of this rank's own part.
        reduced: fp32 [stop - start of `owned`] of `gradients`, where that part's sum over replicas appears.
        squares: sum of squares of `reduced`, where an exchange has found it on its way, else None.
        num_rows: of a table whose gradients are rows, else 0.
        shared: all ranks of a tensor group have it, and sum up its gradients before their replicas do.
        pieces: the parameters' parts inside the own part.
    """

    weights: torch.Tensor
    gradients: torch.Tensor
    reduced: torch.Tensor
    owned: tuple[int, int]

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
        shards: Mapping[str, Shard] | None = None,
        *,
        by_rows: bool = False,
        shared: bool = False,
    ) -> None:
        """Count; memory is for `attach`. A single table may be treated `by_rows`. Without `shards` all is whole."""
        self.shared = shared
        self.members: list[Member] = []
        self.pieces: list[Piece] = []
        self.size = 0
        self.squares: float | None = None
        self._missing: set[int] = set()
        self._rows: list[torch.Tensor] = []  # touched in this step, by micro-batch
        self._spoilt: list[torch.Tensor] | None = []  # blocks that are not zero any more; None: all
        for name, parameter in named_parameters:
            shard = shards[name] if shards else Shard.whole(*parameter.shape)
            self.members.append(Member(name, parameter, self.size, self.size + parameter.numel(), shard))
            self.size += -(-parameter.numel() // UNIT) * UNIT
        shape = tuple(self.members[0].parameter.shape) if by_rows else ()
        self.num_rows = shape[0] if shape and shape[1] % UNIT == 0 else 0

    def attach(
        self, weights: torch.Tensor, gradients: torch.Tensor, owned: tuple[int, int], reduced: torch.Tensor
    ) -> None:
        """Make the parameters views of this memory, gradients being zero; of the weights each owner writes its part."""
        self.weights, self.gradients, self.owned, self.reduced = weights, gradients, owned, reduced
        for member in self.members:
            self._own(member)
            parameter, extent = member.parameter, slice(member.start, member.stop)
            parameter.grad = None
            parameter.data = weights[extent].view(parameter.shape)
        self.begin()

    def begin(self) -> None:
        """Forget the gradients."""
        self.squares = None
        self._missing = set(range(len(self.members)))
        if self._spoilt is None:
            self.gradients.zero_()
        elif self._rows or self._spoilt:
            blocks = [self.blocks_of(rows) for rows in self._rows]
            self.gradients.view(-1, UNIT).index_fill_(0, torch.cat([*blocks, *self._spoilt]), 0.0)
        self._rows, self._spoilt = [], []

    def take(self, index: int) -> None:
        """Move the gradient that backward has left at a member to the bucket's memory, or add it to what is there."""
        member = self.members[index]
        found, member.parameter.grad = member.parameter.grad, None
        assert found is not None and (found.is_sparse or not self.num_rows), member.name
        held = self.gradients[member.start : member.stop].view(found.shape)
        first = index in self._missing
        self._missing.discard(index)
        if found.is_sparse:
            self._take_rows(held, found, first)
        elif first:
            held.copy_(found)
        else:
            held.add_(found)

    def _take_rows(self, held: torch.Tensor, found: torch.Tensor, first: bool) -> None:
        rows, inverse = torch.unique(found._indices()[0], return_inverse=True)
        # Rows that occur twice are summed first, in their order: an index_add_ of equal numbers has none on a GPU.
        values = torch.ops.aten.embedding_dense_backward(found._values().float(), inverse, len(rows), -1, False)
        if self.num_rows:
            self._rows.append(rows)
        elif first:
            held.zero_()
        held.index_add_(0, rows, values)

    def without_rows(self) -> None:
        """Treat a table like anything else, for who sums whole tensors only."""
        self.num_rows = 0

    def touched_rows(self) -> torch.Tensor:
        """int64, ascending numbers of the rows that this rank has gradients of."""
        if not self._rows:
            return torch.empty(0, dtype=torch.int64, device=self.gradients.device)
        rows: torch.Tensor = torch.unique(torch.cat(self._rows))
        return rows

    def blocks_of(self, rows: torch.Tensor, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Numbers of the blocks of UNIT elements that are these rows, inside [start, stop) and counted from there."""
        per_row = self.members[0].parameter.shape[1] // UNIT
        blocks = (rows[:, None] * per_row + torch.arange(per_row, device=rows.device)).view(-1)
        bounds = torch.tensor([start, self.size if stop is None else stop], device=rows.device) // UNIT
        first, last = torch.searchsorted(blocks, bounds).tolist()
        return blocks[first:last] - start // UNIT

    def spoil(self, blocks: torch.Tensor | None) -> None:
        """Blocks of `gradients` (None: all) hold something of others, to be set to zero when the next step begins."""
        if blocks is None:
            self._spoilt = None
        elif self._spoilt is not None:
            self._spoilt.append(blocks)

    def complete(self) -> None:
        """Members that have got no gradient have the gradient 0."""
        for index in self._missing if not self.num_rows else ():
            self.gradients[self.members[index].start : self.members[index].stop].zero_()
        self._missing = set()

    def _own(self, member: Member) -> None:
        start, stop = max(self.owned[0], member.start), min(self.owned[1], member.stop)
        if start >= stop:
            return
        weights = self.weights[start:stop]
        bounds = (start - member.start, stop - member.start)
        values = member.parameter.detach().reshape(-1)[slice(*bounds)]
        weights.copy_(values)
        # fp32 weights are their own masters; others are cast from masters, which keep what a cast would lose.
        master = weights if weights.dtype == torch.float32 else values.float().clone()
        gradients = self.reduced[start - self.owned[0] : stop - self.owned[0]]
        self.pieces.append(Piece(member, bounds[0], weights, master, gradients))

    def slices_of(self, kind: str, start: int, values: torch.Tensor) -> Iterator[StateSlice]:
        """Views of `values`, which belong to the bucket's elements from `start` on, by parameter."""
        for member in self.members:
            first, last = max(start, member.start), min(start + len(values), member.stop)
            if first < last:
                yield member.slice(kind, first - member.start, values[first - start : last - start])

    def detach(self) -> None:
        """Let go of the memory, which may be gone from now on: the parameters are empty after this."""
        for member in self.members:
            member.parameter.data = torch.empty(0, dtype=self.weights.dtype, device=self.weights.device)
        self.pieces = []
        del self.weights, self.gradients, self.reduced


def square_sum(values: torch.Tensor) -> torch.Tensor:
    """The sum of squares of fp32 [n * UNIT], a fp64 scalar: in fp32 only within units.

    torch's own norm of so many numbers at once loses 2e-5 of it at a million elements, 5e-4 at 8 million.
    """
    norms = torch.linalg.vector_norm(values.view(-1, UNIT), dim=1).double()
    return torch.dot(norms, norms)


def fill_buckets(
    module: torch.nn.Module,
    bucket_bytes: int,
    tables: Collection[str] = (),
    stacks: Iterable[Sequence[str]] = (),
    shards: Mapping[str, Shard] | None = None,
    shared: Collection[str] = (),
) -> list[Bucket]:
    """All parameters of a module in buckets of about `bucket_bytes` of fp32 gradients, in backward order.

    Args:
        module: whose named parameters are meant.
        bucket_bytes: a bucket ends before it would be larger, unless what must not be cut is.
        tables: names of parameters that get sparse gradients; each is a bucket of its own, behind the others.
        stacks: names of parameters that must be adjacent, in forward order.
        shards: what each is of the parameter of the whole model; if None, all of it.
        shared: names of parameters that a tensor group sums up first; together one bucket, the last one.
    """
    buckets: list[Bucket] = []
    waiting: list[tuple[str, torch.nn.Parameter]] = []
    size = 0
    named = dict(module.named_parameters())
    stack_of = {name: stack for stack in stacks for name in stack}
    for name in reversed([name for name in named if name not in tables and name not in shared]):
        together = stack_of.get(name, [name])
        if name != together[-1]:
            continue  # it came with the last of its stack
        found = [(each, named[each]) for each in together]
        num_bytes = 4 * sum(parameter.numel() for _, parameter in found)
        if waiting and size + num_bytes > bucket_bytes:
            buckets.append(Bucket(waiting, shards))
            waiting, size = [], 0
        waiting += found
        size += num_bytes
    buckets += [Bucket(waiting, shards)] if waiting else []
    buckets += [Bucket([(name, named[name])], shards, by_rows=True) for name in tables]
    return buckets + ([Bucket([(name, named[name]) for name in shared], shards, shared=True)] if shared else [])
