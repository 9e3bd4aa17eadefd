"""From facts to findings, for what ranks are made of and run on: program, cores, shared memory, GPUs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain

from mpitrain.doctor.findings import Facts, Finding, bad, ok, warn
from mpitrain.runtime.cores import are_crowded, ranges, shares

MIB = 1 << 20
MOST_SHOWN = 8  # ranks in a line


def judge_program(programs: Sequence[Mapping[str, str]], hosts: Sequence[str]) -> Finding:
    """Whether all ranks are made of the same.

    Args:
        programs: of each rank, versions by name.
        hosts: of each rank.
    """
    first = programs[0]
    for rank, other in enumerate(programs):
        differing = [name for name in {**first, **other} if first.get(name) != other.get(name)]
        if differing:
            texts = (f"{name} {other.get(name)} (on rank 0 {first.get(name)})" for name in differing)
            found = f"rank {rank} on {hosts[rank]} has {', '.join(texts)}"
            return bad("program", found, "give all nodes the same environment", {"programs": list(programs)})
    return ok(
        "program", f"mpitrain {first['mpitrain']}, torch {first['torch']}, the same on all ranks", {"program": first}
    )


@dataclass(frozen=True)
class Node:
    """The cores of a node's ranks.

    Attributes:
        masks: cores that each rank is bound to.
        usable: those that the job may use there, of each its hardware threads.
    """

    host: str
    masks: list[list[int]]
    usable: list[list[int]]

    @property
    def held(self) -> list[int]:
        """Cores that some rank is bound to."""
        return sorted(set(chain(*self.masks)))

    @property
    def idle(self) -> list[int]:
        """Cores that no rank is bound to; one of whose hardware threads a rank has is at work."""
        return sorted(chain(*(core for core in self.usable if not {*core} & {*self.held})))


def judge_binding(nodes: Sequence[Node]) -> Finding:
    """Whether ranks are where cores are."""
    facts = {"nodes": [asdict(node) for node in nodes]}
    unbind = "bind no rank, or each to cores of its own (mpirun --bind-to none, srun --cpu-bind=none"
    wasteful = [node for node in nodes if node.idle]
    for node in sorted(wasteful, key=lambda node: not are_crowded(node.masks)):
        ranks, idle = f"{len(node.masks)} rank(s) of {node.host}", f"core(s) {ranges(node.idle)} of this job are idle"
        if are_crowded(node.masks):
            found = f"{ranks} share core(s) {ranges(node.held)}, while {idle}"
            return bad(
                "binding", found, f"{unbind}), and see whether a taskset or a batch script does otherwise", facts
            )
        found = f"{ranks} are bound to core(s) {ranges(node.held)}, while {idle}"
        return warn("binding", found, f"{unbind} --cpus-per-task=...), or take more ranks", facts)
    apart = all(sum(map(len, node.masks)) == len(node.held) for node in nodes)
    how = "each rank has its own" if apart else "ranks share them"
    return ok("binding", f"core(s) {ranges(nodes[0].held)} of {nodes[0].host}, {how}; none is idle", facts)


def judge_cores(nodes: Sequence[Node], num_threads: int, excess: int, misread: str) -> Finding:
    """Whether there are enough.

    Args:
        nodes: all of them.
        num_threads: of a rank.
        excess: ranks with more threads than cores for them.
        misread: what OMP_NUM_THREADS says if that is no number.
    """
    fewest = float(min(chain(*(shares(node.masks) for node in nodes))))
    facts = {"cores_of_a_rank": fewest, "threads_of_a_rank": num_threads, "ranks_with_too_many_threads": excess}
    crowded = next((node for node in nodes if are_crowded(node.masks)), None)
    if crowded is not None:
        cores = len(crowded.held)
        found = f"{len(crowded.masks)} rank(s) on {cores} core(s) of {crowded.host}, {fewest:.2g} a rank"
        return warn("cores", found, f"ranks take turns, which is slower; with {cores} each would have a core", facts)
    if excess:
        found = f"{excess} rank(s) have more threads than cores for them"
        return warn("cores", found, "unset OMP_NUM_THREADS, and leave --train.threads out", facts)
    if misread:
        found = f"OMP_NUM_THREADS is {misread!r}, which is no number of threads"
        return warn("cores", found, "unset it, or give a number", facts)
    return ok("cores", f"{fewest:.3g} a rank, {num_threads} thread(s) each", facts)


@dataclass(frozen=True)
class Room:
    """Shared memory of a node.

    Attributes:
        free: bytes; None where windows live elsewhere.
        lack: what is wrong with it, if MPI's own buffers find no room; and, behind a semicolon, what to do.
    """

    host: str
    num_ranks: int
    free: int | None
    lack: str


def judge_memory(rooms: Sequence[Room], model: str, num_parameters: int, headroom: int) -> Finding:
    """Whether MPI's buffers, and fp32 weights and gradients of a model, have room.

    Args:
        rooms: of each node.
        model: its name.
        num_parameters: that it has.
        headroom: bytes that are left to others.
    """
    facts = {"nodes": [asdict(room) for room in rooms]}
    for room in rooms:
        if room.lack:
            found, _, advice = room.lack.partition("; ")
            return bad("shared memory", f"{room.host}: {found}", advice, facts)
    for room in rooms:
        needed = 4 * num_parameters * (1 + room.num_ranks) + headroom
        if room.num_ranks > 1 and room.free is not None and room.free < needed:
            return warn(
                "shared memory",
                f"{room.host} has {room.free // MIB:,} MiB free; {model} takes up to {needed // MIB:,} on "
                f"{room.num_ranks} ranks",
                "gradients would travel in messages, which is slower; a container needs --shm-size=8g or so",
                facts,
            )
    least = min((room.free for room in rooms if room.free is not None), default=None)
    found = "windows do not live in /dev/shm here" if least is None else f"{least // MIB:,} MiB free in /dev/shm"
    return ok("shared memory", f"{found}, enough for {model}", facts)


@dataclass(frozen=True)
class Gpus:
    """Those of a rank.

    Attributes:
        visible: name of each one that torch sees, by UUID.
        taken: UUID of the one that the rank takes; empty if it computes on cores.
        driver: the driver of one is there.
    """

    visible: dict[str, str]
    taken: str
    driver: bool


def judge_gpus(gpus: Sequence[Gpus], hosts: Sequence[str], wanted: str) -> Finding:
    """Whether each rank has one, if any has.

    Args:
        gpus: of each rank.
        hosts: of each rank.
        wanted: --train.device.
    """
    facts = {"ranks": [asdict(each) for each in gpus]}
    blind = [rank for rank, each in enumerate(gpus) if not each.visible]
    if len(blind) < len(gpus) and wanted == "cpu":
        return ok("GPUs", "not used, as --train.device cpu says", facts)
    if blind and (len(blind) < len(gpus) or wanted == "cuda"):
        found = f"no GPU on rank(s) {ranges(blind)} (the first on {hosts[blind[0]]}), so that none is used"
        return bad("GPUs", found, "ask for GPUs on all nodes, or say --train.device cpu", facts)
    if blind:
        for host, each in zip(hosts, gpus, strict=True):
            if each.driver:
                found = f"{host} has the driver of a GPU, but torch sees none"
                return warn("GPUs", found, "install torch's CUDA build, or ask the scheduler for GPUs", facts)
        return ok("GPUs", "none: ranks compute on cores", facts)
    return _judge_map(gpus, facts)


def _judge_map(gpus: Sequence[Gpus], facts: Facts) -> Finding:
    for uuid, number in Counter(each.taken for each in gpus).items():
        if number > 1:
            sharing = ranges([rank for rank, each in enumerate(gpus) if each.taken == uuid])
            advice = "start as many ranks on a node as it has GPUs, and let each see all of them, or one of its own"
            return warn("GPUs", f"ranks {sharing} share {uuid}", advice, facts)
    idle = sorted(set(chain(*(each.visible for each in gpus))) - {each.taken for each in gpus})
    if idle:
        advice = "start as many ranks on a node as it has GPUs"
        return warn("GPUs", f"{len(idle)} are idle, {idle[0]} among them", advice, facts)
    texts = [f"rank {rank} {each.taken}" for rank, each in enumerate(gpus[:MOST_SHOWN])]
    texts += [f"and so on, one for each of {len(gpus)} ranks"] if len(gpus) > MOST_SHOWN else []
    return ok("GPUs", f"{gpus[0].visible[gpus[0].taken]}: {', '.join(texts)}", facts)


def judge_gpu_memory(on_gpu: bool, direct: bool, why: str, num_ranks: int) -> Finding:
    """How a GPU's tensors reach MPI, and why."""
    facts = {"direct": on_gpu and direct, "why": why}
    if not on_gpu:
        return ok("GPU memory", "no GPU to send from", facts)
    if direct or num_ranks == 1:
        return ok("GPU memory", f"given to MPI directly: {why}" if direct else why, facts)
    return warn(
        "GPU memory",
        f"goes through pinned host memory: {why}",
        "an MPI library that takes device memory is faster; jobs/README.md has the vendors' variables",
        facts,
    )
