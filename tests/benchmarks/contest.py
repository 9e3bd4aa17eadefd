"""Jobs that take turns on one machine, so that all of them meet the same state of it.

They are started once and stay; who is not at turn is stopped by signal, so that it takes no core. A turn begins with a
line of standard input and ends with a line of JSON. Memory is the proportional set size (PSS) of all ranks, read from
outside after each turn; the largest counts.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import distributions
from pathlib import Path

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent
RESULTS = HERE / "results"
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


def take_turns(jobs: Mapping[str, Job], repeats: int, after: Callable[[str], object] = lambda name: None) -> None:
    """So many turns each, every other time in reverse order, and `after` each; nobody is left."""
    try:
        for number in range(repeats):
            for name in list(jobs) if number % 2 else reversed(list(jobs)):
                jobs[name].turn()
                after(name)
    finally:
        for job in jobs.values():
            job.end()


def speedup(job: Job, peer: Job) -> tuple[float, float, float]:
    """The ratio of medians, and the least and the greatest ratio of a turn."""
    ratios = [a / b for a, b in zip(job.rates, peer.rates, strict=True)]
    return statistics.median(job.rates) / statistics.median(peer.rates), min(ratios), max(ratios)


def row_of(name: str, job: Job, peer: Job) -> dict[str, object]:
    """What there is to say of a contender."""
    times, least, greatest = speedup(job, peer)
    return {
        "name": name,
        "tokens_per_second": statistics.median(job.rates),
        "times": times,
        "range": [least, greatest],
        "peak_memory": job.peak,
        "command": " ".join(job.command),
    }


def say(row: dict[str, object]) -> None:
    """A row on the screen."""
    least, greatest = row["range"]
    print(
        f"{row['row']:<15}{row['name']:<18}{row['tokens_per_second']:>8,.0f} tokens/s {row['times']:>6.2f} times "
        f"({least:.2f} to {greatest:.2f})  {row['peak_memory'] / 2**30:.2f} GiB",
        flush=True,
    )


def write(out: Path, stem: str, rows: list[dict[str, object]]) -> None:
    """Rows as JSON, with what a reader needs to judge them."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{stem}.json").write_text(json.dumps(facts() | {"rows": rows}, indent=1) + "\n")


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
