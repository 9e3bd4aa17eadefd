"""How near our all-reduce comes to what a network allows, and how much of it a step hides: emulated hosts, as root.

    python tests/benchmarks/network.py [--kib 16384,65536] [--repeats 10] [--ranks 1,2] [--out tests/benchmarks/results]

With h hosts at B bytes/s, no all-reduce of S bytes ends before 2 (h - 1) / h S / B, however many ranks a host has: the
sum leaves each host in h - 1 parts and comes back in as many (Patarasuk and Yuan, 2009). Hosts share this machine's
cores, so a figure means something only where the network is the limit.

The share of a reduction that is hidden behind the backward pass is that of a model which computes longer than it sends.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "support"))

from hosts import Hosts, obstacle
from launching import begin, finish

NUM_HOSTS = 4
RATE, BYTES_PER_SECOND = "1gbit", 125e6
OURS = [("fp32 ring16", "fp32 ring"), ("bf16 ring", "fp32 ring")]
RATIOS = [*OURS, ("fp32 node", "fp32 MPI"), ("fp32 ring", "fp32 MPI"), ("fp32 ring", "fp32 gloo")]


STEP = ["--model", "minilm-l6", "--train.precision", "bf16", "--train.batch_size", "256", "--train.micro_batches", "4"]


def measure(hosts: Hosts, ranks: int, *what: str) -> dict[str, Any]:
    """What `mpitrain bench` writes, with so many ranks on each host."""
    with tempfile.TemporaryDirectory() as place:
        options = ("-m", "mpitrain", "bench", *what, "--out", place)
        done = finish(begin(hosts.command([ranks] * NUM_HOSTS, *options, cwd=Path.cwd()), Path.cwd()), 1800)
        if done.returncode:
            raise SystemExit(f"{done.stdout}{done.stderr}")
        return json.loads((Path(place) / f"{what[0]}-{ranks * NUM_HOSTS}.json").read_text())


def show(ranks: int, found: dict[str, Any]) -> None:
    """Times over bounds, all for the bytes brought: ring16 may halve them, and node brings fp32 gradients for bf16."""
    print(f"{NUM_HOSTS} hosts x {ranks}, {RATE}, {found['mpi']}: median of the slowest rank")
    for size in sorted({row["bytes"] for row in found["seconds"]}):
        seconds = {f"{row['dtype']} {row['contender']}": row for row in found["seconds"] if row["bytes"] == size}
        for name, row in seconds.items():
            spread = (row["upper"] - row["lower"]) / row["median"] / 2
            times = f"{1e3 * row['median']:8.1f} ms, bound {1e3 * row['bound']:.1f}"
            print(f"  {size >> 10:>7,} KiB  {name:12} {times}  {row['median'] / row['bound']:5.2f}  ± {spread:.0%}")
        medians = {name: row["median"] for name, row in seconds.items()}
        ratios = [f"{a} / {b} {medians[a] / medians[b]:.2f}" for a, b in RATIOS if {a, b} <= set(medians)]
        print(f"  {size >> 10:>7,} KiB  {', '.join(ratios)}")


def measure_hidden(repeats: int) -> dict[str, Any]:
    """Training steps with one rank on each host: what part of the time of reductions ran behind the backward pass."""
    with Hosts(NUM_HOSTS, RATE) as hosts:
        found = measure(hosts, 1, "step", *STEP, "--mesh.data", str(NUM_HOSTS), "--repeats", str(repeats))
    parts = [turn["parts"] for turn in found["turns"]]
    shares = sorted(part["reduce_hidden"] / (part["reduce_hidden"] + part["reduce"]) for part in parts)
    seconds = statistics.median(turn["seconds"] for turn in found["turns"])
    print(
        f"{NUM_HOSTS} hosts x 1, {RATE}: {statistics.median(shares):.0%} of a reduction ran behind the backward pass "
        f"({shares[0]:.0%} to {shares[-1]:.0%}); a step took {seconds:.2f} s"
    )
    return {"shares": shares, "median": statistics.median(shares), **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kib", default="16384,65536")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--ranks", default="1,2", help="on each host")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    asked = parser.parse_args()
    if found := obstacle():
        raise SystemExit(found)
    asked.out.mkdir(parents=True, exist_ok=True)
    for ranks in map(int, asked.ranks.split(",")):
        with Hosts(NUM_HOSTS, RATE) as hosts:
            document = measure(hosts, ranks, "allreduce", "--kib", asked.kib, "--repeats", str(asked.repeats))
        for row in document["seconds"]:
            row["bound"] = 2 * (NUM_HOSTS - 1) / NUM_HOSTS * row["bytes"] / BYTES_PER_SECOND
        show(ranks, document)
        write(asked.out / f"network-{NUM_HOSTS}x{ranks}-{document['mpi'].split()[0].lower()}.json", document)
    hidden = measure_hidden(asked.repeats)
    write(asked.out / f"network-hidden-{hidden['mpi'].split()[0].lower()}.json", hidden)


def write(file: Path, document: dict[str, Any]) -> None:
    """The figures, with what a host cannot know."""
    document |= {"rate": RATE, "cores": len(os.sched_getaffinity(0)), "load": os.getloadavg()[0]}
    document |= {"command": shlex.join(["python", *sys.argv])}
    file.write_text(json.dumps(document, indent=1) + "\n")
    print(f"written  {file}")


if __name__ == "__main__":
    main()
