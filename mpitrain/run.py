"""A run on this rank: everything that the training loop touches, built in the order in which it depends on itself."""

from __future__ import annotations

import math
import platform
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch

from mpitrain.checkpoint.manifest import Progress, find_checkpoint
from mpitrain.checkpoint.save import clear_left_overs
from mpitrain.checkpoint.saver import Saver
from mpitrain.comm.buckets import fill_buckets
from mpitrain.comm.choice import choose_exchange
from mpitrain.config import Config
from mpitrain.dataset.batches import TrainPlan
from mpitrain.dataset.loader import Split, open_split
from mpitrain.dataset.sequences import Sequences
from mpitrain.errors import DataError, UsageError, on_all_ranks
from mpitrain.files import user_path
from mpitrain.machine import Machine, known_machine
from mpitrain.metrics import Scores
from mpitrain.model.cost import block_costs
from mpitrain.observe.board import Board
from mpitrain.observe.console import Console
from mpitrain.observe.ranks import Ranks
from mpitrain.observe.record import RunDirectory, new_run_directory
from mpitrain.observe.stragglers import Stragglers
from mpitrain.optim import ShardedAdamW
from mpitrain.place import DTYPES, Place, build_stage, find_place, say_stages
from mpitrain.problem import Problem, find_problem
from mpitrain.runtime.agree import Comm, any_rank, attempt, gather, share, together
from mpitrain.runtime.deadline import Deadline, find_deadline
from mpitrain.runtime.device import place_on_node
from mpitrain.runtime.launch import StopRequest
from mpitrain.runtime.survive import revoke
from mpitrain.step import Stepper
from mpitrain.weigh import balance

RECENT = 20  # steps
LEARNING_RATES = {"pretrained": 5e-5, "scratch": 1e-3}


@dataclass
class Run:
    """What the loop touches."""

    config: Config
    console: Console
    problem: Problem
    place: Place
    directory: RunDirectory
    plan: TrainPlan
    num_steps: int
    splits: dict[str, Split]
    stepper: Stepper
    saver: Saver
    stop: StopRequest
    deadline: Deadline
    stragglers: Stragglers
    ranks: Ranks
    board: Board | None  # on rank 0, if asked for
    machine: Machine | None  # on rank 0, if its figures are known
    born: float  # when this start began, by time.perf_counter
    seen: float  # when its last step was done, or else the run directory was opened
    is_open: bool = False  # whether it has gone on from where it was
    progress: Progress = field(default_factory=Progress)
    scores: dict[str, Scores] = field(default_factory=dict)  # by split, of the present weights
    weights_of: int | None = None  # the step, if it is not the last one
    last_f1: float | None = None  # on dev, of the newest evaluation
    steady: deque[dict[str, float]] = field(default_factory=lambda: deque(maxlen=10 * RECENT))  # metrics of steps
    last_steps: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))  # seconds of each

    @property
    def world(self) -> Comm:
        """All ranks."""
        return self.place.mesh.world

    def abandon(self) -> None:
        """Leave all as it is, because ranks are gone: what others wait in is revoked, own threads and files end."""
        mesh = self.place.mesh
        comms = [mesh.world, mesh.data_axis, mesh.pipe_axis, mesh.tensor_axis]
        revoke([*comms, *self.stepper.exchange.comms, *self.place.group.comms])
        self.stepper.reducer.close()
        self.saver.close()
        self.directory.release()
        self._end_board()

    def write_exit(self, code: int, reason: str) -> None:
        """What has become of it (one rank only)."""
        seconds = time.perf_counter() - self.born if self.is_open else None
        self.directory.write_exit(code, reason, self.progress.step, seconds, self.saver.take_seconds())

    def _end_board(self) -> None:
        if self.board is not None:
            self.board.close()

    def close(self) -> None:
        """Give threads, memory and communicators back (collective)."""
        self._end_board()
        self.saver.close()
        self.stepper.close()
        self.place.close()


