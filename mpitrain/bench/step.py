"""`mpitrain bench step`: whole training steps on sequences of real lengths, and how much of the exchange they hide.

Tokens and labels are random, everything else is what `train` does. To take turns with another program on the same
machine (`tests/benchmarks/compare_step.py` does), `--await-turns` waits for a line of standard input before each turn
and answers it with a line of JSON.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table
from tokenizers import Tokenizer, models

from mpitrain.bench.facts import describe_machine, write
from mpitrain.checkpoint.saver import Saver
from mpitrain.config import Config
from mpitrain.dataset.sequences import MemorySplit, Sequences
from mpitrain.errors import DataError, UsageError, on_all_ranks
from mpitrain.model.card import ModelCard, resolve_model
from mpitrain.observe.console import Console
from mpitrain.place import find_place, say_stages
from mpitrain.problem import Problem
from mpitrain.run import LEARNING_RATES, build_stepper, make_plan
from mpitrain.runtime.agree import Comm, attempt, collect, share, together
from mpitrain.runtime.notes import State, note
from mpitrain.weigh import balance

LABELS = ["O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC"]
NUM_SEQUENCES = 6000
WARM_UP = 2  # steps before the first turn


@dataclass(frozen=True)
class Turn:
    """Some steps in a row: tokens and seconds of all of them.

    Attributes:
        parts: seconds by part of the step, means over the ranks.
        stages: seconds in which each stage computes, of its slowest rank.
    """

    tokens: int
    seconds: float
    parts: dict[str, float]
    stages: list[float]


def bench_step(
    comm: Comm,
    config: Config,
    console: Console,
    *,
    lengths: Path | None,
    repeats: int,
    steps: int,
    await_turns: bool,
) -> None:
    """Time `repeats` turns of `steps` steps each; write `step-<ranks>.json` into `--out`, if given (collective).

    Args:
        comm: all ranks.
        config: model, mesh, batch, precision, exchange as in training; `data` does not matter.
        console: speaks on rank 0.
        lengths: a text file of lengths in tokens, each with its number of sequences; about 29 if None.
        repeats: timed turns.
        steps: of a turn.
        await_turns: begin each turn when a line of standard input comes.
    """
    work = Workload.of_random_tokens(comm, config, console, lengths, num_steps=WARM_UP + repeats * steps)
    turns: list[Turn] = []
    for _ in range(repeats):
        if await_turns:
            note(b"awaiting a turn", state=State.LISTENING if comm.rank == 0 else State.MOVING)
        if await_turns and not share(comm, comm.rank == 0 and bool(sys.stdin.readline())):
            raise on_all_ranks(UsageError("--await-turns: standard input ended before the last turn"))
        turns.append(work.run(steps))
        if comm.rank == 0 and await_turns:
            print(json.dumps({"tokens": turns[-1].tokens, "seconds": turns[-1].seconds}), flush=True)  # noqa: T201
    facts = describe_machine(comm, torch.get_num_threads())
    console.show(table_of(turns, steps))
    with together(comm, "writing results"):
        if comm.rank == 0 and config.out is not None:
            write(config.out, f"step-{comm.size}", facts | work.describe(turns, steps), console)
    work.close()


class Workload:
    """Training, ready to take turns; warmed up."""

    @classmethod
    def of_random_tokens(
        cls, comm: Comm, config: Config, console: Console, lengths: Path | None, *, num_steps: int
    ) -> Workload:
        """For a model card, on sequences of these lengths (collective); see `read_lengths`."""
        problem = attempt(comm, "reading the model", lambda: _problem(config))
        card = problem.card
        found = attempt(comm, "reading lengths", lambda: read_lengths(lengths, card.max_position_embeddings))
        work = cls(comm, config, console, problem, _random_split(found, card), num_steps=num_steps)
        console.say(
            "bench", f"{config.model}, batch {config.train.batch_size}, {config.train.precision}, random tokens"
        )
        return work

    def __init__(
        self, comm: Comm, config: Config, console: Console, problem: Problem, split: Sequences, *, num_steps: int
    ) -> None:
        """Build model and mesh, and say what they are (collective); `num_steps` with those of the warm-up."""
        self.config, self.problem, self._split = config, problem, split
        card = problem.card
        place = find_place(comm, config, self.problem, console)
        self.place = balance(place, config, self.problem, self._split, console)
        say_stages(console, self.place, card)
        peak = LEARNING_RATES["scratch"]
        self.stepper = build_stepper(config, self.problem, self.place, console, num_steps=num_steps, peak=peak)
        self._plan, _ = make_plan(config, self.problem, {"train": self._split})
        self._numbers = count()
        self.run(WARM_UP)

    def run(self, num_steps: int, saver: Saver | None = None) -> Turn:
        """Train for so many steps more, beside what `saver` has begun, if anything (collective)."""
        mesh = self.place.mesh
        mesh.world.Barrier()
        began, tokens, computed = perf_counter(), 0, 0.0
        parts: list[dict[str, float]] = []
        run_step = self.stepper.run
        if saver is not None:
            run_step = partial(run_step, ready=saver.is_ready, before_update=saver.wait_for_copy)
        for plan in map(self._plan.step, islice(self._numbers, num_steps)):
            loading = perf_counter()
            micro_batches = self.stepper.load(plan, self._split)
            loaded = {"data": perf_counter() - loading}
            result = run_step(plan, micro_batches)
            if saver is not None and result.ready:
                saver.advance()
            parts.append(loaded | result.seconds)
            tokens += plan.num_tokens
            computed += self.stepper.executor.seconds_computed
        mesh.world.Barrier()
        seconds = perf_counter() - began
        everyone = np.array(collect(mesh.world, computed)).reshape(-1, mesh.num_stages, mesh.num_tensor)
        return Turn(tokens, seconds, _mean_parts(mesh.world, parts), everyone.max(axis=(0, 2)).tolist())

    def describe(self, turns: list[Turn], steps: int) -> dict[str, Any]:
        """What was done in how many seconds."""
        mesh = self.place.mesh
        return {
            "mesh": {"data": mesh.num_replicas, "pipe": mesh.num_stages, "tensor": mesh.num_tensor},
            "exchange": self.stepper.exchange.name,
            "config": self.config.model_dump(mode="json"),
            "steps": steps,
            "turns": [vars(turn) for turn in turns],
        }

    def close(self) -> None:
        """Give memory and communicators back (collective)."""
        self.stepper.close()
        self.place.close()


def _problem(config: Config) -> Problem:
    card = resolve_model(config.model)
    if not isinstance(card, ModelCard):
        raise UsageError(f"--model {config.model}: bench step takes a model card, weights do not matter to it")
    return Problem(card, LABELS, Tokenizer(models.WordLevel()))


def read_lengths(file: Path | None, longest: int) -> NDArray[np.int64]:
    """Lengths in tokens of some thousand sequences.

    Raises:
        DataError: the file cannot be read, or a line is no length up to `longest` and number of sequences.
    """
    generator = np.random.Generator(np.random.Philox(key=0))
    if file is None:
        return generator.normal(29, 12, NUM_SEQUENCES).clip(3, min(128, longest)).astype(np.int64)
    try:
        lines = [line.split() for line in file.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise DataError(f"--lengths {file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"--lengths {file}: is no text") from None
    for number, words in enumerate(lines, 1):
        if len(words) != 2 or not all(word.isdecimal() and int(word) for word in words) or int(words[0]) > longest:
            raise DataError(
                f"--lengths {file}: line {number}: found {' '.join(words)!r}; "
                f"a length from 1 to {longest} and a number of sequences would work"
            )
    if not lines:
        raise DataError(f"--lengths {file}: is empty; lines of a length and a number of sequences would work")
    lengths, counts = np.array(lines, np.int64).T
    return generator.permutation(np.repeat(lengths, counts))


def _random_split(lengths: NDArray[np.int64], card: ModelCard) -> MemorySplit:
    """Every token is labelled, from a random word piece."""
    generator = np.random.Generator(np.random.Philox(key=1))
    tokens = generator.integers(0, card.vocab_size, lengths.sum())
    labels = generator.integers(0, len(LABELS), lengths.sum())
    fields = {"tokens": tokens, "labels": labels, "word_starts": np.ones_like(labels)}
    return MemorySplit(fields, lengths, lengths, np.arange(len(lengths)))


def _mean_parts(comm: Comm, steps: list[dict[str, float]]) -> dict[str, float]:
    mine = {name: sum(step[name] for step in steps) for name in steps[0]}
    everyone = collect(comm, mine)
    return {name: sum(rank[name] for rank in everyone) / len(everyone) for name in mine}


def table_of(turns: list[Turn], steps: int) -> Table:
    """The median step and its parts."""
    table = Table(box=None, pad_edge=False, title=f"a step, median of {len(turns)} turns", title_justify="left")
    table.add_column("")
    table.add_column("ms", justify="right")
    lower, median, upper = np.percentile([turn.seconds / steps for turn in turns], [25, 50, 75]) * 1e3
    table.add_row("step", f"{median:,.1f}")
    for name in turns[0].parts:
        note = {"tensor": " (of forward_backward)", "reduce_hidden": " (meanwhile)", "gather": " (of update)"}.get(
            name, ""
        )
        label = f"  {name}{note}"
        table.add_row(label, f"{1e3 * np.median([turn.parts[name] / steps for turn in turns]):,.1f}")
    rate = np.median([turn.tokens / turn.seconds for turn in turns])
    spread = f"; half the distance of the quartiles {(upper - lower) / median / 2:.1%}" if len(turns) > 1 else ""
    table.caption = f"{rate:,.0f} tokens/s{spread}{_say_stages([turn.stages for turn in turns], steps)}"
    return table


def _say_stages(turns: list[list[float]], steps: int) -> str:
    times = 1e3 * np.median(turns, axis=0) / steps
    if len(times) == 1:
        return ""
    each = " / ".join(f"{time:,.0f}" for time in times)
    return f"; stages compute {each} ms, the longest {times.max() / times.mean():.2f} of the mean"
