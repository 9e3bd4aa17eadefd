"""Who has started a rank, by which library it talks, and whether both belong together, before MPI starts."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from mpitrain.runtime import library
from mpitrain.runtime.library import Library, StartError

MPICH = "MPICH Version:      5.0.2\nMPICH Release date: Fri Sep 25\n"
OPEN_MPI = "Open MPI v5.0.11, package: Open MPI user@localhost Distribution\x00"
CRAY = "MPI VERSION    : CRAY MPICH version 8.1.28.29 (ANL base 3.4a2)\n"


@pytest.mark.parametrize(
    "text, family",
    [
        (MPICH, "MPICH"),
        (OPEN_MPI, "Open MPI"),
        (CRAY, "Cray MPICH"),
        ("Intel(R) MPI Library 2021.16 for Linux* OS\n", "Intel MPI"),
        ("MVAPICH Version: 4.0\nMPICH ABI: 1\n", "MVAPICH"),
        ("ParaStation MPI 5.4.11-1\n", "ParaStation MPI"),
        ("a library of tomorrow", "an MPI of unknown family"),
    ],
)
def test_a_family_is_known_by_what_its_library_says(text, family):
    assert library.family_of(text) == family


@pytest.mark.parametrize(
    "variables, words",
    [
        ({}, ""),
        ({"OMPI_COMM_WORLD_SIZE": "2", "PMIX_NAMESPACE": "x", "SLURM_STEP_NUM_TASKS": "1"}, "Open MPI's mpirun"),
        ({"PMI_SIZE": "2", "MPI_LOCALNRANKS": "2", "SLURM_STEP_NUM_TASKS": "1"}, "Hydra"),
        ({"SLURM_STEP_NUM_TASKS": "2", "PMIX_NAMESPACE": "x"}, "srun"),
        ({"PALS_RANKID": "0", "PMI_SIZE": "2"}, "PALS"),
        ({"PMIX_NAMESPACE": "x"}, "a launcher that speaks PMIx"),
    ],
)
def test_a_launcher_is_known_by_its_variables(variables, words):
    assert library.launcher_of(variables).startswith(words)
    assert words or library.launcher_of(variables) == ""


def fake_mpi(text: str, version: tuple[int, ...], abi: tuple[int, int] = (-1, -1)) -> SimpleNamespace:
    return SimpleNamespace(
        Get_library_version=lambda: text,
        Get_version=lambda: (4, 1),
        Get_abi_version=lambda: abi,
        get_vendor=lambda: ("whose", version),
        __file__="/lib/MPI.mpich.cpython-311.so",
    )


@pytest.fixture
def _speaks_no_pmix(monkeypatch) -> None:
    monkeypatch.setattr(library.ctypes, "CDLL", lambda file: SimpleNamespace())


@pytest.mark.usefixtures("_speaks_no_pmix")
@pytest.mark.parametrize(
    "text, version, num_ranks, refused",
    [
        (MPICH, (5, 0, 2), 4, True),
        (MPICH, (5, 0, 2), 1, True),
        (MPICH, (4, 3, 0), 4, True),
        (MPICH, (4, 3, 0), 1, False),  # which starts as a world of one
        (OPEN_MPI, (5, 0, 11), 4, False),
        (CRAY, (8, 1), 4, False),
    ],
)
def test_an_mpich_that_speaks_no_pmix_is_not_started_under_it(text, version, num_ranks, refused):
    mpi = fake_mpi(text, version)
    library.require_common_words(mpi, {"PMI_SIZE": "4"}, num_ranks)
    if not refused:
        library.require_common_words(mpi, {"PMIX_NAMESPACE": "x"}, num_ranks)
        return
    with pytest.raises(StartError, match=rf"started {num_ranks} ranks, but it speaks PMIx.*MPICH 5.0.2") as error:
        library.require_common_words(mpi, {"PMIX_NAMESPACE": "x", "OMPI_COMM_WORLD_SIZE": "4"}, num_ranks)
    assert error.value.part == "launcher" and "Open MPI's mpirun and the MPI library" in str(error.value)


def test_an_mpich_that_speaks_pmix_is_started_under_it(monkeypatch):
    monkeypatch.setattr(library.ctypes, "CDLL", lambda file: SimpleNamespace(PMIx_Init=None))
    library.require_common_words(fake_mpi(MPICH, (5, 0, 2)), {"PMIX_NAMESPACE": "x"}, 4)


def test_the_standards_abi_is_told_from_a_familys():
    assert Library.of(fake_mpi(MPICH, (5, 0, 2))).abi == "the ABI of MPICH"
    assert Library.of(fake_mpi(MPICH, (5, 0, 2), (1, 0))).abi == "the MPI standard's ABI 1.0"
    assert Library.of(fake_mpi(OPEN_MPI, (5, 0, 11))).version == "Open MPI v5.0.11"


def test_the_mpirun_beside_a_library_is_named(tmp_path):
    found = Library("MPICH", "MPICH 5", "5.0", "", str(tmp_path / "lib" / "libmpi.so.12"))
    assert found.mpirun == "the mpirun of that library"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "mpirun").touch()
    assert found.mpirun == str(tmp_path / "bin" / "mpirun")


@pytest.mark.parametrize(
    "whole, free, num_ranks, lacks",
    [(8, 8, 2, True), (64, 64, 8, False), (64, 20, 8, False), (64, 64, 9, True), (64, 0, 1, True), (13, 1, 1, False)],
)
def test_shared_memory_is_to_hold_mpis_buffers(monkeypatch, whole, free, num_ranks, lacks):
    status = SimpleNamespace(f_frsize=4096, f_blocks=256 * whole, f_bavail=256 * free)
    monkeypatch.setattr(library.os, "statvfs", lambda path: status)
    found = library.lack_of_room(num_ranks)
    assert bool(found) == lacks
    assert not lacks or f"has {whole} MiB, {free} of them free" in found
    for does_without in (OPEN_MPI, "IBM Spectrum MPI v10.4.0.6, Open MPI ident: 4.0.3rc1"):
        library.require_room(fake_mpi(does_without, (5,)), num_ranks)
    if lacks:
        with pytest.raises(StartError) as error:
            library.require_room(fake_mpi(MPICH, (5,)), num_ranks)
        assert error.value.part == "shared memory" and error.value.of_node
