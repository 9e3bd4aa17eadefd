"""`mpitrain plan`: which stage would hold what, how long it would idle and how much it would keep, before any run.

Times are estimates from the number of operations of each block; on one machine they are in proportion to real ones.
Nothing is known of the job's memory: a run for which it is short takes another mesh, unless one is asked for.
"""

from __future__ import annotations

from pathlib import Path

from rich.table import Table
from rich.text import Text

from mpitrain.arrange import TYPICAL_LENGTH, Arrangement, arrange, name_blocks, read_table
from mpitrain.config import Config
from mpitrain.fit import block_sizes, state_bytes
from mpitrain.model.card import ModelCard, resolve_model
from mpitrain.model.cost import block_costs
from mpitrain.observe.console import Console
from mpitrain.pipeline.draw import LEGEND, text, write
from mpitrain.pipeline.messages import program
from mpitrain.pipeline.prove import Proof, Times, play
from mpitrain.problem import read_card
from mpitrain.runtime.agree import Comm, together
from mpitrain.split import part

NUM_LABELS = 9  # as in CoNLL-2003; the head is small
COLUMNS = 96


def plan(comm: Comm, config: Config, console: Console, *, num_ranks: int, show_schedule: bool) -> None:
    """Print the plan, and with `--out` draw the schedule as schedule.png and schedule.svg (collective).

    Raises:
        UsageError: mesh, layers and schedule do not fit each other, the ranks or the model.
    """
    with together(comm, "planning"):
        if comm.rank == 0:
            card = read_card(resolve_model(config.model))
            arrangement = arrange(num_ranks, config, card, NUM_LABELS, table=read_table(config))
            num_micro_batches = part(0, config.train.micro_batches, arrangement.data)[1]
            proof = prove(arrangement, card, num_micro_batches)
            if config.pipeline.balance == "measured":
                console.warn("--pipeline.balance measured is for runs; a plan splits the model by estimated cost")
            _say(console, config, card, arrangement, proof, num_micro_batches)
            if show_schedule:
                _show(console, config.out, arrangement, proof)


def prove(arrangement: Arrangement, card: ModelCard, num_micro_batches: int) -> Proof:
    """Play the schedule, times in proportion to the cost of each chunk; all blocks, forward and backward, take 1."""
    costs = block_costs(card, NUM_LABELS, TYPICAL_LENGTH)
    chunks = [sum(costs[first:last]) / sum(costs) for first, last in arrangement.chunks]
    times = Times([chunk / 3 for chunk in chunks], [2 * chunk / 3 for chunk in chunks], [chunk / 3 for chunk in chunks])
    told = [program(arrangement.schedule, stage, num_micro_batches) for stage in range(arrangement.pipe)]
    return play(told, num_micro_batches, placement=arrangement.schedule.placement, times=times, blocking_sends=False)


def _say(
    console: Console,
    config: Config,
    card: ModelCard,
    arrangement: Arrangement,
    proof: Proof,
    num_micro_batches: int,
) -> None:
    num_ranks = arrangement.data * arrangement.pipe * arrangement.tensor
    console.say("mesh", f"{num_ranks} rank(s) = {arrangement.shape}")
    console.say(
        "plan",
        f"{config.model}, {arrangement.schedule.name}, up to {num_micro_batches} micro-batches a replica and step; "
        f"stages idle {proof.bubble:.1%} of the time",
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("stage", "blocks"):
        table.add_column(name)
    for name in ("parameters", "of all", "state GiB", "busy", "micro-batches kept"):
        table.add_column(name, justify="right")
    sizes = block_sizes(card, NUM_LABELS, arrangement.tensor)
    total = sum(block_sizes(card, NUM_LABELS))
    for stage, chunks in enumerate(arrangement.stages):
        parameters = sum(sizes[block] for first, last in chunks for block in range(first, last))
        kept = f"{proof.peak_live[stage] / len(chunks):.3g}"
        busy = f"{proof.busy[stage] / proof.makespan:.1%}"
        state = state_bytes(parameters, arrangement.data, config.train.precision)
        numbers = (f"{parameters:,}", f"{parameters / total:.1%}", f"{state / 2**30:.3g}", busy, kept)
        table.add_row(str(stage), name_blocks(chunks, card), *numbers)
    console.show(table)
    console.say("", "parameters and state (weights, gradients, optimizer) of each rank of a stage")


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
