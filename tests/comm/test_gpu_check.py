"""Whether MPI takes device memory: what is asked, what a child process finds out, and that all ranks decide alike."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mpi4py import MPI
from small import small_card

from mpitrain import place
from mpitrain.comm import gpu
from mpitrain.comm.buffers import Transport
from mpitrain.config import Config
from mpitrain.observe.console import Console

CPU = torch.device("cpu")
CRAY = "MPI VERSION    : CRAY MPICH version 8.1.28.29 (ANL base 3.4a2)\nMPI BUILD INFO : Wed Nov 15"
INTEL = "Intel(R) MPI Library 2021.16 for Linux* OS\n"
MPICH = "MPICH Version:      5.0.2\nMPICH Device:       ch4:ucx\n"
on_ranks = pytest.mark.mpi(min_size=1)
on_two_ranks = pytest.mark.mpi(min_size=2)


@pytest.mark.parametrize(
    "version, variable, value, expected",
    [
        (CRAY, "MPICH_GPU_SUPPORT_ENABLED", "1", True),
        (CRAY, "MPICH_GPU_SUPPORT_ENABLED", "0", False),
        (CRAY, "MPICH_GPU_SUPPORT_ENABLED", "yes", False),
        (CRAY, "MV2_USE_CUDA", "1", False),
        ("MVAPICH2 Version      :\t2.3.7\n", "MV2_USE_CUDA", "1", True),
        ("MVAPICH Version: 4.0\n", "MV2_USE_CUDA", "0", False),
        ("ParaStation MPI 5.4.11-1\n", "PSP_CUDA", "1", True),
        ("ParaStation MPI 5.4.11-1\n", "I_MPI_OFFLOAD", "1", False),
        (INTEL, "I_MPI_OFFLOAD", "2", True),
        (INTEL, "I_MPI_OFFLOAD", "0", False),
        (MPICH, "MPICH_GPU_SUPPORT_ENABLED", "1", False),
        ("Open MPI v5.0.11, package: ...", "OMPI_MCA_opal_cuda_support", "1", False),
    ],
)
def test_a_vendors_library_says_yes_by_its_own_variable(version, variable, value, expected):
    direct, why = gpu.claim(version, {variable: value}, library_says=False)
    assert direct is expected
    assert not direct or why == f"{variable}={value}"


@pytest.mark.parametrize("version", [CRAY, MPICH, "a library of tomorrow"])
def test_a_library_that_says_yes_is_believed_without_a_variable(version):
    assert gpu.claim(version, {}, library_says=True) == (True, "the MPI library says that it takes device memory")
    assert not gpu.claim(version, {}, library_says=False)[0]


@pytest.mark.parametrize("variable", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_segments_that_expand_are_not_given_to_mpi(variable):
    direct, why = gpu.claim(MPICH, {variable: "max_split_size_mb:64,expandable_segments:True"}, library_says=True)
    assert not direct
    assert variable in why
    assert gpu.claim(MPICH, {variable: "expandable_segments:False"}, library_says=True)[0]


@pytest.mark.parametrize("of_open_mpi, of_mpich", [(None, None), (0, None), (1, None), (None, 0), (None, 1), (0, 1)])
def test_the_library_is_asked_in_its_own_way(monkeypatch, of_open_mpi, of_mpich):
    def mpich_query(kind, answer):
        assert kind == 0, "CUDA"
        answer._obj.value = of_mpich
        return 0

    library = SimpleNamespace()
    if of_open_mpi is not None:
        library.MPIX_Query_cuda_support = lambda: of_open_mpi
    if of_mpich is not None:
        library.MPIX_GPU_query_support = mpich_query
    monkeypatch.setattr(gpu.ctypes, "CDLL", lambda path: library)
    assert gpu.library_says_yes() is (1 in (of_open_mpi, of_mpich))


def test_only_what_the_launcher_set_is_scrubbed():
    kept = ["PATH", "OMPI_MCA_opal_cuda_support", "I_MPI_OFFLOAD", "MPICH_GPU_SUPPORT_ENABLED", "UCX_TLS"]
    gone = ["PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_MCA_orte_hnp_uri", "HYDI_CONTROL_FD"]
    gone += ["PRTE_LAUNCHED", "MPI_LOCALRANKID", "I_MPI_HYDRA_UUID", "SLURM_PROCID", "PALS_RANKID", "FLUX_URI"]
    assert list(gpu.scrubbed(dict.fromkeys(kept + gone, "1"))) == kept


@pytest.mark.parametrize(
    "program, found",
    [
        ("pass", ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "crashed: Segmentation fault"),
        ("raise RuntimeError('64 bytes arrived')", "failed: RuntimeError: 64 bytes arrived"),
        ("raise SystemExit(3)", "failed: exit code 3"),
    ],
)
def test_however_a_child_ends_it_is_told(program, found):
    assert gpu.try_out([sys.executable, "-c", program], seconds=60) == found


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_child_that_does_not_end_is_ended_with_its_own_children(tmp_path):
    command = ["sh", "-c", f"sleep 60 & echo $! > {tmp_path}/pid; wait"]
    assert gpu.try_out(command, seconds=1) == "did not end within 1 s"
    pid, began = int((tmp_path / "pid").read_text()), time.monotonic()
    while runs(pid):  # it obeys the signal when it gets a core
        assert time.monotonic() - began < 30
        time.sleep(0.01)


def test_a_child_that_cannot_be_started_is_a_no():
    assert gpu.try_out(["/no/such/python"]).startswith("could not be started: ")


@on_ranks
def test_one_rank_needs_no_check(monkeypatch):
    monkeypatch.setattr(gpu, "try_out", lambda command: pytest.fail("a child was started"))
    assert gpu.decide(MPI.COMM_SELF, CPU, "auto") == (False, "one rank sends nothing")


@on_two_ranks
def test_a_child_of_a_rank_sends_to_itself_as_a_world_of_its_own(comm, monkeypatch):
    monkeypatch.setattr(gpu, "library_says_yes", lambda: True)
    direct, why = gpu.decide(comm, CPU, "auto")
    assert why == "the MPI library says that it takes device memory; the check in a child process passed"
    assert direct


@on_ranks
def test_other_contents_are_seen(comm, monkeypatch):
    gpu.exchange_with_itself(CPU)

    class Careless(Transport):
        def send(self, comm, tensor, rank, tag):
            return super().send(comm, torch.cat([tensor[:-1], tensor[:1]]), rank, tag)

    monkeypatch.setattr(gpu, "Transport", Careless)
    with pytest.raises(RuntimeError, match="64 bytes arrived with other contents"):
        gpu.exchange_with_itself(CPU)


@on_two_ranks
def test_a_check_that_fails_on_one_node_keeps_all_ranks_from_sending_directly(comm, monkeypatch):
    started = []
    monkeypatch.setattr(gpu, "library_says_yes", lambda: True)
    monkeypatch.setattr(gpu, "try_out", lambda command: started.append(command) or "crashed: Segmentation fault")
    expected = "the MPI library says that it takes device memory; the check crashed: Segmentation fault (rank 0)"
    assert gpu.decide(comm, CPU, "auto") == (False, expected)
    assert len(started) == (comm.rank == 0), "one child a node"


@on_two_ranks
def test_one_rank_whose_library_says_no_decides_for_all(comm, monkeypatch):
    last = comm.size - 1
    monkeypatch.setattr(gpu, "library_says_yes", lambda: comm.rank != last)
    monkeypatch.setattr(gpu, "try_out", lambda command: "")
    monkeypatch.setattr(MPI, "Get_library_version", lambda: MPICH)
    expected = f"the MPI library does not say that it takes device memory (rank {last})"
    assert gpu.decide(comm, CPU, "auto") == (False, expected)


@on_ranks
def test_what_is_forced_is_neither_asked_nor_tried(comm, monkeypatch):
    monkeypatch.setattr(gpu, "library_says_yes", None)
    monkeypatch.setattr(gpu, "try_out", None)
    assert gpu.decide(comm, CPU, "direct") == (True, "--comm.gpu direct")
    assert gpu.decide(comm, CPU, "staged") == (False, "--comm.gpu staged (rank 0)")
    if comm.size > 1:  # a variable may differ from node to node
        assert gpu.decide(comm, CPU, "staged" if comm.rank == 1 else "direct") == (False, "--comm.gpu staged (rank 1)")


@on_ranks
@pytest.mark.parametrize("kind, direct", [("cpu", True), ("cuda", True), ("cuda", False)])
def test_what_was_decided_is_said_with_the_reason_and_on_a_cpu_nothing_is_decided(
    comm, monkeypatch, capsys, kind, direct
):
    asked = []
    monkeypatch.setattr(place, "choose_device", lambda comm, wanted: torch.device(kind))
    monkeypatch.setattr(gpu, "decide", lambda comm, device, wanted: asked.append(wanted) or (direct, "for a reason"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(place, "gpu_of", lambda device: f"GPU-{comm.rank}")
    threads = torch.get_num_threads()
    monkeypatch.setattr(place, "least_memory", lambda comm, device: 1 << 40)
    problem = SimpleNamespace(card=small_card(), label_names=["O"], mean_length=0.0)
    found = place.find_place(comm, Config(comm={"gpu": "auto"}), problem, Console(loud=True), pipe=1)
    torch.set_num_threads(threads)
    found.mesh.free()
    way = "directly" if direct else "staged through pinned host memory"
    assert asked == ["auto"] * (kind == "cuda")
    assert (f"a GPU, one a rank; tensors reach MPI {way} (for a reason)" in capsys.readouterr().out) == (kind == "cuda")
    assert found.transport.staged is not direct
