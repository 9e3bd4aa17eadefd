"""When this job has to be over, as the user or the scheduler has it."""

from __future__ import annotations

import math
import os
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mpitrain.runtime.launch import seconds_since_start
from mpitrain.sections import seconds_of

SECONDS_FOR_AN_ANSWER = 20.0
FOREVER = ("", "-", "none", "inf", "infinity", "unlimited", "not_set", "invalid")


@dataclass(frozen=True)
class Deadline:
    """The end of the job's time.

    Attributes:
        at: by `time.monotonic`; infinity if there is none.
        told_by: whoever has set it, in words.
    """

    at: float = math.inf
    told_by: str = ""

    def left(self) -> float:
        """Seconds until then."""
        return self.at - time.monotonic()


@dataclass(frozen=True)
class Scheduler:
    """How to ask one for the time that a job has left.

    Attributes:
        name: as its users know it.
        variable: of the environment, with the job's id.
        command: that asks; the id is put behind it.
        read: seconds, infinity, or a ValueError, from what the command prints.
    """

    name: str
    variable: str
    command: tuple[str, ...]
    read: Callable[[str], float]


def _read_seconds(text: str) -> float:
    """A time as `sections.seconds_of` reads it, or one of FOREVER."""
    return math.inf if text.strip().lower() in FOREVER else seconds_of(text.strip())


def _read_job(text: str) -> float:
    """From all that PBS knows of a job: what it asked for, without what it has used."""
    lines = text.replace("\n\t", "").splitlines()  # long values go on in the next line
    told = dict(line.strip().split(" = ", 1) for line in lines if " = " in line)
    limit, used = (told.get(name, "") for name in ("Resource_List.walltime", "resources_used.walltime"))
    return _read_seconds(limit) - seconds_of(used or "0")


def _read_minutes(text: str) -> float:
    """Hours and minutes, with a letter for how LSF has found them: `1:30 L`."""
    found, *_ = [*text.split(), ""]
    return _read_seconds(f"{found}:00" if ":" in found else found)


SCHEDULERS = (
    Scheduler("Slurm", "SLURM_JOB_ID", ("squeue", "--noheader", "--format=%L", "--job"), _read_seconds),
    Scheduler("PBS", "PBS_JOBID", ("qstat", "-f"), _read_job),
    Scheduler("LSF", "LSB_JOBID", ("bjobs", "-noheader", "-o", "time_left"), _read_minutes),
    Scheduler("Flux", "FLUX_JOB_ID", ("flux", "job", "timeleft"), _read_seconds),
)


def find_deadline(limit: float | None, environment: Mapping[str, str] = os.environ) -> tuple[Deadline, str]:
    """When the job ends, and what kept its scheduler from saying so, if it did (rank 0 only).

    Args:
        limit: seconds from the start of this program on; 0 is never; None asks the scheduler, if this is a job of one.
        environment: that of the job.
    """
    now = time.monotonic()
    if limit is not None:
        return Deadline(now - (seconds_since_start() or 0.0) + limit if limit else math.inf, "--runtime.time_limit"), ""
    for scheduler in SCHEDULERS:
        job = environment.get(scheduler.variable)
        if job:
            try:
                return Deadline(now + _ask(scheduler, job, environment), scheduler.name), ""
            except (OSError, ValueError, subprocess.SubprocessError) as error:
                return Deadline(), f"{scheduler.name} did not tell the time that is left: {error}"
    return Deadline(), ""


def _ask(scheduler: Scheduler, job: str, environment: Mapping[str, str]) -> float:
    end = environment.get("SLURM_JOB_END_TIME", "") if scheduler.name == "Slurm" else ""
    if end.isdigit():  # Slurm 22.05 and later: nothing needs to be asked
        return int(end) - time.time()
    done = subprocess.run(
        [*scheduler.command, job],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS_FOR_AN_ANSWER,
        check=True,
    )
    return scheduler.read(done.stdout)
