"""What ranks are made of and run on: MPI, program, cores, shared memory, GPUs."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mpitrain.comm.window import HEADROOM
from mpitrain.doctor.findings import Finding, ok
from mpitrain.doctor.ground import Ground, everywhere
from mpitrain.doctor.judge_node import (
    Gpus,
    Node,
    Room,
    judge_binding,
    judge_cores,
    judge_gpu_memory,
    judge_gpus,
    judge_memory,
    judge_program,
)
from mpitrain.fit import block_sizes
from mpitrain.model.card import resolve_model
from mpitrain.problem import read_card
from mpitrain.runtime.agree import attempt_at_root
from mpitrain.runtime.cores import usable_cores
from mpitrain.runtime.identity import program
from mpitrain.runtime.launch import import_mpi
from mpitrain.runtime.library import Library, free_shared_memory, lack_of_room, launcher_of

NUM_LABELS = 9  # as in CoNLL-2003; the head is small
DRIVER = Path("/dev/nvidiactl")


def check_start(ground: Ground) -> list[Finding]:
    """Library, threads and launcher: the start would have refused what does not fit."""
    mpi = import_mpi()
    library = Library.of(mpi)
    launcher, size = launcher_of(os.environ), ground.comm.size
    by = f"started by {launcher}" if launcher else "no launcher"
    told = f"{library.version}, MPI {library.standard}, {library.abi}{f'; {library.file}' if library.file else ''}"
    return [
        ok("MPI", told, asdict(library)),
        ok("threads", "MPI_THREAD_MULTIPLE", {"level": "multiple"}),
        ok("launcher", f"{by}; MPI sees {size} rank(s) on {len(ground.leaders)} node(s)", {"launcher": launcher}),
    ]


def check_program(ground: Ground) -> list[Finding]:
    """Whether all ranks are made of the same (collective)."""
    return [judge_program(everywhere(ground.comm, "looking at the program", program), ground.hosts)]


def check_cores(ground: Ground) -> list[Finding]:
    """Where ranks are, and how many cores each has (collective)."""

    def measure() -> list[Any]:
        return [sorted(os.sched_getaffinity(0)), usable_cores()]

    found, cores = everywhere(ground.comm, "looking at cores", measure), ground.cores
    nodes = [
        Node(ground.hosts[leader], [found[rank][0] for rank in ground.members(leader)], found[leader][1])
        for leader in ground.leaders
    ]
    return [judge_binding(nodes), judge_cores(nodes, cores.num_threads, cores.excess, cores.misread)]


def check_memory(ground: Ground) -> list[Finding]:
    """How much memory ranks of a node can share (collective)."""
    sizes = attempt_at_root(
        ground.comm,
        "reading --model",
        lambda: sum(block_sizes(read_card(resolve_model(ground.config.model)), NUM_LABELS)),
    )
    num_ranks = len(ground.members(ground.nodes[ground.comm.rank]))
    measured = everywhere(
        ground.comm, "looking at shared memory", lambda: [free_shared_memory(), lack_of_room(num_ranks)]
    )
    rooms = [Room(ground.hosts[leader], len(ground.members(leader)), *measured[leader]) for leader in ground.leaders]
    return [judge_memory(rooms, ground.config.model, sizes, HEADROOM)]


def check_gpus(ground: Ground) -> list[Finding]:
    """Which rank takes which GPU, and how its memory reaches MPI (collective)."""

    def measure() -> list[object]:
        number = torch.cuda.device_count() if torch.cuda.is_available() else 0
        seen = [torch.cuda.get_device_properties(index) for index in range(number)]
        uuids = [str(each.uuid) for each in seen]
        taken = uuids[ground.device.index] if ground.device.type == "cuda" else ""
        return [dict(zip(uuids, (each.name for each in seen), strict=True)), taken, DRIVER.exists()]

    gpus = [Gpus(*found) for found in everywhere(ground.comm, "looking at GPUs", measure)]
    on_gpu, direct = ground.device.type == "cuda", not ground.transport.staged
    return [
        judge_gpus(gpus, ground.hosts, ground.config.train.device),
        judge_gpu_memory(on_gpu, direct, ground.why, ground.comm.size),
    ]
