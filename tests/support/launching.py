"""Start real commands as a user would: mpirun of this environment, in a clean environment, with an outer time-out."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

BIN = Path(sys.executable).parent
# A child of a rank that inherited these would take itself for that rank: MPICH dies of it, Open MPI hangs.
LAUNCHERS = ("PMI", "OMPI_COMM", "OMPI_FILE", "OMPI_UNIVERSE", "PRTE_LAUNCHED", "HYDRA", "MPI_LOCAL", "SLURM_", "PALS_")


def clean_environment(**changes: str) -> dict[str, str]:
    """This environment without what a launcher put into it; one thread a rank."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith((*LAUNCHERS, "MPITRAIN_"))}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"} | changes


def command(ranks: int, *arguments: str) -> list[str]:
    """A command line on some ranks; 0 ranks is no launcher at all."""
    launcher = [str(BIN / "mpirun"), "-np", str(ranks)] if ranks else []
    return [*launcher, sys.executable, *arguments]


def start(ranks: int, *arguments: str, cwd: Path, **environment: str) -> subprocess.Popen[str]:
    """Start on some ranks in the background."""
    return begin(command(ranks, *arguments), cwd, **environment)


def begin(line: list[str], cwd: Path, **environment: str) -> subprocess.Popen[str]:
    """Start a command line in the background, in a session of its own."""
    return subprocess.Popen(
        line,
        cwd=cwd,
        env=clean_environment(**environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], timeout: float) -> subprocess.CompletedProcess[str]:
    """Wait; a process that does not end in time is killed with all its ranks, and fails the test."""
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        stdout, stderr = process.communicate()
        output = f"{stdout[-3000:]}\n{stderr[-3000:]}"
        raise AssertionError(f"still running after {timeout} s: {process.args}\n{output}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def mpirun(ranks: int, *arguments: str, cwd: Path, timeout: float = 120, **environment: str) -> Any:
    """Run to the end and return code and output."""
    return finish(start(ranks, *arguments, cwd=cwd, **environment), timeout)


def mpitrain(ranks: int, *arguments: str, cwd: Path, timeout: float = 120, **environment: str) -> Any:
    """`mpirun -np RANKS python -m mpitrain ...`."""
    return mpirun(ranks, "-m", "mpitrain", *arguments, cwd=cwd, timeout=timeout, **environment)
