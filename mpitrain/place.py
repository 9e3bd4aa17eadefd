"""Where and how this rank computes: device, threads, mesh, and its stage of the model."""

from __future__ import annotations

import platform
from collections import Counter
from dataclasses import dataclass

import torch

from mpitrain.arrange import TYPICAL_LENGTH, Arrangement, Blocks, arrange, name_blocks, read_table
from mpitrain.comm import gpu
from mpitrain.comm.buffers import Transport
from mpitrain.comm.group import TensorGroup, open_group
from mpitrain.config import Config
from mpitrain.errors import UsageError, on_all_ranks
from mpitrain.fit import Room, gib
from mpitrain.model import linear
from mpitrain.model.bert import BertStage
from mpitrain.model.card import ModelCard
from mpitrain.model.initial import initialize, load_weights
from mpitrain.observe.console import Console
from mpitrain.pipeline.executor import Executor
from mpitrain.problem import Problem
from mpitrain.runtime import mesh as meshes
from mpitrain.runtime.agree import Comm, any_rank, attempt, attempt_at_root, collect, gather
from mpitrain.runtime.device import (
    Cores,
    choose_device,
    gpu_of,
    keep_freed_memory,
    node_of_each_rank,
    place_on_node,
    share_cores,
)
from mpitrain.runtime.launch import library_version
from mpitrain.runtime.memory import least_memory
from mpitrain.runtime.mesh import Mesh
from mpitrain.runtime.notes import State, note
from mpitrain.sections import Train

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
USABLE = 0.9  # of the memory there is: the system has some of it
WORTHWHILE, CHECKS = 1.5, 3  # a gain over the library to be expected that is no chance, found so often in a row


@dataclass(frozen=True)
class Place:
    """Where and how this rank computes."""

    mesh: Mesh
    transport: Transport
    arrangement: Arrangement
    group: TensorGroup

    @property
    def chunks(self) -> list[Blocks]:
        """The blocks of this rank's stage."""
        return self.arrangement.stages[self.mesh.stage]

    def close(self) -> None:
        """Give memory and communicators back (collective)."""
        self.group.close()
        self.mesh.free()


def find_place(comm: Comm, config: Config, problem: Problem, console: Console, *, pipe: int | None = None) -> Place:
    """Choose what was left open of the mesh and say what was chosen (collective).

    Args:
        pipe: number of stages if no axis is given, instead of the rule for training.
    """
    device = choose_device(comm, config.train.device)
    if device.type == "cpu":
        keep_freed_memory()
    cores = share_cores(comm, config.train.threads)
    arrangement = choose_arrangement(comm, config, problem, device, console, pipe)
    direct, why = gpu.decide(comm, device, config.comm.gpu) if device.type == "cuda" else (True, "")
    if device.type == "cpu" and config.comm.gpu != "auto":
        console.warn(f"--comm.gpu {config.comm.gpu} has no effect: this run uses no GPU")
    mesh = meshes.build(comm, arrangement.data, arrangement.pipe, arrangement.tensor)
    transport = Transport(device, direct, cores.crowded)
    say_place(comm, console, transport, why, cores)
    if console.hears("debug"):  # of the same level on all ranks
        where = f"{platform.node()}, {cores.binding}, {device}"
        for rank, told in enumerate(gather(comm, [mesh.replica, mesh.stage, mesh.tensor, where])):
            console.detail("", "rank {}: replica {}, stage {}, tensor {}; {}".format(rank, *told))
    torch.set_float32_matmul_precision(config.train.matmul_precision)
    if multiplies_by_library(device, config.train):
        choose_library(comm, config.train, console)
    elif config.train.linear != "auto":
        console.warn(f"--train.linear {config.train.linear} has no effect: it is for fp32 on CPUs")
    precision = config.train.matmul_precision
    if precision != "highest" and any_rank(comm, not linear.rounds(device, DTYPES[config.train.precision])):
        console.warn(f"--train.matmul_precision {precision} has no effect on products of {config.train.precision} here")
    group = open_group(mesh.world, mesh.tensor_axis, transport)
    console.say("mesh", f"{comm.size} rank(s) = {arrangement.shape}{f', {group.way}' if group.size > 1 else ''}")
    return Place(mesh, transport, arrangement, group)


