"""The figures of the machine that this job has: from a few steps of its own model on meshes that are all of a kind."""

from __future__ import annotations

import platform
from collections.abc import Callable

import torch

from mpitrain.arrange import arrange
from mpitrain.bench.step import WARM_UP, Turn, Workload
from mpitrain.config import Config
from mpitrain.dataset.sequences import Sequences
from mpitrain.errors import UsageError, on_all_ranks
from mpitrain.fit import Room, block_sizes, need_of
from mpitrain.forecast import step_terms
from mpitrain.machine import Load, Machine
from mpitrain.model.cost import block_costs
from mpitrain.observe.console import Console
from mpitrain.problem import Problem
from mpitrain.runtime.agree import Comm, collect
from mpitrain.runtime.device import choose_device, node_of_each_rank, place_on_node, processors_of_node
from mpitrain.runtime.memory import least_memory
from mpitrain.split import part

STEPS = 2  # of a turn
TURNS = 5  # on each mesh, of which the median one counts: others may want the machine now and then
HALVINGS = 40
LONGEST = 1e5  # us, of a message or an exchange
Mesh = tuple[int, int, int]


def gauge(comm: Comm, config: Config, problem: Problem, split: Sequences) -> Machine:
    """Train for some steps with replicas alone, stages alone, and ranks that share layers, as far as these fit.

    What replicas alone take gives the speed of passes, sums and updates; what the others take beyond that is laid on
    their messages. Figures that need several ranks, or nodes, stay those of `Machine` without them (collective); all
    others are by each rank's own clock, those of rank 0 are the ones to use.
    """
    device = choose_device(comm, config.train.device)
    room = Room(least_memory(comm, device), node_of_each_rank(comm), device.type == "cpu")
    on_node = max(collect(comm, place_on_node(comm)[1]))
    machine = Machine(
        name=f"{comm.size} ranks on {len(set(room.nodes))} node(s) like {platform.node()}",
        ranks_per_node=on_node,
        processors_per_node=processors_of_node(comm, device),
        memory_gib_per_node=room.num_bytes * on_node / 2**30,
        gflops=1.0,
    )
    lengths = split.index.lengths
    load = Load(comm.size, len(lengths), float(lengths.mean()))
    trial = _Trial(comm, config, problem, split, room)
    kinds = [mesh for mesh in _kinds(comm.size, room, problem.card.num_attention_heads) if trial.fits(mesh)]
    if not kinds:
        raise on_all_ranks(
            UsageError("mesh: no mesh of one kind of axis has room in memory; give the machine's figures by --machine")
        )
    machine = _speeds(machine, load, trial, kinds[0])
    for mesh in kinds[1:]:
        field = "message_us" if mesh[1] > 1 else "exchange_us"
        machine = _solve(machine, field, load, trial, mesh)
    return machine


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
            found = arrange(self._comm.size, config, problem.card, num_labels)
        except UsageError:
            return False
        need = need_of(problem.card, config, num_labels, found.stages, found.schedule, mesh[0], mesh[2], length)
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

    def expect(self, machine: Machine, load: Load, mesh: Mesh) -> dict[str, float]:
        """Terms of a step."""
        config, num_labels = self.on(mesh), len(self.problem.label_names)
        found = arrange(self._comm.size, config, self.problem.card, num_labels)
        return step_terms(machine, load, config, self.problem.card, num_labels, found)


def _speeds(machine: Machine, load: Load, trial: _Trial, mesh: Mesh) -> Machine:
    """Passes, sums and updates, each by what they took on a mesh (collective)."""
    turn, problem, options = trial.run(mesh), trial.problem, trial.config.train
    crowd = max(1.0, machine.ranks_per_node / machine.processors_per_node)
    num_labels, load = len(problem.label_names), _of_turn(load, turn, options.batch_size)
    costs = sum(block_costs(problem.card, num_labels, load.length))
    fullest = part(0, options.micro_batches, mesh[0])[1] / options.micro_batches
    alone = trial.room.on_host and torch.get_num_threads() == 1  # its own time on a core, which others may want, tells
    computed = turn.stages[0] if alone else turn.parts["forward_backward"]
    processors = max(1, machine.processors_per_node // machine.ranks_per_node)
    per_processor = turn.tokens * fullest * costs / computed / processors
    size = sum(block_sizes(problem.card, num_labels))
    update = turn.parts["update"] / STEPS / crowd
    known = {"gflops": per_processor / 1e9, "update_mega_per_second": size / mesh[0] / update / 1e6, "step_ms": 0.0}
    machine = machine.model_copy(update=known)
    left = turn.seconds / STEPS - sum(
        trial.expect(machine.model_copy(update={"sum_gb_per_second": 1e9}), load, mesh).values()
    )
    left = max(1e-6, left / crowd)
    if mesh[0] == 1:
        return machine.model_copy(update={"step_ms": 1e3 * left})
    return machine.model_copy(update={"sum_gb_per_second": 4 * size / left / 1e9})


def _of_turn(load: Load, turn: Turn, batch_size: int) -> Load:
    """With the length of those sequences that were in its batches."""
    return Load(load.ranks, load.sequences, turn.tokens / STEPS / batch_size)


def _solve(machine: Machine, field: str, load: Load, trial: _Trial, mesh: Mesh) -> Machine:
    """The figure with which a step takes as long as it did, or none at all if that is too long (collective)."""
    turn = trial.run(mesh)
    load = _of_turn(load, turn, trial.config.train.batch_size)

    def with_figure(value: float) -> Machine:
        return machine.model_copy(update={field: value})

    def is_too_long(value: float) -> bool:
        return sum(trial.expect(with_figure(value), load, mesh).values()) > turn.seconds / STEPS

    return with_figure(_bisect(is_too_long))


def _bisect(is_too_large: Callable[[float], bool]) -> float:
    low, high = 0.0, LONGEST
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if is_too_large(middle) else (middle, high)
    return low
