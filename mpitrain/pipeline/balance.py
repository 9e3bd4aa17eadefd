"""Who gets how much: blocks to stages, ranks to a mesh.

Blocks are numbered through the model: 0 is the embeddings, 1 to num_layers the encoder layers, num_layers + 1 the head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, count, pairwise

from mpitrain.errors import UsageError

MOST_BRANCHES = 300_000  # half a second
EVENNESS = 1e-3  # what the longest chunk weighs by the slowest stage: enough to choose between equals


def split_blocks(
    costs: Sequence[float], num_stages: int, speeds: Sequence[float] | None = None
) -> list[tuple[int, int]]:
    """Cut the blocks into contiguous stages, none empty, so that the slowest stage is as fast as can be.

    Exact, by dynamic programming over (number of stages, number of blocks): O(num_stages * num_blocks ** 2). Among
    equals the last stage takes as many blocks as it can, and the stages before it are split by the same rule: under
    1F1B the early stages keep the most micro-batches in memory.

    Args:
        costs: time of each block, any unit, not negative.
        num_stages: at least 1.
        speeds: of each stage's machine (a stage's time is its cost divided by its speed); all equal when None.

    Returns:
        (start, stop) of each stage in blocks.

    Raises:
        UsageError: there are more stages than blocks.
    """
    num_blocks = len(costs)
    if num_stages > num_blocks:
        raise UsageError(
            f"mesh.pipe: {num_stages} stages need a block each, the model has {num_blocks} blocks "
            f"(embeddings, {num_blocks - 2} layers, head); use --mesh.pipe {num_blocks} or less"
        )
    stage_speeds = [1.0] * num_stages if speeds is None else speeds
    assert len(stage_speeds) == num_stages and min(stage_speeds) > 0
    before = list(accumulate(costs, initial=0.0))
    slowest = {0: 0.0}  # time of the slowest stage, by number of blocks on the stages so far
    cuts: list[dict[int, int]] = []  # per stage: its stop -> its best start
    for stage, speed in enumerate(stage_speeds):
        choices = {
            stop: min(
                (max(slowest[start], (before[stop] - before[start]) / speed), start)
                for start in slowest
                if start < stop
            )
            for stop in range(stage + 1, num_blocks + 1)
        }
        slowest = {stop: time for stop, (time, _) in choices.items()}
        cuts.append({stop: start for stop, (_, start) in choices.items()})
    borders = [num_blocks]
    for cut in reversed(cuts):
        borders.append(cut[borders[-1]])
    return list(pairwise(reversed(borders)))


def split_chunks(
    costs: Sequence[float], stages: Sequence[int], speeds: Sequence[float] | None = None
) -> list[tuple[int, int]]:
    """Cut the blocks into contiguous chunks, none empty, so that the slowest stage is as fast as can be.

    Among equals the longest chunk is as short as can be: others wait for it to pass. Exact, by branch and bound, as far
    as MOST_BRANCHES reach (24 layers do with them), else the best that was found: a branch ends where it is no better
    than the best split so far, or where some stage would have to take too much of what is left.

    Args:
        costs: time of each block, any unit, not negative; there are enough for all chunks.
        stages: which stage holds each chunk, in the model's order.
        speeds: of each stage's machine, as in `split_blocks`.

    Returns:
        (start, stop) of each chunk in blocks.
    """
    before, loads = list(accumulate(costs, initial=0.0)), [0.0] * (max(stages) + 1)
    speed = [1.0] * len(loads) if speeds is None else speeds
    later = [set(stages[number + 1 :]) for number in range(len(stages))]
    best, cuts = [0, *(stop for _, stop in split_blocks(costs, len(stages), [speed[stage] for stage in stages]))], [0]
    least, branches = _weigh(before, stages, speed, best) * (1 + 1e-9), count()

    def cut(slowest: float, longest: float) -> None:
        nonlocal best, least
        number, start = len(cuts) - 1, cuts[-1]
        num_after = len(stages) - number - 1
        if num_after < 0:
            least, best = _weigh(before, stages, speed, cuts), list(cuts)
            return
        stage, load = stages[number], loads[stages[number]]
        for stop in range(start + 1 if num_after else len(costs), len(costs) - num_after + 1):
            chunk = (before[stop] - before[start]) / speed[stage]
            loads[stage] = load + chunk
            worst = max(slowest, loads[stage]), max(longest, chunk)
            if worst[0] + EVENNESS * worst[1] >= least or next(branches) > MOST_BRANCHES:
                break
            # What the stages that still get a chunk may take must hold what is left.
            room = sum((least - loads[each]) * speed[each] for each in later[number])
            if not num_after or room > before[-1] - before[stop]:
                cuts.append(stop)
                cut(*worst)
                cuts.pop()
        loads[stage] = load

    cut(0.0, 0.0)
    return list(pairwise(best))


def _weigh(before: Sequence[float], stages: Sequence[int], speed: Sequence[float], cuts: Sequence[int]) -> float:
    chunks = [(before[b] - before[a]) / speed[at] for (a, b), at in zip(pairwise(cuts), stages, strict=True)]
    loads = [sum(chunk for chunk, at in zip(chunks, stages, strict=True) if at == stage) for stage in set(stages)]
    return max(loads) + EVENNESS * max(chunks)


def by_hand(layers: Sequence[int], num_layers: int) -> list[tuple[int, int]]:
    """The user's own split: `layers` counts the encoder layers of each stage.

    The embeddings go with the first stage and the head with the last, so only those two may have no layer.

    Returns:
        (start, stop) of each stage in blocks.

    Raises:
        UsageError: the counts do not add up, one is negative, or a stage would hold no block.
    """
    given = ",".join(map(str, layers))
    if sum(layers) != num_layers or min(layers, default=0) < 0:
        arithmetic = " + ".join(map(str, layers)) or "nothing"
        raise UsageError(
            f"pipeline.balance: {given!r} is {arithmetic} = {sum(layers)} layers, the model has {num_layers}; "
            f"give one count per stage, none negative, that add up to {num_layers}"
        )
    for stage, size in enumerate(layers[1:-1], 1):
        if size == 0:
            raise UsageError(
                f"pipeline.balance: {given!r} leaves stage {stage} without a block; only the first stage (embeddings) "
                f"and the last (head) may have 0 layers"
            )
    stops = list(accumulate(layers, initial=1))
    return list(pairwise([0, *stops[1:-1], num_layers + 2]))


def mesh_choices(num_ranks: int, num_layers: int, num_micro_batches: int) -> Iterator[tuple[int, int]]:
    """(data, pipe) for a number of ranks, in the order in which they are to be preferred.

    First the fewest stages that leave every replica two micro-batches a step. Where no number of stages up to
    `num_layers` does so, one micro-batch must do; where that is too much as well, replicas without work are accepted
    and the pipeline has one stage. Then, for want of room, ever more stages.
    """
    pipes = [pipe for pipe in range(1, min(num_ranks, num_layers) + 1) if num_ranks % pipe == 0]
    for num_wanted in (2, 1):
        for pipe in pipes:
            if num_ranks // pipe * num_wanted <= num_micro_batches:
                yield num_ranks // pipe, pipe
    yield from ((num_ranks // pipe, pipe) for pipe in (1, *pipes))