def build(
    comm: Comm, config: Config, console: Console, stop: StopRequest, born: float, claimed: RunDirectory | None = None
) -> Run:
    """Everything but the state that a checkpoint may bring, in the run directory `claimed` if given (collective)."""
    problem = find_problem(comm, config, console)
    say_problem(console, config, problem)
    place = find_place(comm, config, problem, console)
    splits = {name: split for name in ("train", "dev", "test") if (split := _open(place, problem, name)) is not None}
    plan, num_steps = make_plan(config, problem, splits)
    place = balance(place, config, problem, splits["train"], console)
    say_stages(console, place, problem.card)
    peak = config.train.learning_rate or LEARNING_RATES["pretrained" if problem.pretrained else "scratch"]
    stepper = build_stepper(config, problem, place, console, num_steps=num_steps, peak=peak)
    say_plan(console, config, plan, num_steps, peak)
    directory = open_run_directory(comm, config, console, claimed)
    machine = attempt(comm, "reading --machine", lambda: known_machine(config, comm.size) if comm.rank == 0 else None)
    wanted = comm.rank == 0 and config.log.tensorboard
    board = attempt(comm, "opening event files", lambda: Board(directory.path / "tensorboard") if wanted else None)
    saver = Saver(place.mesh.world, directory.checkpoints, asynchronous=config.checkpoint.asynchronous)
    return Run(
        config=config,
        console=console,
        problem=problem,
        place=place,
        directory=directory,
        plan=plan,
        num_steps=num_steps,
        splits=splits,
        stepper=stepper,
        saver=saver,
        stop=stop,
        deadline=await_deadline(comm, config, console),
        stragglers=watch_pace(place, problem),
        ranks=Ranks(place.mesh.shape, gather(comm, platform.node())),
        board=board,
        machine=machine,
        born=born,
        seen=born,
    )


def watch_pace(place: Place, problem: Problem) -> Stragglers:
    """What is to be expected of each rank."""
    mesh, arrangement = place.mesh, place.arrangement
    costs = block_costs(problem.card, len(problem.label_names), problem.mean_length)
    stages = [sum(sum(costs[first:last]) for first, last in chunks) for chunks in arrangement.stages]
    return Stragglers(mesh.shape, stages)


def await_deadline(comm: Comm, config: Config, console: Console) -> Deadline:
    """The end of this job's time, of which rank 0 alone knows (collective)."""
    limit = config.runtime.time_limit
    deadline, obstacle = attempt(
        comm, "asking for the time limit", lambda: find_deadline(limit) if comm.rank == 0 else (Deadline(), "")
    )
    if obstacle:
        console.warn(f"{obstacle}; --runtime.time_limit tells it")
    if math.isfinite(deadline.at):
        left = timedelta(seconds=round(deadline.left()))
        console.say("time", f"{left} left ({deadline.told_by}): a checkpoint and exit code 75 before that")
    return deadline


def build_stepper(
    config: Config, problem: Problem, place: Place, console: Console, *, num_steps: int, peak: float
) -> Stepper:
    """This rank's stage with its first weights, and all that trains it (collective); says how gradients travel."""
    stage, executor = build_stage(config, problem, place)
    mesh, transport = place.mesh, place.transport
    num_bytes = int(config.comm.bucket_mib * 2**20)
    buckets = fill_buckets(stage, num_bytes, stage.tables, stage.stacks, stage.shards, stage.shared)
    algorithm = config.comm.algorithm
    if any_rank(mesh.world, place_on_node(mesh.tensor_axis)[1] < mesh.num_tensor):
        # What a tensor group shares is summed by each of its ranks with its own replicas. Those may lie on the nodes in
        # other ways, and then sums inside nodes come in other orders: their bits would drift apart.
        if algorithm == "node":
            raise on_all_ranks(
                UsageError("--comm.algorithm node: not with tensor groups across nodes; ring would work")
            )
        algorithm = "ring" if algorithm == "auto" else algorithm
    exchange, why = choose_exchange(
        mesh.world,
        mesh.data_axis,
        transport,
        buckets,
        DTYPES[config.train.precision],
        algorithm=algorithm,
        wire_dtype=torch.bfloat16 if config.comm.wire_dtype == "bf16" else None,
        error_feedback=config.comm.error_feedback,
        reproducible=config.train.reproducible,
    )
    exchange.spread()
    if why:
        console.say("exchange", why)
    return Stepper(
        mesh,
        executor,
        exchange,
        ShardedAdamW(buckets, config.train, first=mesh.tensor == 0),
        options=config.train,
        num_steps=num_steps,
        peak_learning_rate=peak,
        check_every=config.runtime.check_every,
    )


