"""Results of a benchmark in files, with what a reader needs to judge them: machine, versions, command."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mpitrain import __version__
from mpitrain.files import replace_file, user_path
from mpitrain.observe.console import Console
from mpitrain.runtime.agree import Comm, collect
from mpitrain.runtime.launch import library_version


def describe_machine(comm: Comm, num_threads: int) -> dict[str, Any]:
    """What a reader needs to judge the figures (collective)."""
    masks = collect(comm, [platform.node(), sorted(os.sched_getaffinity(0))])
    cores = {(node, core) for node, mask in masks for core in mask}
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpus = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "command": shlex.join(["python", "-m", "mpitrain", *sys.argv[1:]]),
        "ranks": comm.size,
        "nodes": len({node for node, _ in cores}),
        "cpu": cpus[0] if cpus else platform.machine(),
        "cores": len(cores),
        "threads_per_rank": num_threads,
        "mpi": library_version(),
        "versions": {"mpitrain": __version__, "python": platform.python_version(), "torch": torch.__version__},
    }


def write(
    out: Path, stem: str, document: dict[str, Any], console: Console, draw: Callable[[Path], None] | None = None
) -> None:
    """Figures as `<stem>.json` in `out`, drawn as `<stem>.png` if matplotlib is here."""
    with user_path("--out", out):
        out.mkdir(parents=True, exist_ok=True)
        replace_file(out / f"{stem}.json", json.dumps(document, indent=1) + "\n")
        written = [f"{stem}.json"]
        try:
            if draw is not None:
                draw(out / f"{stem}.png")
                written.append(f"{stem}.png")
        except ImportError:
            console.warn("no plot: matplotlib is not installed; pip install 'mpitrain[report]' brings it")
    console.say("written", ", ".join(str(out / name) for name in written))
