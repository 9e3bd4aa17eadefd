"""Whether a person watches: the question is what mpirun itself writes to.

Its ranks cannot tell by themselves: MPICH's mpirun gives them pipes, Open MPI's a terminal, wherever the output ends.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

LAUNCHERS = ("mpirun", "mpiexec", "mpiexec.hydra", "orterun", "prterun", "prun", "srun")


def terminal_width() -> int | None:
    """Columns of the terminal that this process's output ends on, or None if it ends elsewhere."""
    launcher = _launcher()
    if launcher is None:
        return os.get_terminal_size(sys.stdout.fileno()).columns or None if sys.stdout.isatty() else None
    try:
        descriptor = os.open(f"/proc/{launcher}/fd/1", os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        return os.get_terminal_size(descriptor).columns or None if os.isatty(descriptor) else None
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
