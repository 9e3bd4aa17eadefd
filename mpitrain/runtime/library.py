"""Which MPI library mpi4py has loaded, who has started this rank, and whether the two can belong together.

All of it can be known before MPI starts. MPICH's start may end the process without a word of ours: where the launcher
speaks PMIx alone (Open MPI's mpirun), and where shared memory is too small for its buffers.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpitrain.errors import UsageError

MIB = 1 << 20
SHARED_MEMORY = Path("/dev/shm")  # where MPICH and Open MPI keep windows
BUFFERS, BUFFERS_OF_A_RANK = 6 * MIB, 7 * MIB  # MPICH 5.0.2 takes 5.3 MiB a rank, and may crash with little more
SEES_PMIX = (5,)  # the first MPICH that minds the variables of a launcher that speaks PMIx

# What a library says of itself; those that are made of another come before it.
FAMILIES = {
    "spectrum": "Spectrum MPI",
    "open mpi": "Open MPI",
    "cray mpich": "Cray MPICH",
    "intel(r) mpi": "Intel MPI",
    "mvapich": "MVAPICH",
    "parastation": "ParaStation MPI",
    "mpich": "MPICH",
}
# Variables by which launchers are known; one that another launcher may leave standing comes later.
LAUNCHERS = {
    "OMPI_COMM_WORLD_SIZE": "Open MPI's mpirun",
    "PALS_RANKID": "PALS",
    "MPI_LOCALNRANKS": "Hydra (the mpirun of MPICH and Intel MPI)",
    "SLURM_STEP_NUM_TASKS": "srun",
    "PMI_SIZE": "a launcher that speaks PMI",
    "PMIX_NAMESPACE": "a launcher that speaks PMIx",
}


class StartError(UsageError):
    """MPI cannot start here, or not as it has to.

    Attributes:
        part: what has to be mended, as `doctor` calls it.
    """

    def __init__(self, part: str, message: str) -> None:
        """Say so."""
        super().__init__(message)
        self.part = part

    @property
    def of_node(self) -> bool:
        """Whether other nodes may do better."""
        return self.part in ("MPI", "shared memory")


@dataclass(frozen=True)
class Library:
    """What mpi4py has loaded.

    Attributes:
        family: whose mpirun starts it.
        version: name and version, in a few words.
        standard: version of the MPI standard.
        abi: of which mpi4py's module is made.
        file: of the library; empty if the system does not tell.
    """

    family: str
    version: str
    standard: str
    abi: str
    file: str

    @classmethod
    def of(cls, mpi: Any) -> Library:
        """From mpi4py's MPI module, initialised or not."""
        text = mpi.Get_library_version().replace("\x00", "")
        standard = ".".join(map(str, mpi.Get_version()))
        return cls(family_of(text), words_of(text), standard, _abi(mpi), _file())

    def __str__(self) -> str:
        return f"{self.version}, {self.file}" if self.file else self.version

    @property
    def mpirun(self) -> str:
        """The launcher that was installed with it, or which one that is in words."""
        beside = Path(self.file).parent.parent / "bin" / "mpirun"
        return str(beside) if self.file and beside.exists() else "the mpirun of that library"


def family_of(text: str) -> str:
    """The family of a library that says this of itself."""
    return next((name for key, name in FAMILIES.items() if key in text.lower()), "an MPI of unknown family")


def words_of(text: str) -> str:
    """Name and version, of what a library says of itself."""
    return " ".join(text.splitlines()[0].split(",")[0].replace("Version:", "").split())


def _abi(mpi: Any) -> str:
    version: tuple[int, int] = getattr(mpi, "Get_abi_version", lambda: (-1, -1))()
    if version[0] >= 0:
        return f"the MPI standard's ABI {version[0]}.{version[1]}"
    found = re.search(r"MPI\.(mpich|openmpi)\.", Path(mpi.__file__).name)  # of mpi4py's wheel
    return f"the ABI of {FAMILIES['open mpi' if found[1] == 'openmpi' else 'mpich']}" if found else "an ABI of its own"


def _file() -> str:
    """The libmpi among the libraries of this process (proc(5))."""
    with suppress(OSError):
        found = re.search(r"/\S*/libmpi(?:_\w+)?\.so\S*", Path("/proc/self/maps").read_text())
        return found[0] if found else ""
    return ""


def launcher_of(environment: Mapping[str, str]) -> str:
    """Who has started this rank, in words; nothing if nobody says so."""
    return next((name for variable, name in LAUNCHERS.items() if variable in environment), "")


def stranger(library: Library, environment: Mapping[str, str], num_ranks: int, outcome: str) -> StartError:
    """What to say of a launcher and a library that do not belong together."""
    launcher = launcher_of(environment) or "it"
    return StartError(
        "launcher",
        f"the launcher started {num_ranks} ranks, but {outcome}: {launcher} and the MPI library that mpi4py loaded "
        f"({library}) do not belong together; use {library.mpirun} (under Slurm: another --mpi)",
    )


def require_common_words(mpi: Any, environment: Mapping[str, str], num_ranks: int) -> None:
    """Refuse a launcher that speaks PMIx to an MPICH which does not: its start would end the process.

    Raises:
        StartError: names both.
    """
    if "PMIX_NAMESPACE" in environment and not hasattr(ctypes.CDLL(mpi.__file__), "PMIx_Init"):
        library = Library.of(mpi)
        if library.family == "MPICH" and (num_ranks > 1 or mpi.get_vendor()[1] >= SEES_PMIX):
            raise stranger(library, environment, num_ranks, "it speaks PMIx, which their MPI does not")


def require_room(mpi: Any, num_ranks: int) -> None:
    """Refuse shared memory in which MPICH's start would crash.

    Args:
        num_ranks: of this node.

    Raises:
        StartError: says how much there is, and how much is needed.
    """
    lack = lack_of_room(num_ranks)
    if lack and family_of(mpi.Get_library_version()) not in ("Open MPI", "Spectrum MPI"):  # which do without
        raise StartError("shared memory", lack)


def lack_of_room(num_ranks: int) -> str:
    """What is wrong with shared memory if MPI's own buffers have no room in it."""
    needed = BUFFERS + BUFFERS_OF_A_RANK * num_ranks
    with suppress(OSError):
        status = os.statvfs(SHARED_MEMORY)
        whole, free = (blocks * status.f_frsize for blocks in (status.f_blocks, status.f_bavail))
        # Of what is taken, ranks of this job may have taken most already; but not all.
        if whole < needed or free < MIB:
            return (
                f"{SHARED_MEMORY} has {whole // MIB:,} MiB, {free // MIB:,} of them free, and MPI's buffers for "
                f"{num_ranks} rank(s) take up to {needed // MIB:,}; have it made larger (docker run --shm-size=8g), or "
                "delete what killed jobs have left there"
            )
    return ""


def free_shared_memory() -> int | None:
    """Bytes, or None where windows live elsewhere. Touching more than there is would kill the rank (SIGBUS)."""
    if not SHARED_MEMORY.is_dir():
        return None
    status = os.statvfs(SHARED_MEMORY)
    return status.f_bavail * status.f_frsize
