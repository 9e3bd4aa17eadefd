"""A training step of ours beside that of DistributedDataParallel over gloo, and beside its own kernels alone.

    python tests/benchmarks/compare_step.py [--rows minilm-l6:64:2 bert-base-uncased:32:8] [--repeats 10]

A row is model : global batch : ranks. The jobs take turns on one machine: they are started by mpirun and stay; who is
not at turn is stopped by signal, so that it takes no core. Where they do not fit into memory together, they are started
anew for every turn. Two bounds to what any program can reach with torch take part: the kernels of a step alone, and
nothing but the matrix products of its linear layers. Memory is the proportional set size (PSS) of all ranks, read from
outside after each turn; the largest counts.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import distributions
from pathlib import Path

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent
RESULTS = HERE / "results"
ROWS = ["minilm-l6:64:2", "minilm-l6:64:4", "minilm-l6:64:8", "bert-base-uncased:32:2", "bert-base-uncased:32:8"]
LENGTHS = HERE / "lengths.txt"


@dataclass
class Job:
    """One contender under mpirun; stopped unless it is its turn."""

    command: list[str]
    process: subprocess.Popen[str] | None = None
    rates: list[float] = field(default_factory=list)  # tokens per second
    pss: int = 0
    peak: int = 0  # resident bytes of the largest process, ever

    def turn(self) -> None:
        """Let it run one turn."""
        if self.process is None:
            environment = os.environ | {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
            environment.pop("OMP_NUM_THREADS", None)
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
            )
        else:
            self._signal(signal.SIGCONT)
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("{"):
                break
        else:
            code, self.process = self.process.wait(), None
            raise SystemExit(f"{' '.join(self.command)} ended with code {code}")
        result = json.loads(line)
        self.rates.append(result["tokens"] / result["seconds"])
        below = [self.process.pid, *descendants(self.process.pid)]
        self.pss = max(self.pss, sum(map(pss_of, below[1:])))
        self.peak = max(self.peak, *map(peak_of, below))
        self._signal(signal.SIGSTOP)

    def end(self) -> None:
        """Take it away."""
        if self.process is not None:
            for pid in [*descendants(self.process.pid), self.process.pid]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def _signal(self, number: int) -> None:
        # mpirun itself goes on; a program without mpirun is its own only process.
        for pid in descendants(self.process.pid) or [self.process.pid]:
            os.kill(pid, number)


def descendants(pid: int) -> list[int]:
    """Processes below this one, whatever sessions they made."""
    children = [int(c) for task in Path(f"/proc/{pid}/task").iterdir() for c in (task / "children").read_text().split()]
    return [*children, *(below for child in children for below in descendants(child))]


def pss_of(pid: int) -> int:
    """Bytes of a process's memory, shared pages divided by how many share them."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))


def peak_of(pid: int) -> int:
    """The most bytes that a process ever had resident."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))


def available_memory() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))


def contenders(row: str, options: argparse.Namespace, folder: Path, number: int) -> dict[str, Job]:
    model, batch, ranks = row.split(":")
    launch = [str(BIN / "mpirun"), "-np", ranks, sys.executable]
    # One turn more than is asked for: after the last one they wait for it, and can be looked at.
    turns = ["--repeats", str(options.repeats + 1), "--steps", str(options.steps), "--lengths", str(LENGTHS)]
    ours = ["-m", "mpitrain", "bench", "step", "--await-turns", *turns, "--model", model]
    ours += ["--train.batch_size", batch, "--train.micro_batches", ranks, "--train.precision", options.precision]
    ours += ["--mesh.data", ranks, *options.flags]
    store = str(folder / f"store-{row}-{number}")
    peer = [str(HERE / "peers" / "ddp_gloo.py"), "--model", model, "--batch", batch, *turns]
    peer += ["--precision", options.precision, "--store", store]
    kernels = [str(HERE / "peers" / "kernels.py"), "--model", model, "--batch", batch, *turns]
    kernels += ["--precision", options.precision]
    lines = {"mpitrain": ours, "ddp_gloo": peer, "kernels": kernels, "products": [*kernels, "--products"]}
    return {name: Job(launch + line) for name, line in lines.items()}


def compare(row: str, options: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Medians over turns in turn."""
    jobs = contenders(row, options, folder, 0)
    try:
        for number in range(options.repeats):
            for name in list(jobs) if number % 2 else reversed(list(jobs)):
                jobs[name].turn()
                if row in options.apart:
                    jobs[name].end()
                    fresh = contenders(row, options, folder, number + 1)[name]
                    jobs[name].command = fresh.command
    finally:
        for job in jobs.values():
            job.end()
    ours, peer = jobs["mpitrain"], jobs["ddp_gloo"]
    ratios = [a / b for a, b in zip(ours.rates, peer.rates, strict=True)]
    return {
        "row": row,
        "tokens_per_second": {name: statistics.median(job.rates) for name, job in jobs.items()},
        "speedup": statistics.median(ours.rates) / statistics.median(peer.rates),
        "speedup_range": [min(ratios), max(ratios)],
        "bounds": {
            name: statistics.median(jobs[name].rates) / statistics.median(peer.rates)
            for name in ("kernels", "products")
        },
        "pss": {name: job.pss for name, job in jobs.items()},
        "pss_ratio": ours.pss / peer.pss,
        "command": {name: " ".join(job.command[1:]) for name, job in jobs.items()},
    }


def facts() -> dict[str, object]:
    """Machine, versions, command."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    packages = {"mpitrain", "torch", "transformers", "mpi4py", "mpich", "openmpi"}
    return {
        "command": " ".join(["python", *sys.argv]),
        "cpu": next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), ""),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {each.name: each.version for each in distributions() if each.name in packages},
    }


def row_of(text: str) -> str:
    """MODEL:BATCH:RANKS."""
    if not re.fullmatch(r"[^:,]+:\d+:\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not MODEL:BATCH:RANKS, like {ROWS[0]}")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
                f"{row:<24}{rates['mpitrain']:>8,.0f} tokens/s, DDP {rates['ddp_gloo']:>7,.0f}: "
                f"{found[-1]['speedup']:.2f} times ({found[-1]['speedup_range'][0]:.2f} to "
                f"{found[-1]['speedup_range'][1]:.2f}; kernels alone {found[-1]['bounds']['kernels']:.2f}, "
                f"products alone {found[-1]['bounds']['products']:.2f}); "
                f"memory {pss['mpitrain'] / 2**30:.2f} GiB, {found[-1]['pss_ratio']:.0%} of DDP's",
                flush=True,
            )
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "step.json").write_text(json.dumps(facts() | {"rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
