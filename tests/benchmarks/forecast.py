"""How right `mpitrain plan` is: steps on every mesh of a number of ranks, by what it has foretold of them.

    python tests/benchmarks/forecast.py [--ranks 1 2 4 8] [--rounds 3]

Each mesh trains for some steps in each round, one after the other; medians of all steps but the first ones count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from contest import BIN, RESULTS, facts

WARM_UP = 3


def call(ranks: int, *words: str) -> None:
    command = [str(BIN / "mpirun"), "-np", str(ranks), sys.executable, "-m", "mpitrain", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def name_of(row: dict[str, object]) -> str:
    return f"{row['data']}x{row['pipe']}x{row['tensor']}"


def measure(ranks: int, options: argparse.Namespace, place: Path) -> list[dict[str, object]]:
    """All meshes of so many ranks, foretold and measured."""
    told = ["--model", options.model, "--train.batch_size", str(options.batch)]
    call(ranks, "plan", *told, "--out", str(place / f"plan-{ranks}"))
    found = json.loads((place / f"plan-{ranks}" / "plan.json").read_text())
    seconds: dict[str, list[float]] = {name_of(row): [] for row in found}
    for number in range(options.rounds):
        for row in found:
            axes = [word for axis in ("data", "pipe", "tensor") for word in (f"--mesh.{axis}", str(row[axis]))]
            run = place / f"{ranks}-{name_of(row)}-{number}"
            steps = ["--train.max_steps", str(WARM_UP + options.steps), "--checkpoint.best", "false"]
            call(ranks, *told, *axes, *steps, "--runtime.check_every", "0", "--out", str(run))
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            seconds[name_of(row)] += [line["seconds"] for line in lines[WARM_UP:]]
    return [row | {"measured": statistics.median(seconds[name_of(row)]), "ranks": ranks} for row in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="minilm-l12")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as place:
        for ranks in options.ranks:
            rows += (mine := measure(ranks, options, Path(place)))
            for row in mine:
                off = row["seconds"] / row["measured"] - 1
                print(f"{ranks} ranks {name_of(row):<8} foretold {1e3 * row['seconds']:7,.0f} ms, ", end="")
                print(f"measured {1e3 * row['measured']:7,.0f} ms  {off:+.0%}", flush=True)
            best = min(row["measured"] for row in mine)
            print(
                f"{ranks} ranks: the first of the plan takes {mine[0]['measured'] / best:.2f} of the fastest",
                flush=True,
            )
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "forecast.json").write_text(json.dumps(facts() | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
