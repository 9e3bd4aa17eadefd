"""Start and end as one MPI program: initialise, check the launcher, abort on any stray error, exit with one code."""

from __future__ import annotations

import array
import ctypes
import faulthandler
import fcntl
import os
import platform
import re
import signal
import stat
import sys
import termios
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn

from mpitrain.errors import ExitCode, MpitrainError, code_of
from mpitrain.runtime.library import Library, StartError, require_common_words, require_room, stranger, words_of

# Who tells a rank, before MPI is initialised, how many there are, and which one it is.
SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PALS_SIZE", "MPI_LOCALNRANKS", "SLURM_STEP_NUM_TASKS")
LOCAL_SIZE_VARIABLES = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "PMI_LOCAL_SIZE")  # on this node
LOCAL_RANK_VARIABLES = ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "PALS_LOCAL_RANKID", "SLURM_LOCALID")
RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PALS_RANKID", "MPI_LOCALRANKID", "SLURM_PROCID")
SECONDS_TO_START, SECONDS_TO_LEAVE = 600, 60  # in which nobody watches but the kernel
SECONDS_FOR_THE_FIRST = 10.0  # to speak for all, before the exit of another one has the launcher end it
PR_SET_TIMERSLACK = 29
# USR1 is the one signal that both MPICH's and Open MPI's mpirun pass on; TERM and INT are best effort.
STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def announced(variables: tuple[str, ...]) -> int | None:
    """What the launcher's environment says, or None without a launcher."""
    values = (os.environ.get(name, "") for name in variables)
    return next((int(value) for value in values if value.isdigit()), None)


@dataclass
class StopRequest:
    """A signal asks for a checkpoint and an exit; handlers only set the flag, a vote at the next step acts."""

    signals: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.signals)

    def listen(self) -> None:
        """Take over the stop signals (main thread only)."""
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup wants it to be ignored
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signals.append(signal.Signals(number).name)


def import_mpi(*, initialised: bool = True) -> Any:
    """mpi4py's MPI module, initialised on import unless told otherwise.

    Raises:
        StartError: there is no usable MPI library; the message says how to get one.
    """
    try:
        import mpi4py

        if not initialised:
            mpi4py.rc(initialize=False, finalize=True)
        from mpi4py import MPI
    except (ImportError, RuntimeError, OSError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise StartError(
            "MPI",
            f"no MPI library can be loaded ({first}); on a cluster load its MPI module, "
            "on a laptop: pip install 'mpitrain[mpich]'",
        ) from None
    return MPI


def start(*, wary: bool = False) -> Any:
    """COMM_WORLD of a sound launch, with hooks that end the whole job when one rank fails.

    Args:
        wary: look first whether MPI is likely to survive its start.

    Raises:
        StartError: no MPI library, a thread level below MPI_THREAD_MULTIPLE, or ranks that do not know of each other.
    """
    nap_precisely()
    # Harmless where ranks have cores of their own; where they share them MPICH then yields while it waits.
    os.environ.setdefault("MPIR_CVAR_POLLS_BEFORE_YIELD", "1")
    # Open MPI's windows by UCX complain on every rank; ours are in memory that a node shares, never by UCX.
    os.environ.setdefault("OMPI_MCA_osc", "^ucx")
    mpi = import_mpi(initialised=False)
    num_ranks = announced(SIZE_VARIABLES) or 1
    require_common_words(mpi, os.environ, num_ranks)
    if wary:
        require_room(mpi, announced(LOCAL_SIZE_VARIABLES) or 1)
    _initialise(mpi)
    install_abort_hooks(mpi.COMM_WORLD)
    check_launch(mpi.COMM_WORLD.size, mpi)
    if mpi.Query_thread() < mpi.THREAD_MULTIPLE:
        raise StartError(
            "threads",
            "MPI was initialised without MPI_THREAD_MULTIPLE, which reducing gradients in the background needs; "
            "use an MPI library that grants it and unset MPI4PY_RC_THREAD_LEVEL",
        )
    return mpi.COMM_WORLD


def _initialise(mpi: Any) -> None:
    """As mpi4py does on import, with its settings."""
    from mpi4py import rc

    if not mpi.Is_initialized():
        mpi.Init_thread(getattr(mpi, f"THREAD_{rc.thread_level.upper()}") if rc.threads else mpi.THREAD_SINGLE)


def nap_precisely() -> None:
    """Have the kernel end naps of 20 us after 20 us, not 70: it may be late by the timer slack (Linux prctl(2))."""
    with suppress(OSError, AttributeError):  # not on other systems
        ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0)


def die_unless_done_in(seconds: float) -> None:
    """Be ended by a signal, which ends the job, and tell the stacks then; 0 is never. The kernel sees to it.

    For when ranks wait for each other and cannot watch each other. Not every launcher minds a mere exit code.
    """
    with suppress(AttributeError, ValueError, OSError):  # standard error may be closed
        faulthandler.register(signal.SIGALRM, chain=True)
    signal.setitimer(signal.ITIMER_REAL, seconds)


