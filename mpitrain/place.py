"""Where and how this rank computes: device, threads, mesh, and its stage of the model."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mpitrain.comm import gpu
from mpitrain.comm.buffers import Transport
from mpitrain.config import Config, Train
from mpitrain.errors import UsageError, on_all_ranks
from mpitrain.model import linear
from mpitrain.model.bert import BertStage, num_blocks
from mpitrain.model.card import ModelCard
from mpitrain.model.cost import block_costs
from mpitrain.model.initial import initialize, load_weights
from mpitrain.observe.console import Console
from mpitrain.pipeline.balance import by_hand, choose_mesh, split_blocks
from mpitrain.pipeline.executor import Executor
from mpitrain.problem import Problem
from mpitrain.runtime import mesh as meshes
from mpitrain.runtime.agree import Comm, any_rank, attempt, collect
from mpitrain.runtime.device import Cores, choose_device, keep_freed_memory, place_on_node, share_cores
from mpitrain.runtime.launch import library_version
from mpitrain.runtime.mesh import Mesh

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WORTHWHILE = 1.5  # a gain over the library to be expected that is no chance
TYPICAL_LENGTH = 32.0  # tokens of a sentence, for the cost of attention in the split of layers over stages


@dataclass(frozen=True)
class Place:
    """Where and how this rank computes."""

    mesh: Mesh
    transport: Transport
    stages: list[tuple[int, int]]

    @property
    def blocks(self) -> tuple[int, int]:
        """The blocks [first, last) of this rank's stage."""
        return self.stages[self.mesh.stage]


def find_place(comm: Comm, config: Config, problem: Problem, console: Console, *, pipe: int | None = None) -> Place:
    """Choose what was left open of the mesh and say what was chosen (collective).

    Args:
        pipe: number of stages if neither axis is given, instead of the rule for training.
    """
    device = choose_device(comm, config.train.device)
    if device.type == "cpu":
        keep_freed_memory()
    cores = share_cores(comm, config.train.threads)
    shape, stages = attempt(comm, "choosing the mesh", lambda: _choose_mesh(comm.size, config, problem, pipe))
    direct, why = gpu.decide(comm, device, config.comm.gpu) if device.type == "cuda" else (True, "")
    if device.type == "cpu" and config.comm.gpu != "auto":
        console.warn(f"--comm.gpu {config.comm.gpu} has no effect: this run uses no GPU")
    mesh = meshes.build(comm, *shape)
    transport = Transport(device, direct, cores.crowded)
    say_place(comm, console, transport, why, cores)
    torch.set_float32_matmul_precision(config.train.matmul_precision)
    if multiplies_by_library(device, config.train):
        choose_library(comm, config.train, console)
    elif config.train.linear != "auto":
        console.warn(f"--train.linear {config.train.linear} has no effect: it is for fp32 on CPUs")
    console.say("mesh", f"{comm.size} rank(s) = {shape[0]} data x {shape[1]} pipe")
    for number, stage in enumerate(stages if shape[1] > 1 else []):
        console.say("", f"stage {number}: {name_blocks(stage, problem.card)}")
    return Place(mesh, transport, stages)


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
    if transport.device.type == "cuda":
        way = "staged through pinned host memory" if transport.staged else "directly"
        console.say("device", f"{torch.cuda.get_device_name(transport.device)}; tensors reach MPI {way} ({why})")


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
    everyone = collect(comm, linear.time_libraries())
    seconds = {library: sum(times[library] for times in everyone) for library in linear.LIBRARIES}
    if seconds[taken] > WORTHWHILE * seconds[left] and not options.reproducible:
        taken, left = left, taken
    linear.use(taken)
    gain = seconds[left] / seconds[taken]
    console.say("linear", f"fp32 products by {linear.NAMES[taken]}, {gain:.2f} times as fast as {linear.NAMES[left]}")


def _choose_mesh(
    num_ranks: int, config: Config, problem: Problem, pipe: int | None
) -> tuple[tuple[int, int], list[tuple[int, int]]]:
    shape = _mesh_shape(num_ranks, config, problem.card, pipe)
    meshes.check_shape(num_ranks, *shape)
    return shape, _split_model(config, problem, shape[1])


def _mesh_shape(num_ranks: int, config: Config, card: ModelCard, pipe: int | None) -> tuple[int, int]:
    data, stages = config.mesh.data, config.mesh.pipe
    if data is None and stages is None:
        if pipe is not None:
            return num_ranks // pipe, pipe
        if config.pipeline.layers is not None:
            return max(1, num_ranks // len(config.pipeline.layers)), len(config.pipeline.layers)
        return choose_mesh(num_ranks, card.num_hidden_layers, config.train.micro_batches)
    return data or max(1, num_ranks // (stages or 1)), stages or max(1, num_ranks // (data or 1))


def _split_model(config: Config, problem: Problem, num_stages: int) -> list[tuple[int, int]]:
    card = problem.card
    if config.pipeline.layers is None:
        return split_blocks(block_costs(card, len(problem.label_names), TYPICAL_LENGTH), num_stages)
    if len(config.pipeline.layers) != num_stages:
        given = ",".join(map(str, config.pipeline.layers))
        raise UsageError(f"--pipeline.layers {given}: {len(config.pipeline.layers)} stages, the mesh has {num_stages}")
    return by_hand(config.pipeline.layers, card.num_hidden_layers)


def name_blocks(stage: tuple[int, int], card: ModelCard) -> str:
    """A stage's blocks in words: "embeddings, layers 0-1"."""
    first, last = stage
    layers = range(max(first, 1) - 1, min(last, num_blocks(card) - 1) - 1)
    words = ["embeddings"] if first == 0 else []
    if layers:
        words.append(f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]}-{layers[-1]}")
    return ", ".join([*words, "classifier"] if last == num_blocks(card) else words)


def build_stage(config: Config, problem: Problem, place: Place) -> tuple[BertStage, Executor]:
    """This rank's blocks with their first weights in fp32, and the executor that runs them."""
    stage = BertStage(problem.card, len(problem.label_names), *place.blocks, config.train.recompute)
    initialize(stage, problem.card, config.train.seed)
    if problem.pretrained is not None:
        names = [name for name, _ in stage.named_parameters()]
        load_weights(stage, problem.pretrained.weights(names))
    stage.to(place.transport.device)
    return stage, Executor(stage, place.mesh, place.transport, problem.card.hidden_size)
