"""How long a step will take on a mesh, term by term, and what it will hold: from a machine's figures alone.

Passes take their operations by the machine's speed; the schedule of the pipeline is played with these times
(`pipeline.prove`). Where ranks outnumber processors, a node cannot be faster than all that its ranks have to do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from mpitrain.arrange import Arrangement, arrange
from mpitrain.config import Config
from mpitrain.errors import UsageError
from mpitrain.fit import ITEMSIZE, Need, block_sizes, need_of
from mpitrain.machine import Load, Machine
from mpitrain.model.card import ModelCard
from mpitrain.model.cost import block_costs
from mpitrain.pipeline.messages import program
from mpitrain.pipeline.prove import Proof, Times, play
from mpitrain.split import part

EXCHANGES = 8  # of rows, of a layer and micro-batch (`model.tensor_parallel`)
BACKWARD = 2.0  # times as long as forward
TERMS = ("compute", "bubble", "messages", "reduce", "update")


@dataclass(frozen=True)
class Forecast:
    """A mesh, and what is to be expected of it.

    Attributes:
        arrangement: mesh, schedule and stages.
        need: bytes of the fullest rank.
        fits: memory has room for that.
        terms: seconds of a step, by TERMS.
        node_hours: of an epoch.
    """

    arrangement: Arrangement
    need: Need
    fits: bool
    terms: dict[str, float]
    node_hours: float

    @property
    def seconds(self) -> float:
        """Of a step."""
        return sum(self.terms.values())

    def document(self) -> dict[str, Any]:
        """For programs."""
        mesh, need = self.arrangement, self.need.expected
        axes = {"data": mesh.data, "pipe": mesh.pipe, "tensor": mesh.tensor}
        told = {"seconds": self.seconds, "terms": self.terms, "node_hours": self.node_hours}
        return axes | {"bytes_of_a_rank": need, "fits": self.fits} | told


def forecasts(
    machine: Machine, load: Load, config: Config, card: ModelCard, num_labels: int, table: str | None = None
) -> list[Forecast]:
    """All meshes of a number of ranks that the configuration leaves open: those that fit come first, the fastest first.

    Args:
        machine: that they are for.
        load: ranks and data.
        config: of the run.
        card: its model.
        num_labels: of the head.
        table: text of the file that is the schedule, if one is.

    Raises:
        UsageError: there is none.
    """
    found = []
    for data, pipe, tensor in shapes(machine, load.ranks, config, card):
        mesh = config.mesh.model_copy(update={"data": data, "pipe": pipe, "tensor": tensor})
        try:
            asked = config.model_copy(update={"mesh": mesh})
            arrangement = arrange(load.ranks, asked, card, num_labels, table=table)
        except UsageError:  # more stages than the schedule or the model has room for
            continue
        found.append(forecast(machine, load, config, card, num_labels, arrangement))
    if not found:  # which tells why, as for a run
        arrangement = arrange(load.ranks, config, card, num_labels, table=table)
        found.append(forecast(machine, load, config, card, num_labels, arrangement))
    return sorted(found, key=lambda each: (not each.fits, each.seconds))


def shapes(machine: Machine, num_ranks: int, config: Config, card: ModelCard) -> Iterator[tuple[int, int, int]]:
    """(data, pipe, tensor) that multiply to the number of ranks; tensor groups stay on a node unless told otherwise."""
    asked = config.mesh
    widest = num_ranks if asked.tensor_across_nodes else min(machine.ranks_per_node, num_ranks)
    for tensor in [asked.tensor] if asked.tensor else range(1, min(widest, card.num_attention_heads) + 1):
        alike = card.num_attention_heads % tensor == 0 and (asked.tensor_across_nodes or widest % tensor == 0)
        if not alike or num_ranks % tensor:
            continue
        groups = num_ranks // tensor
        for pipe in [asked.pipe] if asked.pipe else range(1, min(groups, card.num_hidden_layers + 2) + 1):
            if groups % pipe == 0 and asked.data in (None, groups // pipe):
                yield groups // pipe, pipe, tensor


def forecast(
    machine: Machine, load: Load, config: Config, card: ModelCard, num_labels: int, arrangement: Arrangement
) -> Forecast:
    """What is to be expected of one mesh."""
    data, tensor = arrangement.data, arrangement.tensor
    stages, schedule = arrangement.stages, arrangement.schedule
    need = need_of(card, config, num_labels, stages, schedule, data, tensor, load.length, copies=not machine.gpus)
    room = machine.memory_gib_per_node * 2**30 / min(machine.ranks_per_node, load.ranks)
    terms = step_terms(machine, load, config, card, num_labels, arrangement)
    steps = ceil(load.sequences / config.train.batch_size)
    nodes = ceil(load.ranks / machine.ranks_per_node)
    return Forecast(
        replace(arrangement, need=need), need, need.expected <= room, terms, sum(terms.values()) * steps * nodes / 3600
    )


def step_terms(
    machine: Machine, load: Load, config: Config, card: ModelCard, num_labels: int, arrangement: Arrangement
) -> dict[str, float]:
    """Seconds of a step by TERMS."""
    on_node = min(machine.ranks_per_node, load.ranks)
    crowd = max(1.0, on_node / machine.processors_per_node)
    rate = 1e9 * machine.gflops * max(1, machine.processors_per_node // on_node)
    tensor, tokens = arrangement.tensor, load.length * config.train.batch_size / config.train.micro_batches
    costs, chunks = block_costs(card, num_labels, load.length), arrangement.chunks
    slower = (1 + machine.sharing_loss * (tensor - 1)) / tensor
    slower *= (BACKWARD + 2) / (BACKWARD + 1) if config.train.recompute == "block" else 1.0
    computing = [slower * tokens * sum(costs[first:last]) / rate for first, last in chunks]
    exchange = exchange_seconds(machine, config, card, tokens, tensor)
    exchanging = [exchange * (last - first) for first, last in chunks]
    message = message_seconds(machine, load, config, card, tokens, arrangement)
    largest = largest_stage(arrangement, card, num_labels)
    update = largest / arrangement.data / (1e6 * machine.update_mega_per_second) + 1e-3 * machine.step_ms
    return {
        **play_passes(arrangement, config.train.micro_batches, computing, exchanging, message, crowd),
        "reduce": reduce_seconds(machine, load, config, largest, arrangement, crowd),
        "update": crowd * update,
    }


def largest_stage(arrangement: Arrangement, card: ModelCard, num_labels: int) -> int:
    """Parameters of a rank of the stage that has the most."""
    sizes = block_sizes(card, num_labels, arrangement.tensor)
    return max(sum(sum(sizes[first:last]) for first, last in stage) for stage in arrangement.stages)


def play_passes(
    arrangement: Arrangement,
    num_micro_batches: int,
    computing: Sequence[float],
    exchanging: Sequence[float],
    message: float,
    crowd: float,
) -> dict[str, float]:
    """Seconds of the passes of the fullest replica, by term.

    Args:
        arrangement: whose schedule is played.
        num_micro_batches: of the whole batch.
        computing: of each chunk, forward and backward.
        exchanging: likewise, in exchanges with ranks that share its layers.
        message: with which a pass ends.
        crowd: ranks on a processor; those that wait leave theirs to others.
    """
    mine = part(0, num_micro_batches, arrangement.data)[1]
    whole = [a + b for a, b in zip(computing, exchanging, strict=True)]
    proof = play_schedule(arrangement, mine, whole, message)
    # What the average rank of a node has to do, as far as they are more than processors.
    crowded = max(1.0, crowd * num_micro_batches / (mine * arrangement.data))
    busy = crowded * sum(proof.busy) / arrangement.pipe
    compute = crowded * mine * sum(computing) / arrangement.pipe
    return {"compute": compute, "bubble": max(0.0, proof.makespan - busy), "messages": max(0.0, busy - compute)}


def play_schedule(arrangement: Arrangement, mine: int, chunks: Sequence[float], message: float = 0.0) -> Proof:
    """Play the schedule of a replica.

    Args:
        arrangement: whose schedule it is.
        mine: micro-batches of the replica.
        chunks: time of each, forward and backward.
        message: time with which a pass ends.
    """
    thirds = [each / (1 + BACKWARD) for each in chunks]
    times = Times([each + message for each in thirds], [BACKWARD * each + message for each in thirds], thirds)
    told = [program(arrangement.schedule, stage, mine) for stage in range(arrangement.pipe)]
    return play(told, mine, placement=arrangement.schedule.placement, times=times, blocking_sends=False)


def exchange_seconds(machine: Machine, config: Config, card: ModelCard, tokens: float, tensor: int) -> float:
    """Of a block's forward and backward pass, in exchanges of the ranks that share its layers."""
    if tensor == 1:
        return 0.0
    num_bytes = tokens * card.hidden_size * ITEMSIZE[config.train.precision]
    return EXCHANGES * (1e-6 * machine.exchange_us + num_bytes / (1e9 * machine.exchange_gb_per_second))