def _open(place: Place, problem: Problem, name: str) -> Split | None:
    assert problem.info is not None and problem.directory is not None
    return open_split(place.mesh.world, problem.directory, problem.info, name)


def make_plan(config: Config, problem: Problem, splits: Mapping[str, Sequences]) -> tuple[TrainPlan, int]:
    """The order of the data and the number of steps."""
    if "train" not in splits or len(splits["train"].index.lengths) == 0:
        raise on_all_ranks(DataError(f"{problem.directory}: there is no train split; training needs one"))
    index, options = splits["train"].index, config.train
    plan = TrainPlan(
        index.lengths,
        index.words,
        batch_size=options.batch_size,
        micro_batches=options.micro_batches,
        hidden_size=problem.card.hidden_size,
        seed=options.seed,
    )
    num_steps = plan.steps_per_epoch * options.epochs
    return plan, min(num_steps, options.max_steps or num_steps)


def say_problem(console: Console, config: Config, problem: Problem) -> None:
    """What is trained on what."""
    assert problem.info is not None
    sizes = (f"{sum(entry.sentences for entry in entries):,} {name}" for name, entries in problem.info.splits.items())
    console.say("data", f"{problem.info.name}: {', '.join(sizes)} sentences; labels {', '.join(problem.label_names)}")
    card = problem.card
    shape = f"{card.num_hidden_layers} layers x {card.hidden_size}, {card.vocab_size:,} word pieces"
    weights = f"weights from {problem.pretrained.directory}" if problem.pretrained else "random weights"
    console.say("model", f"{config.model}: {shape}; {weights}")
    if problem.pretrained is not None and problem.pretrained.note:
        console.say("", problem.pretrained.note)


def say_plan(console: Console, config: Config, plan: TrainPlan, num_steps: int, peak: float) -> None:
    """The numbers that the run is made of."""
    options = config.train
    console.say(
        "plan",
        f"{num_steps} steps of {options.batch_size} sequences in {options.micro_batches} micro-batches, "
        f"{plan.steps_per_epoch} steps an epoch; {options.precision}, learning rate {peak:g}",
    )


def open_run_directory(comm: Comm, config: Config, console: Console, claimed: RunDirectory | None) -> RunDirectory:
    """The directory of this run, made by rank 0 unless it is claimed already (collective)."""
    made = attempt(
        comm, "making the run directory", lambda: _make_directory(config, claimed) if comm.rank == 0 else None
    )
    path, token = share(comm, [str(made.path), made.token] if made else None)
    directory = made or RunDirectory(Path(path))
    with together(comm, "looking for the run directory"):
        if not directory.is_seen(token):
            raise UsageError(
                f"--out {directory.path.absolute()}: rank {comm.rank} on {platform.node()} does not see what rank 0 "
                "has written there; give a directory on a file system that all nodes share, and start all ranks in the "
                "same one"
            )
    console.say_whole("run", path)
    return directory


def _make_directory(config: Config, claimed: RunDirectory | None) -> RunDirectory:
    if config.resume not in ("auto", "none"):
        find_checkpoint(Path(config.resume), best=False)  # a slip must not leave an empty directory behind
    with user_path("--out", config.out or Path("runs")):
        if claimed is None:
            path = config.out or new_run_directory(Path("runs"), f"{Path(config.model).stem}-{Path(config.data).stem}")
            claimed = RunDirectory(path)
            claimed.create()
        clear_left_overs(claimed.checkpoints)
    return claimed