def choose_arrangement(
    comm: Comm, config: Config, problem: Problem, device: torch.device, console: Console, pipe: int | None
) -> Arrangement:
    """What fits ranks, nodes and memory; warns where memory may be short (collective)."""
    table = attempt_at_root(comm, "reading --pipeline.schedule", lambda: read_table(config))
    room = find_room(comm, device)
    length = problem.mean_length or TYPICAL_LENGTH
    num_labels, asked = len(problem.label_names), {"table": table, "pipe": pipe}

    def choose() -> Arrangement:
        return arrange(comm.size, config, problem.card, num_labels, room=room, length=length, **asked)

    arrangement = attempt(comm, "choosing the mesh", choose)
    need = arrangement.need
    if need is not None and need.expected > room.num_bytes:
        console.warn(
            f"a rank may need {gib(need.expected)} of memory and has {gib(room.num_bytes)}; more --mesh.pipe or "
            "--mesh.tensor, more --train.micro_batches, or --train.recompute block take less"
        )
    return arrangement


def find_room(comm: Comm, device: torch.device) -> Room:
    """What each rank may use (collective)."""
    return Room(int(USABLE * least_memory(comm, device)), node_of_each_rank(comm), device.type == "cpu")


def say_stages(console: Console, place: Place, card: ModelCard) -> None:
    """Which stage holds what, if there are several."""
    stages = place.arrangement.stages
    for number, chunks in enumerate(stages if len(stages) > 1 else []):
        console.say("", f"stage {number}: {name_blocks(chunks, card)}")


def say_place(comm: Comm, console: Console, transport: Transport, why: str, cores: Cores) -> None:
    """Print what this job runs on, and why a GPU's tensors travel as they do (collective)."""
    per_node = place_on_node(comm)[1]
    where = f"{comm.size} rank(s), {per_node} on this node, {cores.num_threads} thread(s) each, {cores.binding}"
    where += " (more ranks than cores: waiting ranks sleep)" if transport.patient else ""
    console.say("ranks", f"{where}; {library_version()}")
    if cores.excess and transport.device.type == "cpu":
        console.warn(
            f"{cores.excess} rank(s) have more threads than cores for them, so that threads wait for each other; "
            "without OMP_NUM_THREADS and --train.threads there is one for each core"
        )
    if cores.misread:
        console.warn(f"OMP_NUM_THREADS: found {cores.misread!r}, which is no number of threads; it is ignored")
    if transport.device.type == "cuda":
        ranks = Counter(collect(comm, gpu_of(transport.device)))
        gpus = f"{len(ranks)} GPU(s) like {torch.cuda.get_device_name(transport.device)}"
        gpus += f", up to {max(ranks.values())} ranks on one" if max(ranks.values()) > 1 else ", one a rank"
        way = "staged through pinned host memory" if transport.staged else "directly"
        console.say("device", f"{gpus}; tensors reach MPI {way} ({why})")


def multiplies_by_library(device: torch.device, options: Train) -> bool:
    """Whether it matters which library makes fp32 products."""
    return device.type == "cpu" and options.precision == "fp32"


def choose_library(comm: Comm, options: Train, console: Console) -> None:
    """Let the library that was asked for, or else one that is fast on all ranks, make fp32 products (collective).

    Where sums have to be reproducible no timing decides.

    Raises:
        UsageError: oneDNN was asked for, and torch comes without it on some rank.
    """
    available = not any_rank(comm, not linear.has_onednn())
    if options.linear == "onednn" and not available:
        raise on_all_ranks(UsageError("--train.linear onednn: torch comes without oneDNN here; torch would work"))
    if options.linear != "auto" or not available:
        linear.use("onednn" if options.linear == "onednn" else "torch")
        return
    suited = set(collect(comm, linear.suits_maker()))
    taken, left = linear.LIBRARIES if suited == {linear.LIBRARIES[0]} else linear.LIBRARIES[::-1]
    for number in range(CHECKS):
        everyone = collect(comm, linear.time_libraries())
        seconds = {library: sum(times[library] for times in everyone) for library in linear.LIBRARIES}
        if options.reproducible or seconds[taken] <= WORTHWHILE * seconds[left]:
            break
        if number == CHECKS - 1:
            taken, left = left, taken
    linear.use(taken)
    gain = seconds[left] / seconds[taken]
    console.say("linear", f"fp32 products by {linear.NAMES[taken]}, {gain:.2f} times as fast as {linear.NAMES[left]}")


def build_stage(config: Config, problem: Problem, place: Place) -> tuple[BertStage, Executor]:
    """This rank's blocks with their first weights in fp32, and the executor that runs them."""
    note(b"building the model", state=State.WORKING)
    stage = BertStage(problem.card, len(problem.label_names), place.chunks, config.train.recompute, place.group)
    initialize(stage, problem.card, config.train.seed)
    if problem.pretrained is not None:
        for name in stage.shards:  # one by one: there may be no room for all of them whole
            load_weights(stage, problem.pretrained.weights([name]))
    stage.to(place.transport.device)
    return stage, Executor(stage, place.mesh, place.transport, place.arrangement.schedule)
