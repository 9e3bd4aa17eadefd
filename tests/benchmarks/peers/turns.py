"""What contenders of compare_step.py share: a command line, and a turn for each line of standard input."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

WARM_UP = 2  # steps before the first turn


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """The arguments that every contender takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="minilm-l6")
    parser.add_argument("--batch", type=int, default=64, help="sentences of all ranks together")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--lengths", type=Path, default=Path(__file__).parent.parent / "lengths.txt")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--steps", type=int, default=1)
    return parser


def take_turns(step: Callable[[], int], options: argparse.Namespace, rank: int, barrier: Callable[[], object]) -> None:
    """Call `step`, which returns the tokens of all ranks, and answer each turn with a line of JSON on rank 0."""
    for _ in range(WARM_UP):
        step()
    for _ in range(options.repeats):
        if rank == 0 and not sys.stdin.readline():
            raise SystemExit("standard input ended before the last turn")
        barrier()
        began = time.perf_counter()
        tokens = sum(step() for _ in range(options.steps))
        barrier()
        if rank == 0:
            print(json.dumps({"tokens": tokens, "seconds": time.perf_counter() - began}), flush=True)
