"""A training step of ours beside that of DistributedDataParallel or Horovod, and beside its own kernels alone.

    python tests/benchmarks/compare_step.py [--rows minilm-l6:64:2 bert-base-uncased:32:8] [--repeats 10]
    python tests/benchmarks/compare_step.py --peer horovod_mpi      # its head tells how to install Horovod

A row is model : global batch : ranks. The jobs take turns (contest.py); where they do not fit into memory together,
they are started anew for every turn. Two bounds to what any program can reach with torch take part: the kernels of a
step alone, and nothing but the matrix products of its linear layers.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import tempfile
from itertools import count
from pathlib import Path

from contest import BIN, HERE, LENGTHS, RESULTS, Job, speedup, take_turns, write

ROWS = ["minilm-l6:64:2", "minilm-l6:64:4", "minilm-l6:64:8", "bert-base-uncased:32:2", "bert-base-uncased:32:8"]


def contenders(row: str, options: argparse.Namespace, folder: Path, number: int) -> dict[str, Job]:
    model, batch, ranks = row.split(":")
    launch = [str(BIN / "mpirun"), "-np", ranks, sys.executable]
    # One turn more than is asked for: after the last one they wait for it, and can be looked at.
    turns = ["--repeats", str(options.repeats + 1), "--steps", str(options.steps), "--lengths", str(LENGTHS)]
    ours = ["-m", "mpitrain", "bench", "step", "--await-turns", *turns, "--model", model]
    ours += ["--train.batch_size", batch, "--train.micro_batches", ranks, "--train.precision", options.precision]
    ours += ["--mesh.data", ranks, *options.flags]
    peer = [str(HERE / "peers" / f"{options.peer}.py"), "--model", model, "--batch", batch, *turns]
    peer += ["--precision", options.precision]
    peer += ["--store", str(folder / f"store-{row}-{number}")] if options.peer == "ddp_gloo" else []
    kernels = [str(HERE / "peers" / "kernels.py"), "--model", model, "--batch", batch, *turns]
    kernels += ["--precision", options.precision]
    lines = {"mpitrain": ours, options.peer: peer, "kernels": kernels, "products": [*kernels, "--products"]}
    return {name: Job(launch + line) for name, line in lines.items()}


def compare(row: str, options: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Medians over turns in turn."""
    jobs, numbers = contenders(row, options, folder, 0), count(1)

    def begin_anew(name: str) -> None:
        jobs[name].end()
        jobs[name].command = contenders(row, options, folder, next(numbers))[name].command

    take_turns(jobs, options.repeats, begin_anew if row in options.apart else lambda name: None)
    ours, peer = jobs["mpitrain"], jobs[options.peer]
    times, *between = speedup(ours, peer)
    return {
        "row": row,
        "tokens_per_second": {name: statistics.median(job.rates) for name, job in jobs.items()},
        "speedup": times,
        "speedup_range": between,
        "bounds": {name: speedup(jobs[name], peer)[0] for name in ("kernels", "products")},
        "pss": {name: job.pss for name, job in jobs.items()},
        "pss_ratio": ours.pss / peer.pss,
        "command": {name: " ".join(job.command[1:]) for name, job in jobs.items()},
    }


def row_of(text: str) -> str:
    """MODEL:BATCH:RANKS."""
    if not re.fullmatch(r"[^:,]+:\d+:\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not MODEL:BATCH:RANKS, like {ROWS[0]}")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=["ddp_gloo", "horovod_mpi"], default="ddp_gloo")
    parser.add_argument("--rows", nargs="+", type=row_of, default=ROWS, metavar="MODEL:BATCH:RANKS")
    parser.add_argument(
        "--apart", nargs="*", type=row_of, default=["bert-base-uncased:32:8"], help="rows too large for both at once"
    )
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--steps", type=int, default=2, help="in a turn")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("flags", nargs="*", help="more of mpitrain's flags, after --")
    options = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for row in options.rows:
            found.append(compare(row, options, Path(folder)))
            rates, pss = found[-1]["tokens_per_second"], found[-1]["pss"]
            print(
                f"{row:<24}{rates['mpitrain']:>8,.0f} tokens/s, {options.peer} {rates[options.peer]:>7,.0f}: "
                f"{found[-1]['speedup']:.2f} times ({found[-1]['speedup_range'][0]:.2f} to "
                f"{found[-1]['speedup_range'][1]:.2f}; kernels alone {found[-1]['bounds']['kernels']:.2f}, "
                f"products alone {found[-1]['bounds']['products']:.2f}); "
                f"memory {pss['mpitrain'] / 2**30:.2f} GiB, {found[-1]['pss_ratio']:.0%} of the other's",
                flush=True,
            )
    write(options.out, "step" if options.peer == "ddp_gloo" else "step-horovod", found)


if __name__ == "__main__":
    main()
