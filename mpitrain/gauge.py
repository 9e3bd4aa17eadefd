"""The figures of the machine that this job has: from a few steps of its own model on meshes that are all of a kind."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from statistics import median

import torch

from mpitrain.arrange import Arrangement, arrange
from mpitrain.bench.step import WARM_UP, Turn, Workload
from mpitrain.comm.buffers import Transport
from mpitrain.comm.pingpong import neighbours, ping_pong
from mpitrain.config import Config
from mpitrain.dataset.sequences import Sequences
from mpitrain.errors import UsageError, on_all_ranks
from mpitrain.fit import Room, need_of
from mpitrain.forecast import largest_stage, step_terms
from mpitrain.machine import Load, Machine
from mpitrain.model.cost import block_costs
from mpitrain.observe.console import Console
from mpitrain.place import find_room
from mpitrain.problem import Problem
from mpitrain.runtime.agree import Comm, collect
from mpitrain.runtime.device import choose_device, place_on_node, processors_of_node
from mpitrain.split import part

STEPS = 2  # of a turn
TURNS = 5  # on each mesh, of which the median one counts: others may want the machine now and then
HALVINGS = 40
WHEN = "%Y-%m-%d %H:%M"
LONGEST = 1e5  # us of a message or an exchange, ms of a step, seconds of 10^9 bytes
TINY = 1e-6
Mesh = tuple[int, int, int]


def gauge(comm: Comm, config: Config, problem: Problem, split: Sequences) -> Machine:
    """Train for some steps with replicas alone, stages alone, and ranks that share layers, as far as these fit.

    The first of them gives the speed of passes and updates; what each takes beyond these is laid on its sums, messages
    or exchanges. Figures for which there are too few ranks or nodes stay those of `Machine` (collective); those of rank
    0, by its own clock, are the ones to use.
    """
    device = choose_device(comm, config.train.device)
    room = find_room(comm, device)
    on_node, processors = max(collect(comm, place_on_node(comm)[1])), processors_of_node(comm, device)
    machine = Machine(
        name=f"{comm.size} rank(s) on {len(set(room.nodes))} node(s) like {platform.node()}, {time.strftime(WHEN)}",
        ranks_per_node=on_node,
        processors_per_node=processors,
        gpus=device.type == "cuda",
        memory_gib_per_node=room.num_bytes * on_node / 2**30,
        gflops=1.0,
        step_ms=0.0,
        **_network(comm, room, patient=on_node > processors),
    )
    lengths = split.index.lengths
    load = Load(comm.size, len(lengths), float(lengths.mean()))
    trial = _Trial(comm, config, problem, split, room)
    kinds = [mesh for mesh in _kinds(comm.size, room, problem.card.num_attention_heads) if trial.fits(mesh)]
    if not kinds:
        raise on_all_ranks(
            UsageError("mesh: no mesh of one kind of axis has room in memory; give the machine's figures by --machine")
        )
    for mesh in kinds:
        turn = trial.run(mesh)
        if mesh == kinds[0]:
            machine = _speeds(machine, load, trial, mesh, turn)
        machine = _solve(machine, load, trial, mesh, turn)
    return machine


def _network(comm: Comm, room: Room, *, patient: bool) -> dict[str, float]:
    """Latency and bandwidth between neighbouring nodes, by one pair of ranks each (collective)."""
    rounds, transport = neighbours(sorted(set(room.nodes))), Transport(torch.device("cpu"), patient=patient)
    links = [link for pairs in rounds if pairs for link in ping_pong(comm, pairs, transport)]
    if not links:
        return {}
    latency, bandwidth = (median(link[name] for link in links) for name in ("latency", "bandwidth"))
    return {"network_us": 1e6 * latency, "network_gb_per_second": bandwidth / 1e9}


def _kinds(num_ranks: int, room: Room, heads: int) -> list[Mesh]:
    """(data, pipe, tensor): all ranks on one axis, or as many as can be."""
    widest = max(n for n in range(1, num_ranks + 1) if num_ranks % n == heads % n == 0 and room.holds_groups(n))
    meshes = [(num_ranks, 1, 1), (1, num_ranks, 1), (num_ranks // widest, 1, widest)]
    return list(dict.fromkeys(meshes))


class _Trial:
    """Steps of the model on meshes, one after the other."""

    def __init__(self, comm: Comm, config: Config, problem: Problem, split: Sequences, room: Room) -> None:
        self.problem, self.config = problem, config
        self._comm, self._split, self.room = comm, split, room

    def on(self, mesh: Mesh) -> Config:
        """The configuration with this mesh, and stages that need no measuring and no file."""
        axes = self.config.mesh.model_copy(update=dict(zip(("data", "pipe", "tensor"), mesh, strict=True)))
        pipeline = self.config.pipeline.model_copy(update={"schedule": "1f1b", "balance": "cost"})
        return self.config.model_copy(update={"mesh": axes, "pipeline": pipeline})

    def fits(self, mesh: Mesh) -> bool:
        """Whether there is such a mesh, and room for it."""
        config, problem = self.on(mesh), self.problem
        num_labels, length = len(problem.label_names), problem.mean_length
        try:
            found = self.arranged(mesh)
        except UsageError:
            return False
        stages, schedule, copies = found.stages, found.schedule, self.room.on_host
        need = need_of(problem.card, config, num_labels, stages, schedule, mesh[0], mesh[2], length, copies=copies)
        return need.expected <= self.room.num_bytes

    def run(self, mesh: Mesh) -> Turn:
        """Some turns, of which the median one by this rank's clock counts (collective)."""
        config = self.on(mesh)
        work = Workload(
            self._comm, config, Console(False), self.problem, self._split, num_steps=WARM_UP + TURNS * STEPS
        )
        turns = [work.run(STEPS) for _ in range(TURNS)]
        work.close()
        return sorted(turns, key=lambda turn: turn.seconds / turn.tokens)[TURNS // 2]

    def arranged(self, mesh: Mesh) -> Arrangement:
        """With its stages."""
        return arrange(self._comm.size, self.on(mesh), self.problem.card, len(self.problem.label_names))

    def expect(self, machine: Machine, load: Load, mesh: Mesh) -> dict[str, float]:
        """Terms of a step."""
        num_labels = len(self.problem.label_names)
        return step_terms(machine, load, self.on(mesh), self.problem.card, num_labels, self.arranged(mesh))


def _speeds(machine: Machine, load: Load, trial: _Trial, mesh: Mesh, turn: Turn) -> Machine:
    """Passes and updates, by what they took on a mesh."""
    problem, options, found = trial.problem, trial.config.train, trial.arranged(mesh)
    num_labels, load = len(problem.label_names), _of_turn(load, turn, options.batch_size)
    costs = block_costs(problem.card, num_labels, load.length)
    alone = trial.room.on_host and torch.get_num_threads() == 1  # its own time on a core, which others may want, tells
    if alone:
        computed, flop = turn.stages[0], sum(sum(costs[first:last]) for first, last in found.stages[0])
    else:
        computed, flop = turn.parts["forward_backward"] - turn.parts["tensor"], sum(costs) / found.pipe
    fullest = part(0, options.micro_batches, found.data)[1] / options.micro_batches
    flop *= turn.tokens * fullest * (1 + machine.sharing_loss * (found.tensor - 1)) / found.tensor
    processors = max(1, machine.processors_per_node // machine.ranks_per_node)
    crowd = max(1.0, machine.ranks_per_node / machine.processors_per_node)
    updated = largest_stage(found, problem.card, num_labels) / found.data * STEPS * crowd
    known = {"gflops": flop / computed / processors / 1e9}
    known["update_mega_per_second"] = updated / turn.parts["update"] / 1e6
    return machine.model_copy(update=known)


def _of_turn(load: Load, turn: Turn, batch_size: int) -> Load:
    """With the length of those sequences that were in its batches."""
    return Load(load.ranks, load.sequences, turn.tokens / STEPS / batch_size)


def _solve(machine: Machine, load: Load, trial: _Trial, mesh: Mesh, turn: Turn) -> Machine:
    """The figure with which a step takes as long as it did: that of what ranks exchange on this kind of mesh."""
    load = _of_turn(load, turn, trial.config.train.batch_size)
    data, pipe, tensor = mesh
    if tensor > 1:
        field = "exchange_us"
    elif pipe > 1:
        field = "message_us"
    else:
        field = "sum_gb_per_second" if data > 1 else "step_ms"

    def with_figure(value: float) -> Machine:
        return machine.model_copy(update={field: 1 / max(value, TINY) if field == "sum_gb_per_second" else value})

    def seconds(value: float) -> float:
        return sum(trial.expect(with_figure(value), load, mesh).values())

    if seconds(LONGEST) == seconds(0.0):  # nothing of it is done on this mesh: one replica on each node
        return machine
    return with_figure(_bisect(lambda value: seconds(value) > turn.seconds / STEPS))


def _bisect(is_too_large: Callable[[float], bool]) -> float:
    low, high = 0.0, LONGEST
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if is_too_large(middle) else (middle, high)
    return low
