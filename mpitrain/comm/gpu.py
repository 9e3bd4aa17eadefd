"""Whether MPI takes a GPU's memory: asked of the library, tried in a child process, agreed by all ranks, or forced.

A library that does not take it most often ends the process at the first message, without a word; hence the child. It
sends to itself only: it shows that the library knows device memory, not that the way to other nodes does.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from mpi4py import MPI

from mpitrain.comm.buffers import Transport
from mpitrain.runtime.agree import Comm, collect
from mpitrain.runtime.device import place_on_node
from mpitrain.runtime.notes import State, note

MPICH_CUDA = 0  # MPIX_GPU_SUPPORT_CUDA
SECONDS = 120.0  # for a child to import torch, perhaps over a slow network, and to send two messages
ROOT = Path(__file__).parents[2]  # where a child finds this package
# A vendor's library, by what it says of itself, and the variable by which it is told to take device memory.
SWITCHES = {
    "cray mpich": "MPICH_GPU_SUPPORT_ENABLED",
    "mvapich": "MV2_USE_CUDA",
    "parastation": "PSP_CUDA",
    "intel(r) mpi": "I_MPI_OFFLOAD",
}
# A child of a rank that inherited these would take itself for that rank: MPICH dies of it, Open MPI hangs.
LAUNCHERS = ("PMI", "OMPI_", "PRTE_", "HYD", "MPI_LOCAL", "I_MPI_", "MPIEXEC_", "SLURM_", "PALS_", "FLUX_", "JSM_")
# But a user's settings belong to what is checked. Open MPI's launcher has some that look like settings.
SETTINGS = ("OMPI_MCA_", "I_MPI_OFFLOAD", "I_MPI_ROOT", "I_MPI_FABRICS")
NO_SETTINGS = ("OMPI_MCA_orte_", "OMPI_MCA_ess", "OMPI_MCA_pmix", "OMPI_MCA_initial_wdir", "OMPI_MCA_num_procs")


def decide(comm: Comm, device: torch.device, wanted: str) -> tuple[bool, str]:
    """Whether MPI is given device memory, and why; the same on every rank (collective).

    Args:
        device: of this rank.
        wanted: auto, direct or staged.
    """
    first_on_node = place_on_node(comm)[0] == 0
    if wanted == "auto" and comm.size == 1:
        return False, "one rank sends nothing"
    if wanted == "auto":
        direct, why = claim(MPI.Get_library_version(), os.environ, library_says_yes())
        if direct and first_on_node:  # a child for each rank would find out the same, and load torch as often
            failure = try_out([sys.executable, "-m", __spec__.name, str(device)])
            direct, why = not failure, f"{why}; the check {failure or 'in a child process passed'}"
    else:
        direct, why = wanted == "direct", f"--comm.gpu {wanted}"
    answers = collect(comm, [direct, why])
    refusals = [f"{why} (rank {rank})" for rank, (direct, why) in enumerate(answers) if not direct]
    return not refusals, (refusals or [answers[0][1]])[0]


def claim(version: str, environment: Mapping[str, str], library_says: bool) -> tuple[bool, str]:
    """Whether this rank's MPI is said to take device memory, and by whom.

    Args:
        version: what the library says of itself.
        environment: where vendors' switches are.
        library_says: its answer when asked.
    """
    for variable in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        if "expandable_segments:true" in environment.get(variable, "").lower():
            return False, f"{variable} has expandable_segments, which other processes cannot open"
    if library_says:
        return True, "the MPI library says that it takes device memory"
    for name, variable in SWITCHES.items():
        if name in version.lower():
            value = environment.get(variable, "")
            return value.isdigit() and int(value) > 0, f"{variable}={value}" if value else f"{variable} is not set"
    return False, "the MPI library does not say that it takes device memory"


def library_says_yes() -> bool:
    """The library's answer, by Open MPI's query or by MPICH's; no if it knows neither."""
    library, answer = ctypes.CDLL(MPI.__file__), ctypes.c_int(0)
    if hasattr(library, "MPIX_Query_cuda_support") and library.MPIX_Query_cuda_support() > 0:
        return True
    if hasattr(library, "MPIX_GPU_query_support"):
        library.MPIX_GPU_query_support(MPICH_CUDA, ctypes.byref(answer))
    return answer.value > 0


def try_out(command: Sequence[str], seconds: float = SECONDS) -> str:
    """What became of a check in a process of its own, that knows nothing of this job: nothing if it passed."""
    with tempfile.TemporaryFile() as heard:
        try:
            child = subprocess.Popen(
                command,
                env=scrubbed(os.environ),
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=heard,
                stderr=heard,
                start_new_session=True,  # so that its own children can be ended with it
            )
        except OSError as error:
            return f"could not be started: {error}"
        try:
            note(b"trying out device memory", state=State.LISTENING)
            code = child.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            return f"did not end within {seconds:g} s"
        heard.seek(0)
        words = heard.read().decode(errors="replace").split("\n")
    if code < 0:
        return f"crashed: {signal.strsignal(-code)}"
    last = next((line.strip() for line in reversed(words) if line.strip()), f"exit code {code}")
    return f"failed: {last}" if code else ""


def scrubbed(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without what a launcher tells its ranks: a child that has it starts as a world of one."""
    return {
        name: value
        for name, value in environment.items()
        if not name.startswith(LAUNCHERS) or (name.startswith(SETTINGS) and not name.startswith(NO_SETTINGS))
    }


def exchange_with_itself(device: torch.device) -> None:
    """Send two tensors to this process, one short enough to be buffered by MPI and one that is not.

    Raises:
        RuntimeError: other contents have come than were sent.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    transport = Transport(device, direct=True)
    for num_elements in (16, 1 << 20):
        sent = torch.arange(num_elements, dtype=torch.int32, device=device)
        arriving = transport.post(MPI.COMM_SELF, tuple(sent.shape), sent.dtype, 0, 0)
        leaving = transport.send(MPI.COMM_SELF, sent, 0, 0)
        received = arriving.received()
        leaving.sent()
        if not torch.equal(received, sent):
            raise RuntimeError(f"{sent.nbytes} bytes arrived with other contents than were sent")


if __name__ == "__main__":
    exchange_with_itself(torch.device(sys.argv[1]))
