"""`mpitrain doctor`: check after check, each within bounds, whatever becomes of the ones before."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

from mpitrain.bench.facts import describe_machine
from mpitrain.config import Config
from mpitrain.doctor.files import check_files
from mpitrain.doctor.findings import Finding, bad, warn
from mpitrain.doctor.ground import Ground, survey
from mpitrain.doctor.node import check_cores, check_gpus, check_memory, check_program, check_start
from mpitrain.doctor.report import Report
from mpitrain.doctor.speed import check_links, check_products, check_sums
from mpitrain.errors import ExitCode, MpitrainError
from mpitrain.observe.console import Console
from mpitrain.runtime.agree import Comm
from mpitrain.runtime.notes import State, note

HANG_TIMEOUT = 60.0  # seconds without progress of any rank, unless --runtime.hang_timeout says otherwise
CHECKS: dict[tuple[str, ...], Callable[[Ground], Iterable[Finding]]] = {
    ("MPI", "threads", "launcher"): check_start,
    ("program",): check_program,
    ("binding", "cores"): check_cores,
    ("shared memory",): check_memory,
    ("GPUs", "GPU memory"): check_gpus,
    ("run directory", "locks", "rename", "HDF5"): check_files,
    ("node link", "network link"): check_links,
    ("sums",): check_sums,
    ("fp32 products", "bf16 products"): check_products,
}


def doctor(comm: Comm, config: Config, console: Console, *, as_json: bool) -> int:
    """Tell what is found, and return the exit code (collective)."""
    began = time.monotonic()
    note(b"looking around", state=State.WORKING)
    ground = survey(comm, config)
    report, seconds = Report(console), {"start": time.monotonic() - began}
    for names, check in CHECKS.items():
        now = time.monotonic()
        report.add(_attempt(ground, names, check))
        seconds[names[0]] = time.monotonic() - now
    facts = describe_machine(comm, ground.cores.num_threads)
    return report.end({"started": True, **facts, "seconds": seconds}, as_json=as_json)


def _attempt(ground: Ground, names: tuple[str, ...], check: Callable[[Ground], Iterable[Finding]]) -> Iterator[Finding]:
    """What a check finds; what kept all ranks from one of its lines is a finding, too."""
    left = list(names)
    try:
        for finding in check(ground):
            left.remove(finding.check)
            yield finding
    except MpitrainError as error:
        if not error.agreed:
            raise
        first, *others = left
        code = error.code if error.code == ExitCode.FAULT else ExitCode.USAGE
        found, _, advice = str(error).partition("; ")
        yield bad(first, found, advice, code=code)
        for name in others:
            yield warn(name, "not checked", f"mend the line {first!r} first")
