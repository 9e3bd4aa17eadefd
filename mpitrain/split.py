"""The one even split: ring chunks, micro-batches per replica and blocks of work are all cut by it."""

from __future__ import annotations


def part(index: int, total: int, count: int) -> tuple[int, int]:
    """Bounds [start, stop) of part `index` of `total` things over `count`; the first total % count are one longer."""
    size, num_longer = divmod(total, count)
    start = index * size + min(index, num_longer)
    return start, start + size + (index < num_longer)