def message_seconds(
    machine: Machine, load: Load, config: Config, card: ModelCard, tokens: float, arrangement: Arrangement
) -> float:
    """Of a pass, for the rows that leave it; neighbours are on other nodes where a stage fills one."""
    if arrangement.pipe == 1:
        return 0.0
    seconds = 1e-6 * machine.message_us
    if arrangement.pipe * arrangement.tensor > machine.ranks_per_node and load.ranks > machine.ranks_per_node:
        num_bytes = tokens / arrangement.tensor * card.hidden_size * ITEMSIZE[config.train.precision]
        sharing = max(1, min(machine.ranks_per_node, arrangement.tensor))
        seconds += 1e-6 * machine.network_us + sharing * num_bytes / (1e9 * machine.network_gb_per_second)
    return seconds


def reduce_seconds(
    machine: Machine, load: Load, config: Config, num_parameters: int, arrangement: Arrangement, crowd: float
) -> float:
    """Of summing a stage's gradients over its replicas: in memory on a node, then by a ring between nodes.

    A ring of n nodes takes 2 (n - 1) messages and moves 2 (n - 1) / n of the bytes (Patarasuk and Yuan 2009, sec. 3).
    """
    if arrangement.data == 1:
        return 0.0
    wire = 2 if config.comm.wire_dtype == "bf16" else 4
    replica = arrangement.pipe * arrangement.tensor
    on_node = max(1, min(arrangement.data, machine.ranks_per_node // replica))
    inside = 4 * num_parameters / (1e9 * machine.sum_gb_per_second) if on_node > 1 else 0.0
    nodes = ceil(arrangement.data / on_node)
    if nodes == 1:
        return crowd * inside
    stages_on_node = min(replica, machine.ranks_per_node)
    num_bytes = wire * num_parameters * stages_on_node
    num_buckets = max(1, round(4 * num_parameters / (config.comm.bucket_mib * 2**20)))
    network = 2 * (nodes - 1) / nodes * num_bytes / (1e9 * machine.network_gb_per_second)
    return crowd * inside + network + num_buckets * 2 * (nodes - 1) * 1e-6 * machine.network_us
