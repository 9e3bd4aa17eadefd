"""A layer shared by the ranks of a tensor group; the model knows them as a `Group` and nothing else of ranks.

As in Megatron-LM (Shoeybi et al. 2019, section 3): each rank has some of the attention heads and some columns of the
first matrix of the MLP, and the rows of the second matrix, or of the projection behind attention, that meet them; word
pieces are shared out too. Between such pairs, where LayerNorm and dropout are, each rank has some of the tokens
(Korthikanti et al., "Reducing activation recomputation in large transformer models", 2022, section 4.2.2): rows are
gathered before a pair, partial sums are added up and scattered behind it.

    own rows -> gather -> all rows -> own heads or columns -> partial sums of all rows -> scatter -> own rows
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from mpitrain.model.dropout import Region
from mpitrain.split import UNIT, Shard, part


class Group(Protocol):
    """Ranks that share layers; all make the same calls in the same order. Rows are cut over them by `split.part`."""

    rank: int
    size: int
    seconds: float  # in all calls so far

    def gather_rows(self, own: Tensor, num_rows: int) -> Tensor:
        """[own rows, n] of each rank to [num_rows, n]."""

    def scatter_sum(self, partial: Tensor) -> Tensor:
        """[num_rows, n] of each rank to the own rows of their sum, added up in the order of ranks, rounded once.

        `partial` is used up: the sum may take its memory.
        """


class Alone:
    """A group of one."""

    rank, size, seconds = 0, 1, 0.0

    def gather_rows(self, own: Tensor, num_rows: int) -> Tensor:
        """The same."""
        return own

    def scatter_sum(self, partial: Tensor) -> Tensor:
        """The same."""
        return partial


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, num_rows: int, group: Group) -> Tensor:
        ctx.group = group
        return group.gather_rows(own, num_rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # Nobody else has this gradient: products have made it, and autograd has summed it, for this call alone. A user
        # of what was gathered must not hand its own gradient on as it is.
        return ctx.group.scatter_sum(gradient), None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, group: Group) -> Tensor:
        ctx.group, ctx.num_rows = group, len(partial)
        return group.scatter_sum(partial)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.group.gather_rows(gradient, ctx.num_rows), None


_gather = cast("Callable[[Tensor, int, Group], Tensor]", _Gather.apply)
_scatter = cast("Callable[[Tensor, Group], Tensor]", _Scatter.apply)


def gather(own: Tensor, num_rows: int, group: Group) -> Tensor:
    """All rows, [num_rows, n], from everybody's [own rows, n]; gradients of all users are added up on the way back."""
    return own if group.size == 1 else _gather(own, num_rows, group)


def scatter(partial: Tensor, group: Group) -> Tensor:
    """The own rows of the sum over the group of partial sums of all rows."""
    return partial if group.size == 1 else _scatter(partial, group)


def sum_in_place(group: Group, flat: Tensor) -> None:
    """Sum over the group of [n * UNIT], the same bits everywhere."""
    if group.size > 1:
        rows = flat.view(-1, UNIT)
        rows.copy_(group.gather_rows(group.scatter_sum(rows), len(rows)))


def own_rows(num_rows: int, group: Group) -> slice:
    """Which rows this rank has where they are shared out."""
    return slice(*part(group.rank, num_rows, group.size))


def region(num_rows: int, size: int, group: Group) -> Region:
    """The elements of the own rows among those of [num_rows, size]."""
    own = own_rows(num_rows, group)
    return Region(num_rows * size, [(own.start * size, (own.stop - own.start) * size)])


def shard(shape: tuple[int, ...], dim: int, group: Group) -> Shard:
    """This rank's rows or columns of a parameter; whole heads, as their number is a multiple of the ranks'."""
    return Shard(shape, dim, *part(group.rank, shape[dim], group.size))
