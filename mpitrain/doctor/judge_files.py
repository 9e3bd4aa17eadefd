"""From facts to findings, for the run directory: seen by all, locks, renames, HDF5."""

from __future__ import annotations

from collections.abc import Sequence

from mpitrain.doctor.findings import Finding, bad, ok, warn
from mpitrain.errors import ExitCode

MIB, GIB = 1 << 20, 1 << 30
SLOW = 30 * MIB  # bytes a second: a checkpoint of BERT-base, with its optimizer, takes most of a minute to be read
HELD, FREE = "held", "free"  # by somebody else; by nobody, though rank 0 holds it
ELSEWHERE = "give an --out on another file system"


def judge_directory(place: str, kind: str, free: int, seen: Sequence[bool], hosts: Sequence[str]) -> Finding:
    """Whether all ranks see what rank 0 has written.

    Args:
        place: the directory.
        kind: of file system, where the system tells.
        free: bytes.
        seen: by each rank.
        hosts: of each rank.
    """
    facts = {"directory": place, "file_system": kind, "free_bytes": free, "seen": list(seen)}
    blind = [rank for rank, sees in enumerate(seen) if not sees]
    if blind:
        return bad(
            "run directory",
            f"rank {blind[0]} on {hosts[blind[0]]} does not see what rank 0 on {hosts[0]} has written in {place} "
            f"({len(blind)} of {len(seen)} ranks do not)",
            "give an --out on a file system that all nodes share, and start all ranks in the same directory",
            facts,
        )
    told = f"{place}{f' ({kind})' if kind else ''}"
    return ok("run directory", f"{told}: seen by all {len(seen)} rank(s), {free / GIB:,.1f} GiB free", facts)


def judge_locks(outcomes: Sequence[str], hosts: Sequence[str]) -> Finding:
    """Whether a lock of rank 0 keeps the others out.

    Args:
        outcomes: of asking for it, by each rank: HELD, FREE, or why it was refused.
        hosts: of each rank.
    """
    facts = {"outcomes": list(outcomes)}
    advice = f"two jobs in one directory would not be noticed: let no two use one, or {ELSEWHERE}"
    for rank, outcome in enumerate(outcomes):
        if outcome == FREE:
            return warn("locks", f"rank {rank} on {hosts[rank]} is not kept out by a lock of rank 0", advice, facts)
        if outcome != HELD:
            return warn("locks", f"refused on rank {rank} ({hosts[rank]}): {outcome}", advice, facts)
    return ok("locks", "a lock of one rank keeps the others out", facts)


def judge_rename(fault: str, stale: Sequence[int]) -> Finding:
    """Whether readers see the old or the new, never half of it.

    Args:
        fault: what rank 0 found.
        stale: ranks that did not see what was put in place.
    """
    facts = {"fault": fault, "stale": list(stale)}
    if fault or stale:
        found = fault or f"rank {stale[0]} does not see what rank 0 has put in place of a file"
        return bad("rename", found, f"checkpoints could not be trusted: {ELSEWHERE}", facts)
    return ok("rename", "files and directories are put in place as a whole", facts)


def judge_hdf5(rates: Sequence[float], wrong: Sequence[int], num_bytes: int, *, crowded: bool) -> Finding:
    """How fast shards and checkpoints can be read.

    Args:
        rates: bytes a second of each rank, all at once.
        wrong: ranks that read other bytes than were written.
        num_bytes: of the file.
        crowded: ranks outnumber cores, so that times say little.
    """
    facts = {"bytes_per_second": list(rates), "wrong": list(wrong), "bytes": num_bytes}
    if wrong:
        found = f"rank {wrong[0]} has read other bytes than rank 0 has written"
        return bad("HDF5", found, f"{ELSEWHERE}, and tell whoever runs this one", facts, ExitCode.FAULT)
    slowest = min(rates)
    found = f"{num_bytes // MIB} MiB at {slowest / MIB:,.0f} MiB/s on the slowest of {len(rates)} rank(s), all at once"
    if slowest < SLOW and not crowded:
        return warn("HDF5", found, f"shards and checkpoints will be slow to read; {ELSEWHERE}", facts)
    return ok("HDF5", found, facts)
