"""Pipelines of ours, by every schedule, beside torch.distributed.pipelining over gloo on the same cores.

    python tests/benchmarks/compare_pipeline.py [--stages 2 4] [--schedules 1f1b zb-h1] [--repeats 11]

All train 12 layers x 384 on sentences of 32 word pieces (the peer wants static shapes), one stage a rank, in the same
number of micro-batches. Contenders take turns (contest.py).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from contest import BIN, HERE, RESULTS, Job, row_of, say, take_turns, write

LENGTH = 32
SCHEDULES = ["1f1b", "interleaved", "zb-h1", "zb-v"]


def contenders(stages: int, options: argparse.Namespace, folder: Path) -> dict[str, Job]:
    lengths = folder / "lengths.txt"
    lengths.write_text(f"{LENGTH} {options.batch}\n")
    launch = [str(BIN / "mpirun"), "-np", str(stages), sys.executable]
    # One turn more than is asked for: after the last one they wait for it, and can be looked at.
    turns = ["--repeats", str(options.repeats + 1), "--steps", str(options.steps), "--lengths", str(lengths)]
    ours = ["-m", "mpitrain", "bench", "step", "--await-turns", *turns, "--model", options.model]
    ours += ["--train.batch_size", str(options.batch), "--train.micro_batches", str(options.micro_batches)]
    ours += ["--train.precision", options.precision, "--mesh.pipe", str(stages), "--pipeline.schedule"]
    peer = [str(HERE / "peers" / "pipelining_gloo.py"), "--model", options.model, "--batch", str(options.batch)]
    peer += [*turns, "--precision", options.precision, "--micro-batches", str(options.micro_batches)]
    peer += ["--store", str(folder / f"store-{stages}"), "--length", str(LENGTH)]
    return {name: Job([*launch, *ours, name]) for name in options.schedules} | {"torch": Job([*launch, *peer])}


def compare(stages: int, options: argparse.Namespace) -> list[dict[str, object]]:
    """Medians over turns in turn."""
    with tempfile.TemporaryDirectory() as folder:
        jobs = contenders(stages, options, Path(folder))
        take_turns(jobs, options.repeats)
    found = [{"row": f"{stages} stages"} | row_of(name, job, jobs["torch"]) for name, job in jobs.items()]
    for each in found:
        say(each)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=SCHEDULES)
    parser.add_argument("--model", default="minilm-l12")
    parser.add_argument("--batch", type=int, default=64, help="sentences")
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--steps", type=int, default=2, help="in a turn")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    found = [each for stages in options.stages for each in compare(stages, options)]
    write(options.out, "pipeline", found)


if __name__ == "__main__":
    main()
