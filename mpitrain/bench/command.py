"""The arguments of `mpitrain bench`, and which benchmark they start."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpitrain.errors import ExitCode, UsageError, on_all_ranks

if TYPE_CHECKING:
    from mpitrain.config import Config
    from mpitrain.observe.console import Console

# Of each benchmark, beside --repeats.
OWN = {
    "allreduce": {"--kib"},
    "step": {"--steps", "--lengths", "--await-turns"},
    "train": {"--steps", "--lengths"},
}
FLAGS = {"--repeats"}.union(*OWN.values())
SIZES = [4**power for power in range(3, 10)]  # KiB: 64 KiB to 256 MiB


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All of them; `run` refuses those that do not go with the benchmark."""
    parser.add_argument("what", choices=OWN, metavar="|".join(OWN), help="what to time")
    parser.add_argument("--repeats", type=count, default=21, metavar="N", help="turns (default: %(default)s)")
    parser.add_argument("--kib", type=_counts, metavar="N,N,...", help="allreduce: sizes (default: 64 to 262144)")
    parser.add_argument("--steps", type=count, metavar="N", help="step, train: steps in a turn")
    parser.add_argument("--lengths", type=Path, metavar="FILE", help="step, train: lines of a length and its frequency")
    parser.add_argument("--await-turns", action="store_true", help="step: a line of standard input starts a turn")


def count(text: str) -> int:
    """A flag's whole number above 0."""
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"found {text!r}; a whole number above 0 would work")
    return int(text)


def _counts(text: str) -> list[int]:
    return [count(word) for word in text.split(",")]


def run(world: Any, options: argparse.Namespace, settings: Config, console: Console) -> int:
    """Time what was asked for (collective)."""
    for flag in sorted(FLAGS - OWN[options.what] - {"--repeats"}):
        if getattr(options, flag.removeprefix("--").replace("-", "_")):
            raise on_all_ranks(UsageError(f"{flag} is no flag of bench {options.what}"))
    turns = {"lengths": options.lengths, "repeats": options.repeats, "steps": options.steps or 1}
    if options.what == "allreduce":
        from mpitrain.bench.allreduce import bench_allreduce

        sizes = [1024 * kib for kib in options.kib or SIZES]
        bench_allreduce(world, console, sizes=sizes, repeats=options.repeats, out=settings.out)
    elif options.what == "step":
        from mpitrain.bench.step import bench_step

        bench_step(world, settings, console, **turns, await_turns=options.await_turns)
    else:
        from mpitrain.bench.train import bench_train

        bench_train(world, settings, console, **turns)
    return ExitCode.DONE
