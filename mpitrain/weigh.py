"""How long each block takes on the ranks' own cores, and the split of the model over stages that follows from it.

An estimate by operations (`model.cost`) knows neither this machine's caches nor that one node is slower than another.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from mpitrain.arrange import Arrangement, Blocks, split_model, stages_of
from mpitrain.checkpoint.manifest import find_checkpoint
from mpitrain.config import Config
from mpitrain.dataset.sequences import Sequences
from mpitrain.errors import CheckpointError
from mpitrain.files import parse_json
from mpitrain.model.bert import BertStage, num_blocks, token_loss
from mpitrain.model.dropout import KeyedDropout
from mpitrain.model.initial import initialize
from mpitrain.model.layout import PackedLayout
from mpitrain.observe.console import Console
from mpitrain.place import DTYPES, Place
from mpitrain.problem import Problem
from mpitrain.runtime.agree import attempt, attempt_at_root, collect

WARM_UP, ROUNDS = 2, 7


@dataclass(frozen=True)
class Pace:
    """What a micro-batch takes.

    Attributes:
        seconds: of each block, forward and backward, mean over the stages.
        speeds: of each stage's machine, 1 on average.
    """

    seconds: list[float]
    speeds: list[float]


def balance(
    place: Place,
    config: Config,
    problem: Problem,
    split: Sequences,
    console: Console,
) -> Place:
    """The place with its stages as `--pipeline.balance measured` wants them, if it is that (collective).

    A run that is resumed on its mesh goes on with its stages, for the same bits.

    Args:
        place: with any split of the model.
        config: of the run.
        problem: likewise.
        split: whose sequences the micro-batches are like.
        console: told of the stages' times.
    """
    mesh, arrangement = place.mesh, place.arrangement
    if config.pipeline.balance != "measured" or mesh.num_stages == 1:
        return place
    before = attempt_at_root(mesh.world, "reading --resume", lambda: last_split(arrangement, config))
    if before is not None:
        console.say("balance", "as before")
        return replace(place, arrangement=replace(arrangement, chunks=[(first, last) for first, last in before]))
    mine = attempt(mesh.world, "timing blocks", lambda: time_blocks(place, config, problem, split))
    pace = pace_of(collect(mesh.world, mine), mesh.num_stages, mesh.num_tensor)
    chunks = split_model(pace.seconds, arrangement.schedule.placement, pace.speeds)
    arrangement = replace(arrangement, chunks=chunks)
    times = [1e3 * each for each in stage_times(arrangement, pace)]
    console.say("balance", f"stage times {' / '.join(f'{each:.3g}' for each in times)} ms a micro-batch")
    return replace(place, arrangement=arrangement)


def last_split(arrangement: Arrangement, config: Config) -> list[Blocks] | None:
    """The split of the model in the run that is resumed; None if there is none, or its mesh was another one."""
    resumed = config.out if config.resume == "auto" else Path(config.resume)
    if config.resume == "none" or resumed is None:
        return None
    try:
        text = (find_checkpoint(resumed, best=False) / "config.json").read_text(encoding="utf-8")
        then = parse_json(text)["mesh"]
        stages = stages_of(then["stages"])
        here = arrangement.data, arrangement.tensor
        same_size = (then["data"], then["tensor"]) == here and sum(map(len, stages)) == len(arrangement.chunks)
    except (CheckpointError, OSError, ValueError, KeyError, TypeError, IndexError):
        return None  # whether that is an error is told when state is taken up
    before = sorted(chain.from_iterable(stages))
    return before if same_size and replace(arrangement, chunks=before).stages == stages else None


def pace_of(everyone: list[list[float]], num_stages: int, num_tensor: int = 1) -> Pace:
    """From the seconds of each block on each rank: a stage is as slow as its slowest rank."""
    seconds = np.array(everyone).reshape(-1, num_stages, num_tensor, len(everyone[0])).max(axis=(0, 2))
    totals = seconds.sum(axis=1)
    return Pace(seconds.mean(axis=0).tolist(), (totals.mean() / totals).tolist())


def stage_times(arrangement: Arrangement, pace: Pace) -> list[float]:
    """Seconds of a micro-batch on each stage."""
    stages = zip(arrangement.stages, pace.speeds, strict=True)
    return [sum(sum(pace.seconds[first:last]) for first, last in chunks) / speed for chunks, speed in stages]


def time_blocks(place: Place, config: Config, problem: Problem, split: Sequences) -> list[float]:
    """Seconds of a forward and backward pass of each block on this rank: the least of some rounds.

    Layers but the last are alike: the first one is timed for all of them.
    """
    card, options, device = problem.card, config.train, place.transport.device
    last = num_blocks(card) - 1
    timed = sorted({0, 1, last - 1, last})
    stage = BertStage(card, len(problem.label_names), [(block, block + 1) for block in timed], options.recompute)
    initialize(stage, card, options.seed)
    stage.to(device, DTYPES[options.precision])
    layout = typical_layout(split, -(-options.batch_size // options.micro_batches), device)
    dropout = KeyedDropout(options.seed, 0, 0)
    clock = time.thread_time if place.transport.patient else time.perf_counter  # who shares cores waits for others
    seconds = {block: _time(_passes(stage, chunk, layout, dropout), clock, device) for chunk, block in enumerate(timed)}
    return [seconds.get(block, seconds[1]) for block in range(last + 1)]


def typical_layout(split: Sequences, num_sequences: int, device: torch.device) -> PackedLayout:
    """A micro-batch with lengths evenly out of the order of all, and as many tokens wanted as begin words."""
    lengths = np.sort(split.index.lengths)
    lengths = lengths[((np.arange(num_sequences) + 0.5) * len(lengths) / num_sequences).astype(np.int64)]
    num_wanted = round(lengths.sum() * split.index.words.sum() / split.index.lengths.sum())
    return PackedLayout(lengths, device, np.arange(num_wanted))


def _passes(stage: BertStage, chunk: int, layout: PackedLayout, dropout: KeyedDropout) -> Callable[[], None]:
    """A forward and backward pass of one block on random input."""
    generator = torch.Generator().manual_seed(0)
    dtype, size = stage.classifier.weight.dtype, stage.card.hidden_size
    entering, leaving = stage.rows(layout, chunk)
    block = stage.chunks[chunk][0]
    if block == 0:
        inputs = torch.randint(0, stage.card.vocab_size, (layout.num_tokens,), generator=generator).to(layout.device)
    else:
        inputs = torch.randn(entering, size, generator=generator).to(layout.device, dtype).requires_grad_()
    gradient = torch.randn(leaving, size, generator=generator).to(layout.device, dtype)
    labels = torch.zeros(layout.num_wanted, dtype=torch.int64, device=layout.device)

    def run() -> None:
        inputs.grad = None
        for name in stage.tables:  # sparse, so that sums of them grow
            stage.get_parameter(name).grad = None
        outputs = stage(inputs, layout, dropout, chunk)
        if block == num_blocks(stage.card) - 1:
            torch.autograd.backward(token_loss(outputs, labels, layout.num_wanted))
        else:
            torch.autograd.backward(outputs, gradient)

    return run


def _time(run: Callable[[], None], clock: Callable[[], float], device: torch.device) -> float:
    found = []
    for _ in range(WARM_UP + ROUNDS):
        began = clock()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(clock() - began)
    return min(found[WARM_UP:])
