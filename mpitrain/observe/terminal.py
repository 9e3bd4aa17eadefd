"""Whether a person watches: mpirun gives its ranks pipes, so the question is what mpirun itself writes to."""

from __future__ import annotations

import os
import sys
from pathlib import Path

LAUNCHERS = ("mpirun", "mpiexec", "mpiexec.hydra", "orterun", "prterun", "prun", "srun")


def terminal_width() -> int | None:
    """Columns of the terminal that this process's output ends on, or None if it ends elsewhere."""
    if sys.stdout.isatty():
        return os.get_terminal_size(sys.stdout.fileno()).columns
    launcher = _launcher()
    if launcher is None:
        return None
    try:
        descriptor = os.open(f"/proc/{launcher}/fd/1", os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        return os.get_terminal_size(descriptor).columns if os.isatty(descriptor) else None
    finally:
        os.close(descriptor)


def _launcher() -> int | None:
    """The nearest ancestor that is an MPI launcher on this machine."""
    process = os.getppid()
    while process > 1:
        try:
            name, _, rest = Path(f"/proc/{process}/stat").read_text().rpartition(")")
        except OSError:
            return None
        if name.partition("(")[2] in LAUNCHERS:
            return process
        process = int(rest.split()[1])
    return None