def patience(hang_timeout: float) -> float:
    """Seconds for ranks to part, or to come together anew, where nobody watches; 0 is for ever."""
    return max(hang_timeout, SECONDS_TO_LEAVE) if hang_timeout else 0


def seconds_since_start() -> float | None:
    """Since this process was started, imports and MPI's start included; None where that is not told."""
    started = start_of(os.getpid())
    return None if started is None else time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")


def birth() -> float:
    """When this process was started, or about now where that is not told, by time.perf_counter."""
    return time.perf_counter() - (seconds_since_start() or 0.0)


def start_of(pid: int) -> int | None:
    """Clock ticks from boot to the start of a process (proc(5)); None if none runs, or that is not told."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else int(fields[18])
    except (OSError, ValueError, IndexError):
        return None


def library_version() -> str:
    """Name and version of the MPI library in a few words."""
    return words_of(import_mpi().Get_library_version().replace("\x00", ""))


def check_launch(world_size: int, mpi: Any) -> None:
    """Refuse N independent runs of one rank each: the launcher and the MPI library are of different families."""
    expected = announced(SIZE_VARIABLES)
    if expected is not None and expected > 1 and world_size == 1:
        raise stranger(Library.of(mpi), os.environ, expected, "MPI sees a world of 1")


def install_abort_hooks(world: Any) -> None:
    """Any uncaught exception, in whatever thread, prints rank and traceback and ends all ranks."""

    def report(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
        abort(world, error or kind(), trace)

    sys.excepthook = report
    threading.excepthook = lambda args: report(args.exc_type, args.exc_value, args.exc_traceback)


SECONDS_FOR_LAST_WORDS = 5.0
LESS_MEMORY = (
    "fewer ranks on a node, more --mesh.pipe or --mesh.tensor, more --train.micro_batches, --train.recompute block or "
    "--checkpoint.async false take less"
)
_last_words: list[Callable[[BaseException], object]] = []
_ending = threading.Event()


def announce_end() -> None:
    """Some thread of this rank is going to end the job, whatever the others still come to."""
    _ending.set()


def stay_if_ending() -> None:
    """Never come back if some thread of this rank is going to end the job: what goes on must not be told as done."""
    while _ending.is_set():
        time.sleep(1)


@contextmanager
def last_words(say: Callable[[BaseException], object]) -> Iterator[None]:
    """Have `say` be called with the cause if this rank, in whatever thread, ends the job meanwhile."""
    _last_words.append(say)
    try:
        yield
    finally:
        _last_words.remove(say)


def _say(say: Callable[[BaseException], object], error: BaseException) -> None:
    with suppress(Exception):
        say(error)


def abort(world: Any, error: BaseException, trace: TracebackType | None) -> NoReturn:
    """Print the cause with this rank's number and take all ranks down with its exit code."""
    announce_end()
    if isinstance(error, MpitrainError):
        text = f"error (rank {world.rank}): {error}\n"
    else:
        stack = "".join(traceback.format_exception(type(error), error, trace))
        text = "".join(f"[rank {world.rank}] {line}\n" for line in stack.splitlines())
        if is_out_of_memory(error):
            text += f"error (rank {world.rank}): out of memory on {platform.node()}; {LESS_MEMORY}\n"
    with suppress(OSError):  # a closed standard error must not keep the others waiting
        os.write(2, text.encode(errors="replace"))
        let_the_launcher_read(2)
    for say in _last_words:  # a disk that answers no more may be the very cause
        speaker = threading.Thread(target=_say, args=(say, error), daemon=True)
        speaker.start()
        speaker.join(SECONDS_FOR_LAST_WORDS)
    world.Abort(code_of(error))
    os._exit(ExitCode.FAULT)  # Abort need not return; if it does, this rank at least is gone


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, torch or HDF5 asked for memory in vain; those of C and CUDA only say so."""
    return (
        isinstance(error, MemoryError) or re.search(r"out of memory|can(no|')t allocate memory", str(error)) is not None
    )


def let_the_launcher_read(descriptor: int, seconds: float = 1.0) -> None:
    """Wait until nothing is left in a pipe: a launcher told to kill all ranks no longer reads what they wrote."""
    limit = time.monotonic() + seconds
    left = array.array("i", [1])
    while stat.S_ISFIFO(os.fstat(descriptor).st_mode) and left[0] and time.monotonic() < limit:
        fcntl.ioctl(descriptor, termios.FIONREAD, left)
        time.sleep(0.01)


def finish(world: Any, code: int) -> NoReturn:
    """All ranks leave together with one exit code."""
    from mpi4py import MPI

    # Nothing is left to stop, and Python's end would give signals their deadly default back.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    world.Barrier()
    sys.stdout.flush()
    MPI.Finalize()
    sys.exit(code)
