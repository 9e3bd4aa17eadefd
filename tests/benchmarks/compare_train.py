"""Our training beside what people use instead on the same cores: tokens per second, and memory of a process.

    python tests/benchmarks/compare_train.py [--rows padded bucketed] [--repeats 11]

Contenders take turns (contest.py). Ours is there as one rank with all cores and as a rank for each core.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from contest import BIN, HERE, LENGTHS, RESULTS, Job, row_of, say, take_turns, write

RANKS = sorted({1, len(os.sched_getaffinity(0))})
BATCH_OF_4096 = 132  # sequences that have about so many tokens
MINILM, BASE = ("minilm-l6", "64"), ("bert-base-uncased", "32")


def contenders(row: str, options: argparse.Namespace) -> dict[str, Job]:
    """Who takes part; the last one is the peer."""
    # One turn more than is asked for: after the last one they wait for it, and can be looked at.
    turns = ["--repeats", str(options.repeats + 1), "--steps", str(options.steps), "--lengths", str(LENGTHS)]

    def ours(ranks: int, model: str, batch: str, precision: str, *flags: str) -> Job:
        command = [str(BIN / "mpirun"), "-np", str(ranks), sys.executable, "-m", "mpitrain", "bench", "step"]
        command += ["--await-turns", *turns, "--model", model, "--train.batch_size", batch, "--mesh.data", str(ranks)]
        return Job([*command, "--train.micro_batches", str(ranks), "--train.precision", precision, *flags])

    def loop(model: str, batch: str, precision: str, *flags: str) -> Job:
        command = [sys.executable, str(HERE / "peers" / "hf_loop.py"), *turns, "--model", model]
        return Job([*command, "--batch", batch, "--precision", precision, *flags])

    def on_all_cores(*what: str) -> dict[str, Job]:
        return {f"{ranks} rank(s)": ours(ranks, *what) for ranks in RANKS}

    if row == "padded":
        plain = loop(MINILM[0], "16", "fp32", "--width", "128")
        return on_all_cores(*MINILM, "bf16") | {"all padded to 128": plain}
    if row == "library":
        return on_all_cores(*MINILM, "fp32") | {"torch's choice": ours(1, *MINILM, "fp32", "--train.linear", "torch")}
    if row == "4096-tokens":
        base = (BASE[0], str(BATCH_OF_4096), "bf16")
        ways = {how: ours(1, *base, "--train.recompute", how) for how in ("none", "attention", "block")}
        return ways | {"transformers": loop(*base)}
    model = MINILM if row == "bucketed" else BASE
    return on_all_cores(*model, "bf16") | {"transformers": loop(*model, "bf16")}


def compare(row: str, options: argparse.Namespace) -> list[dict[str, object]]:
    """Medians over turns in turn."""
    jobs = contenders(row, options)
    take_turns(jobs, options.repeats)
    *_, peer = jobs.values()
    found = [{"row": row} | row_of(name, job, peer) for name, job in jobs.items()]
    for each in found:
        say(each)
    return found


def main() -> None:
    rows = ["padded", "bucketed", "bucketed-base", "library", "4096-tokens"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=rows, default=rows)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--steps", type=int, default=2, help="in a turn")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    found = [each for row in options.rows for each in compare(row, options)]
    write(options.out, "train", found)


if __name__ == "__main__":
    main()
