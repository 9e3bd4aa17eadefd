"""`mpitrain plan`: which meshes have room for a job, how long a step takes on each, and what the stages of one hold."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from mpitrain.arrange import Arrangement, name_blocks, read_table
from mpitrain.config import Config, flags_of
from mpitrain.dataset.loader import open_split
from mpitrain.dataset.sequences import Sequences
from mpitrain.errors import DataError, UsageError, on_all_ranks
from mpitrain.files import replace_file
from mpitrain.fit import block_sizes, gib, state_bytes
from mpitrain.forecast import TERMS, Forecast, forecasts, play_schedule
from mpitrain.gauge import gauge
from mpitrain.machine import Load, Machine, kept_file, read_machine
from mpitrain.model.cost import block_costs
from mpitrain.observe.console import Console
from mpitrain.observe.record import MACHINE, PLAN
from mpitrain.pipeline.draw import LEGEND, text, write
from mpitrain.pipeline.prove import Proof
from mpitrain.problem import Problem, find_problem
from mpitrain.runtime.agree import Comm, attempt_at_root, together
from mpitrain.split import part

COLUMNS = 96
MOST_ROWS = 12
NOT_OF_THE_RUN = ("--machine", "--out", "--mesh.data", "--mesh.pipe", "--mesh.tensor")


def plan(
    comm: Comm, config: Config, console: Console, *, num_ranks: int, show_schedule: bool, fields: Sequence[str]
) -> None:
    """Print the meshes, best first, and the stages of the best (collective).

    The machine's figures are those of `--machine`, or measured here by some steps of training; they are kept, for
    the run to be compared with what was foretold. With `--out`, as machine.toml, too, all meshes as plan.json, and the
    schedule as schedule.png and schedule.svg.

    Args:
        comm: the ranks that measure.
        config: of the run that is planned.
        console: speaks on rank 0.
        num_ranks: of that run.
        show_schedule: draw it.
        fields: the configuration's flags, as they were given.

    Raises:
        UsageError: mesh, layers and schedule do not fit each other, the ranks or the model; or the machine's file.
    """
    _require_mesh(config, num_ranks)
    problem = find_problem(comm, config, console)
    assert problem.info is not None and problem.directory is not None
    split = open_split(comm, problem.directory, problem.info, "train")
    if split is None or not len(split.index.lengths):
        raise on_all_ranks(DataError(f"{problem.directory}: there is no train split; a plan is for training"))
    load = Load(num_ranks, len(split.index.lengths), problem.mean_length)
    machine = find_machine(comm, config, problem, split, num_ranks, console)
    with together(comm, "planning"):
        if comm.rank == 0:
            num_labels, table = len(problem.label_names), read_table(config)
            found = forecasts(machine, load, config, problem.card, num_labels, table)
            console.show(table_of(config, load, found))
            _say_best(console, config, load, found[0], fields)
            proof = _say_stages(console, config, problem, found[0].arrangement)
            if config.machine is None:
                _keep(machine, config, num_ranks, console)
            if config.out is not None:
                machine.write(config.out / MACHINE)
                replace_file(config.out / PLAN, json.dumps([each.document() for each in found], indent=1) + "\n")
            if show_schedule:
                _show(console, config.out, found[0].arrangement, proof)


def _require_mesh(config: Config, num_ranks: int) -> None:
    """Refuse before anything is measured what no model and no machine could do."""
    if num_ranks % math.prod(config.mesh.asked.values()):
        told = f"{config.mesh.flags}: of {num_ranks} ranks no such mesh can be made; leave an axis out"
        raise on_all_ranks(UsageError(told))


def _keep(machine: Machine, config: Config, num_ranks: int, console: Console) -> None:
    try:
        machine.write(kept_file(config, num_ranks))
    except UsageError as error:
        console.warn(f"the run will not be compared with this plan, unless by --machine: {error}")


def find_machine(
    comm: Comm, config: Config, problem: Problem, split: Sequences, num_ranks: int, console: Console
) -> Machine:
    """Of `--machine`, or of this job; who plans on one rank means a job on its node (collective)."""
    if config.machine is not None:
        file = config.machine
        return Machine(**attempt_at_root(comm, "reading --machine", lambda: read_machine(file).model_dump()))
    console.say("measure", f"{config.model} on {comm.size} rank(s) here, some steps of each kind of mesh")
    machine = gauge(comm, config, problem, split)
    return machine.model_copy(update={"ranks_per_node": num_ranks} if comm.size == 1 else {})


def table_of(config: Config, load: Load, found: Sequence[Forecast]) -> Table:
    """A row for each mesh."""
    title = f"{config.model} on {load.ranks:,} rank(s): a step of {config.train.batch_size} sequences, as foretold"
    table = Table(
        box=None, pad_edge=False, padding=(0, 0, 0, 1), header_style="bold", title=title, title_justify="left"
    )  # narrow, to fit 80 columns
    table.add_column("mesh", no_wrap=True)
    for name in ("GiB", "ms", *TERMS, "tok/s", "node-h"):
        table.add_column(name, justify="right", no_wrap=True)
    for each in found[:MOST_ROWS]:
        mesh, speed = each.arrangement, load.length * config.train.batch_size / each.seconds
        times = (_ms(each.seconds), *(_ms(each.terms[term]) for term in TERMS))
        row = [f"{mesh.data}x{mesh.pipe}x{mesh.tensor}", f"{each.need.expected / 2**30:,.3g}", *times]
        row += [f"{speed:,.0f}", f"{each.node_hours:.3g}"]
        table.add_row(*row, style="" if each.fits else "dim")
    told = ["mesh: data x pipe x tensor; GiB of a rank; ms of a step, by terms; node-hours of an epoch"]
    left = [f"{len(found) - MOST_ROWS} slower meshes are left out"] if len(found) > MOST_ROWS else []
    dim = ["dim ones have no room in memory"] if not all(each.fits for each in found) else []
    table.caption, table.caption_justify = "; ".join([*told, *left, *dim]), "left"
    return table


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f}" if seconds >= 0.01 else f"{1e3 * seconds:.1f}"


def _say_best(console: Console, config: Config, load: Load, best: Forecast, fields: Sequence[str]) -> None:
    mesh = best.arrangement
    console.say("mesh", f"{load.ranks} rank(s) = {mesh.shape}")
    if not best.fits:
        console.warn(
            f"no mesh has room: this one needs {gib(best.need.expected)} of a rank; more ranks, fewer of them on a "
            "node, more --train.micro_batches, or --train.recompute block would take less"
        )
    if (num_batches := config.train.micro_batches) < mesh.data:
        console.warn(
            f"{num_batches} of {mesh.data:,} replicas have work: a step has {num_batches} micro-batches; more "
            "--train.micro_batches, of a larger --train.batch_size, give it to all"
        )
    axes = f"--mesh.data {mesh.data} --mesh.pipe {mesh.pipe} --mesh.tensor {mesh.tensor}"
    same = [word for flag in flags_of(fields) if flag[0].partition("=")[0] not in NOT_OF_THE_RUN for word in flag]
    console.say_whole("run", f"mpirun -np {load.ranks} python -m mpitrain {shlex.join([*same, *axes.split()])}")


def prove(arrangement: Arrangement, mine: int, problem: Problem) -> Proof:
    """Play the schedule, times in proportion to the cost of each chunk; all blocks, forward and backward, take 1."""
    costs = block_costs(problem.card, len(problem.label_names), problem.mean_length)
    return play_schedule(arrangement, mine, [sum(costs[first:last]) / sum(costs) for first, last in arrangement.chunks])


def _say_stages(console: Console, config: Config, problem: Problem, arrangement: Arrangement) -> Proof:
    card, num_labels = problem.card, len(problem.label_names)
    num_micro_batches = part(0, config.train.micro_batches, arrangement.data)[1]
    proof = prove(arrangement, num_micro_batches, problem)
    console.say(
        "stages",
        f"{arrangement.schedule.name}, up to {num_micro_batches} micro-batches a replica and step; "
        f"idle {proof.bubble:.1%} of the time",
    )
    if config.pipeline.balance == "measured":
        console.warn("--pipeline.balance measured is for runs; a plan splits the model by estimated cost")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("stage", "blocks"):
        table.add_column(name)
    for name in ("parameters", "of all", "state GiB", "busy", "micro-batches kept"):
        table.add_column(name, justify="right")
    sizes, total = block_sizes(card, num_labels, arrangement.tensor), sum(block_sizes(card, num_labels))
    for stage, chunks in enumerate(arrangement.stages):
        parameters = sum(sizes[block] for first, last in chunks for block in range(first, last))
        kept = f"{proof.peak_live[stage] / len(chunks):.3g}"
        busy = f"{proof.busy[stage] / proof.makespan:.1%}"
        state = state_bytes(parameters, arrangement.data, config.train.precision)
        numbers = (f"{parameters:,}", f"{parameters / total:.1%}", f"{state / 2**30:.3g}", busy, kept)
        table.add_row(str(stage), name_blocks(chunks, card), *numbers)
    console.show(table)
    console.say("", "parameters and state (weights, gradients, optimizer) of each rank of a stage")
    return proof


def _show(console: Console, out: Path | None, arrangement: Arrangement, proof: Proof) -> None:
    placement = arrangement.schedule.placement
    console.show(Text(text(proof, placement, COLUMNS / proof.makespan if proof.makespan else 1.0)))
    console.show(Text(f"{LEGEND}{'; below: the chunk' if placement.num_chunks > 1 else ''}", style="dim"))
    shortest = min(span.stop - span.start for spans in proof.spans for span in spans)
    if shortest * COLUMNS < proof.makespan:
        console.show(Text("passes are narrower than a column here: --out DIR draws all of them", style="dim"))
    if out is not None:
        title = f"{arrangement.schedule.name}, {arrangement.pipe} stages: idle {proof.bubble:.1%}"
        write(out, "schedule", {title: proof}, "time, in passes of a micro-batch through the model", console)
