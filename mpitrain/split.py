"""The one even split: chunks of tensors, micro-batches per replica and blocks of work are all cut by it."""

from __future__ import annotations

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
