"""Going on without ranks that have died, where MPI can: Open MPI's fault tolerance (`mpirun --with-ft ulfm`).

Who meets the death of a rank revokes all communicators that he waits in, so that all others leave them, too. Then all
that are left come together in a smaller one (Bland et al., "Post-failure recovery of MPI communication capability:
design and rationale", 2013, section 3). Nothing of before is given back: that would need those who are gone.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import NoReturn

from mpi4py import MPI

from mpitrain.runtime.agree import Comm, collect

VARIABLE = "OMPI_MCA_mpi_ft_enable"  # what `--with-ft ulfm` sets for all ranks
SECONDS_TO_LEAVE = 0.5  # for others to have left the last call that all have made


def can_survive() -> bool:
    """Whether this MPI, as it was started, lets ranks go on when others have died."""
    return os.environ.get(VARIABLE, "0").lower() in ("1", "true")


def is_loss(error: BaseException) -> bool:
    """Whether an error says that a rank has died, that another has met it, or that some request failed."""
    kinds = (MPI.ERR_PROC_FAILED, MPI.ERR_PROC_FAILED_PENDING, MPI.ERR_REVOKED, MPI.ERR_IN_STATUS)
    return isinstance(error, MPI.Exception) and error.Get_error_class() in kinds


def revoke(comms: Iterable[Comm]) -> None:
    """Have everybody leave these communicators."""
    for comm in comms:
        with suppress(MPI.Exception):
            comm.Revoke()


def survivors(world: Comm, unit: int) -> tuple[Comm, list[int]]:
    """As many of the ranks that are left as make whole groups of `unit`, and which were lost (collective).

    Who belongs to no whole group ends here; if there is none, all that are left are returned.
    """
    revoke([world])
    left = Comm(world.Shrink())
    lost = sorted(set(range(world.size)) - set(collect(left, world.rank)))
    used = left.size // unit * unit or left.size
    chosen = left.Split(0 if left.rank < used else MPI.UNDEFINED, left.rank)
    left.Barrier()
    if chosen == MPI.COMM_NULL:
        _leave()
    return Comm(chosen), lost


def _leave() -> NoReturn:
    time.sleep(SECONDS_TO_LEAVE)
    sys.stdout.flush()
    os._exit(0)  # MPI's own end would wait for all
