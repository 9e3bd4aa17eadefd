"""Who holds what: the shape of the mesh, the schedule, and each stage's blocks, from numbers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil
from typing import Any

from mpitrain.config import Config
from mpitrain.errors import UsageError
from mpitrain.fit import Need, Room, block_sizes, gib, need_of
from mpitrain.model.bert import num_blocks
from mpitrain.model.card import ModelCard
from mpitrain.model.cost import block_costs
from mpitrain.pipeline.balance import by_hand, mesh_choices, split_blocks, split_chunks
from mpitrain.pipeline.schedule import SCHEDULES, Placement, Schedule
from mpitrain.pipeline.table import num_rows, read_schedule, read_text
from mpitrain.runtime.mesh import check_shape
from mpitrain.split import part

NEARLY = 1.05  # as little memory: where programs alone are too large for a node, no mesh takes much less than another
TYPICAL_LENGTH = 32.0  # tokens of a sentence, for the cost of attention in the split of layers over stages
Blocks = tuple[int, int]  # [first, last)


@dataclass(frozen=True)
class Arrangement:
    """What a job of a number of ranks does where.

    Attributes:
        data: replicas.
        schedule: of each replica's stages.
        chunks: blocks of each part of the model, in forward order.
        tensor: ranks of each stage.
        need: of memory, if that was asked.
    """

    data: int
    schedule: Schedule
    chunks: list[Blocks]
    tensor: int = 1
    need: Need | None = None

    @property
    def pipe(self) -> int:
        """Stages of a replica."""
        return len(self.schedule.placement.places)

    @property
    def shape(self) -> str:
        """The mesh in words."""
        return f"{self.data} data x {self.pipe} pipe" + (f" x {self.tensor} tensor" if self.tensor > 1 else "")

    @cached_property
    def stages(self) -> list[list[Blocks]]:
        """The chunks of each stage."""
        return [[self.chunks[place] for place in places] for places in self.schedule.placement.places]

    def listed(self) -> list[Any]:
        """The stages as config.json has them: [first, last), or a list of those where there are several chunks."""
        return [[list(chunk) for chunk in chunks] if len(chunks) > 1 else list(chunks[0]) for chunks in self.stages]


def stages_of(listed: list[Any]) -> list[list[Blocks]]:
    """What `Arrangement.listed` says."""
    nested = [stage if isinstance(stage[0], list) else [stage] for stage in listed]
    return [[(first, last) for first, last in chunks] for chunks in nested]


def arrange(
    num_ranks: int,
    config: Config,
    card: ModelCard,
    num_labels: int,
    *,
    table: str | None = None,
    pipe: int | None = None,
    room: Room | None = None,
    length: float = TYPICAL_LENGTH,
) -> Arrangement:
    """What was asked for, and choices where nothing was.

    Where no axis is given the mesh is the first of `mesh_choices` that has room for training; where none has, ranks
    share layers, as few as will do, on one node; where that does not help, it is one that takes the least.

    Args:
        num_ranks: of the job.
        config: mesh, pipeline and micro-batches.
        card: the model.
        num_labels: of its head.
        table: text of the file that is the schedule, if one is.
        pipe: number of stages if no axis is given, instead of the rule for training.
        room: of the job; without limits if None.
        length: tokens of a typical sequence.

    Raises:
        UsageError: mesh, layers and schedule do not fit each other, the ranks, the model or the memory.
    """
    found: list[tuple[Need, Arrangement]] = []
    for shape in dict.fromkeys(_choices(num_ranks, config, card, table, pipe, room)):
        check_tensor(shape[2], config, card, room)
        check_shape(num_ranks, *shape)
        arrangement = _arranged(shape, config, card, num_labels, table)
        if room is None or pipe is not None:
            return arrangement
        stages, schedule = arrangement.stages, arrangement.schedule
        need = need_of(card, config, num_labels, stages, schedule, shape[0], shape[2], length, copies=room.on_host)
        arrangement = replace(arrangement, need=need)
        if need.expected <= room.num_bytes:
            return arrangement
        found.append((need, arrangement))
    assert room is not None
    lowest = min(need.expected for need, _ in found)
    need, arrangement = next(each for each in found if each[0].expected <= NEARLY * lowest)
    if need.least > room.num_bytes:
        num_parameters, times = sum(block_sizes(card, num_labels)), ceil(need.least / room.num_bytes)
        raise UsageError(
            f"mesh: {arrangement.shape}: weights, gradients and optimizer state of {num_parameters:,} parameters "
            f"take {gib(need.least)} of a rank, which may use {gib(room.num_bytes)}, its share of the memory there is; "
            f"{times} times as much would do: more nodes, fewer ranks on each, or more --mesh.pipe or --mesh.tensor "
            "where these were given"
        )
    return arrangement


def _choices(
    num_ranks: int, config: Config, card: ModelCard, table: str | None, pipe: int | None, room: Room | None
) -> Iterator[tuple[int, int, int]]:
    """(data, pipe, tensor), best first: the only one if something was asked for."""
    data, stages, tensor = config.mesh.data, config.mesh.pipe, config.mesh.tensor
    groups = num_ranks // (tensor or 1)
    num_chunks = 1
    if table is not None:
        pipe = num_rows(table)
    else:
        num_chunks = SCHEDULES[config.pipeline.schedule](1, config.pipeline.chunks).placement.num_chunks
    if pipe is None and config.pipeline.layers is not None:
        pipe = len(config.pipeline.layers) // num_chunks
    if data is not None or stages is not None:
        yield data or max(1, groups // (stages or 1)), stages or max(1, groups // (data or 1)), tensor or 1
    elif pipe is not None:
        yield max(1, groups // max(1, pipe)), max(1, pipe), tensor or 1
    else:
        for size in [tensor] if tensor else _tensor_choices(num_ranks, config, card, room):
            groups, num_layers = max(1, num_ranks // size), card.num_hidden_layers // num_chunks
            choices = mesh_choices(groups, num_layers, config.train.micro_batches)
            yield from ((*shape, size) for shape in choices)


def _tensor_choices(num_ranks: int, config: Config, card: ModelCard, room: Room | None) -> list[int]:
    """Ranks that may share layers."""
    heads = 1 if config.train.reproducible else card.num_attention_heads
    sizes = [size for size in range(1, heads + 1) if heads % size == 0 and num_ranks % size == 0]
    return [size for size in sizes if size == 1 or (room is not None and room.holds_groups(size))]


def _arranged(
    shape: tuple[int, int, int], config: Config, card: ModelCard, num_labels: int, table: str | None
) -> Arrangement:
    data, pipe, tensor = shape
    name = config.pipeline.schedule
    if table is not None:
        schedule = read_schedule(name, table, pipe, part(0, config.train.micro_batches, data)[1])
    else:
        schedule = SCHEDULES[name](pipe, config.pipeline.chunks)
    return Arrangement(data, schedule, _chunks(config, card, num_labels, schedule.placement), tensor)


def check_tensor(tensor: int, config: Config, card: ModelCard, room: Room | None) -> None:
    """Raise UsageError unless so many ranks can share each layer of the model."""
    heads = card.num_attention_heads
    if heads % tensor:
        choices = ", ".join(str(count) for count in range(1, heads + 1) if heads % count == 0)
        raise UsageError(
            f"--mesh.tensor {tensor}: ranks that share layers have the same number of attention heads each, and the "
            f"model has {heads}; {choices} would work"
        )
    if tensor > 1 and config.train.reproducible:
        raise UsageError(
            f"--train.reproducible: sums over --mesh.tensor {tensor} ranks have other bits than those of one; use "
            "--mesh.tensor 1, and data or pipe instead"
        )
    if room is not None and not config.mesh.tensor_across_nodes and not room.holds_groups(tensor):
        sizes = sorted(set(Counter(room.nodes).values()))
        raise UsageError(
            f"--mesh.tensor {tensor}: so many ranks in a row share layers, some of them on different nodes (of "
            f"{', '.join(map(str, sizes))} ranks); a number that divides the ranks of every node, with one node filled "
            "after the other, would work, or --mesh.tensor_across_nodes true"
        )


def read_table(config: Config) -> str | None:
    """The text of the file that is the schedule, if one is: to be read by one rank."""
    return None if config.pipeline.schedule in SCHEDULES else read_text(config.pipeline.schedule)


def _chunks(config: Config, card: ModelCard, num_labels: int, placement: Placement) -> list[Blocks]:
    num_stages, num_chunks, num_places = len(placement.places), placement.num_chunks, len(placement.holders)
    if num_chunks > 1 and num_places > num_blocks(card):
        raise UsageError(
            f"pipeline.schedule: {num_stages} stages have {num_places} chunks, each of which needs a block; the "
            f"model has {num_blocks(card)} (embeddings, {card.num_hidden_layers} layers, head); fewer stages or chunks "
            "would work"
        )
    layers = config.pipeline.layers
    if layers is None:
        return split_model(block_costs(card, num_labels, TYPICAL_LENGTH), placement)
    if len(layers) != num_places:
        given = config.pipeline.balance
        chunks = f" of {num_chunks} chunks" if num_chunks > 1 else ""
        raise UsageError(f"--pipeline.balance {given}: {len(layers)} counts, the mesh has {num_stages} stages{chunks}")
    return by_hand(layers, card.num_hidden_layers)


def split_model(costs: Sequence[float], placement: Placement, speeds: Sequence[float] | None = None) -> list[Blocks]:
    """Blocks of each chunk, in forward order, for a slowest stage that is as fast as can be; arguments as there."""
    if placement.num_chunks > 1:
        return split_chunks(costs, placement.stages, speeds)
    return split_blocks(costs, len(placement.places), speeds)


def name_blocks(chunks: list[Blocks], card: ModelCard) -> str:
    """A stage's blocks in words: "embeddings, layers 0-1; layers 4-5"."""
    return "; ".join(_name_chunk(chunk, card) for chunk in chunks)


def _name_chunk(chunk: Blocks, card: ModelCard) -> str:
    first, last = chunk
    layers = range(max(first, 1) - 1, min(last, num_blocks(card) - 1) - 1)
    words = ["embeddings"] if first == 0 else []
    if layers:
        words.append(f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]}-{layers[-1]}")
    return ", ".join([*words, "classifier"] if last == num_blocks(card) else words)
