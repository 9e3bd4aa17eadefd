"""Tags for a file of sentences by `predict` and by transformers' pipeline: seconds from start to end, in turn.

    python tests/benchmarks/compare_predict.py [--sentences 20000] [--precision bf16 fp32] [--repeats 3]

The sentences are those of the sample corpus, again and again; the weights are random, which no speed depends on.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path

from contest import BIN, HERE, RESULTS, facts

SAMPLE = HERE.parents[1] / "data" / "sample" / "train.conll"


def run(*command: str) -> float:
    """Seconds of a command that must succeed."""
    began = time.perf_counter()
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    return time.perf_counter() - began


def write_sentences(target: Path, count: int) -> None:
    blocks = SAMPLE.read_text(encoding="utf-8").strip().split("\n\n")
    sentences = [" ".join(line.split("\t")[0] for line in block.splitlines()) for block in blocks]
    target.write_text("".join(f"{sentence}\n" for sentence in islice(cycle(sentences), count)), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="minilm-l6")
    parser.add_argument("--sentences", type=int, default=20_000)
    parser.add_argument("--precision", nargs="+", default=["bf16", "fp32"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    mpitrain = [str(BIN / "mpirun"), "-np", str(len(os.sched_getaffinity(0))), sys.executable, "-m", "mpitrain"]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        trained, exported, text = (str(place / name) for name in ("run", "exported", "sentences.txt"))
        run(*mpitrain, "--model", options.model, "--train.max_steps", "1", "--out", trained)
        run(*mpitrain, "export", "--checkpoint", trained, "--out", exported)
        write_sentences(Path(text), options.sentences)
        peer = [sys.executable, str(HERE / "peers" / "hf_pipeline.py"), exported, text, str(place / "pipeline")]
        ours = [*mpitrain, "predict", "--checkpoint", trained, text, "--out", str(place / "tags"), "--train.precision"]
        commands = {"pipeline": peer} | {precision: [*ours, precision] for precision in options.precision}
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(options.repeats):
            for name, command in commands.items():
                seconds[name].append(run(*command))
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    for name, median in medians.items():
        times = medians["pipeline"] / median
        print(f"{name:<10}{median:>8.1f} s ({min(seconds[name]):.1f} to {max(seconds[name]):.1f}) {times:>6.2f} times")
    options.out.mkdir(parents=True, exist_ok=True)
    document = facts() | {"seconds": seconds, "commands": {name: " ".join(line) for name, line in commands.items()}}
    (options.out / "predict.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
