"""Training on a GPU beside Hugging Face's loop on the same one: tokens per second of BERT-base and BERT-large in bf16.

    python tests/benchmarks/compare_gpu.py [--models bert-base-uncased] [--repeats 11]

Ours is there as 1, 2 and 4 ranks, which share GPUs where there are fewer. Contenders take turns (contest.py); those who
wait keep their memory. `--device cpu` tries the script itself where there is no GPU.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from contest import BIN, HERE, LENGTHS, RESULTS, Job, row_of, say, take_turns, write

RANKS = (1, 2, 4)


def contenders(model: str, options: argparse.Namespace) -> dict[str, Job]:
    """Who takes part; the last one is the peer."""
    turns = ["--repeats", str(options.repeats + 1), "--steps", str(options.steps), "--lengths", str(LENGTHS)]
    batch = str(options.batch)

    def ours(ranks: int) -> Job:
        command = [str(BIN / "mpirun"), "-np", str(ranks), sys.executable, "-m", "mpitrain", "bench", "step"]
        command += ["--await-turns", *turns, "--model", model, "--train.batch_size", batch, "--mesh.data", str(ranks)]
        command += ["--train.micro_batches", str(ranks), "--train.precision", "bf16", "--train.device", options.device]
        return Job(command)

    loop = [sys.executable, str(HERE / "peers" / "hf_loop.py"), *turns, "--model", model]
    loop += ["--batch", batch, "--precision", "bf16", "--device", options.device]
    return {f"{ranks} rank(s)": ours(ranks) for ranks in RANKS} | {"transformers": Job(loop)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["bert-base-uncased", "bert-large-uncased"])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--batch", type=int, default=256, help="sentences of all ranks together")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--steps", type=int, default=10, help="in a turn")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    found = []
    for model in options.models:
        jobs = contenders(model, options)
        take_turns(jobs, options.repeats)
        *_, peer = jobs.values()
        for name, job in jobs.items():
            found.append({"row": model[:14]} | row_of(name, job, peer))
            say(found[-1])
    write(options.out, f"train-{options.device}", found)


if __name__ == "__main__":
    main()
