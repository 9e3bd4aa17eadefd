"""The one even split, by which tensors, micro-batches, rows and blocks of work are all cut."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

UNIT = 64  # elements: whole cache lines of any dtype, and whole vector registers of any processor


def part(index: int, total: int, count: int) -> tuple[int, int]:
    """Bounds [start, stop) of part `index` of `total` things over `count`; the first total % count are one longer."""
    size, num_longer = divmod(total, count)
    start = index * size + min(index, num_longer)
    return start, start + size + (index < num_longer)


def aligned_part(index: int, total: int, count: int) -> tuple[int, int]:
    """The same for the elements of a tensor, cut at multiples of UNIT.

    A kernel treats the last elements of what it is given one by one, with other rounding than the rest; cut so, they
    are the same ones however many parts there are.
    """
    start, stop = part(index, -(-total // UNIT), count)
    return min(UNIT * start, total), min(UNIT * stop, total)


@dataclass(frozen=True)
class Shard:
    """What one rank of a tensor group holds of a parameter: rows or columns [start, stop).

    Attributes:
        shape: of the whole parameter.
        dim: that is cut, 0 or 1.
    """

    shape: tuple[int, ...]
    dim: int
    start: int
    stop: int

    @classmethod
    def whole(cls, *shape: int) -> Shard:
        """All of it."""
        return cls(shape, 0, 0, shape[0])

    @property
    def is_whole(self) -> bool:
        """Whether nothing is cut off."""
        return self.stop - self.start == self.shape[self.dim]

    @property
    def own_shape(self) -> tuple[int, ...]:
        """Of the rank's own part."""
        return *self.shape[: self.dim], self.stop - self.start, *self.shape[self.dim + 1 :]

    @property
    def slices(self) -> tuple[slice, ...]:
        """What cuts the own part out of the whole."""
        return *[slice(None)] * self.dim, slice(self.start, self.stop)

    @property
    def columns(self) -> tuple[int, int] | None:
        """[first, last) if some columns are held of all rows, else None."""
        return (self.start, self.stop) if self.dim and not self.is_whole else None

    @property
    def offset(self) -> int:
        """Where the own part begins in the flattened parameter, or in the flattened columns."""
        return 0 if self.dim else self.start * prod(self.shape[1:])
