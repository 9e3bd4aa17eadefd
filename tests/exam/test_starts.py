"""Cases 18, 19 and 28 to 32: ranks that do not belong together, and places that are not what they should be."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from examining import Exam, steps_of
from launching import BIN, command
from tiny import exit_of, make_tiny, metrics_of, ranks_of

import mpitrain
from mpitrain.errors import ExitCode
from mpitrain.runtime.launch import library_version

PACKAGE = Path(mpitrain.__file__).parent
MPIRUN = str(BIN / "mpirun")


def two_ranks(first: list[str], second: list[str]) -> list[str]:
    """A command line for rank 0 and one for rank 1, under one mpirun."""
    return [MPIRUN, "-np", "1", *first, ":", "-np", "1", *second]


def refused(reference: Exam, out: str, line: list[str], code: int, **environment: str) -> str:
    """What was said by a job that must end at once, with a code, and must not have made its directory."""
    done = reference.begin_line(out, line, **environment).end()
    assert done.returncode == code and "Traceback" not in done.stderr, done.stdout + done.stderr
    assert not (reference.place / out).exists()
    return str(done.stderr)


@pytest.mark.case(18)
@pytest.mark.parametrize(
    "what, flag, said",
    [
        ("seed", "--train.seed=7", "--train.seed: 7 on rank 1"),
        ("run directory", "--out=elsewhere", "--out: elsewhere on rank 1"),
        ("time-out", "--runtime.hang_timeout=99", "--runtime.hang_timeout: 99.0 on rank 1"),
    ],
)
def test_a_rank_that_was_told_something_else_is_named(reference: Exam, told, what, flag, said):
    words = command(0, *reference.words("told"))
    found = refused(reference, "told", two_ranks(words, [*words, flag]), ExitCode.USAGE)
    assert said in found and " on rank 0 (" in found, found
    told(f"another {what} on rank 1", "refused with the difference, exit code 64, no directory")


@pytest.mark.case(18)
def test_a_rank_with_other_code_is_named(reference: Exam, told):
    other = reference.place / "other-code"
    shutil.copytree(PACKAGE, other / "mpitrain", ignore=shutil.ignore_patterns("__pycache__"))
    with (other / "mpitrain" / "split.py").open("a") as file:
        file.write("# patched\n")
    words = command(0, *reference.words("patched"))
    line = two_ranks(words, ["env", f"PYTHONPATH={other}", *words])
    found = refused(reference, "patched", line, ExitCode.USAGE)
    assert "the program: ranks differ" in found and "mpitrain: " in found and "on rank 1" in found, found
    told("one line of the code is another on rank 1", "refused with the hashes, exit code 64, no directory")


@pytest.mark.case(18)
@pytest.mark.parametrize("what", ["data", "model"])
def test_a_rank_that_finds_other_files_under_the_same_name_is_named(reference: Exam, told, what):
    reference.reference(2)
    shards = next(reference.place.glob("cache/**/dataset.json")).parent
    places = [reference.place / f"{what}-{rank}" for rank in range(2)]
    for place in places:
        shutil.copytree(shards, place / "shards")
        shutil.copy(reference.place / "tiny.toml", place / "card.toml")
    if what == "model":
        with (places[1] / "card.toml").open("a") as file:
            file.write("layer_norm_eps = 1e-5\n")
        code, said = ExitCode.BAD_DATA, "layer_norm_eps: 1e-05 on rank 1"
    else:
        made = make_tiny(reference.place / "other-text")
        text = reference.place / "other-text" / "corpus" / "train.conll"
        text.write_text(text.read_text()[:-200].rpartition("\n\n")[0] + "\n")
        line = command(1, "-m", "mpitrain", "prepare", *made[:6], "--out", "other-shards")
        assert reference.begin_line("other-shards", line).end().returncode == 0
        shutil.rmtree(places[1] / "shards")
        (reference.place / "other-shards").rename(places[1] / "shards")
        shutil.copy(shards / "tokenizer.json", places[1] / "shards")
        code, said = ExitCode.BAD_DATA, "sha256 of dataset.json: "
    out = str(reference.place / f"other-{what}")
    words = command(0, *reference.words(out, settings=("--model", "card.toml", "--data", "shards")))
    line = [MPIRUN, "-np", "1", "-wdir", str(places[0]), *words, ":", "-np", "1", "-wdir", str(places[1]), *words]
    found = refused(reference, out, line, code)
    assert said in found or "tokenizer.json" in found, found
    told(f"another {what} under the same name on rank 1", "refused with the difference, exit code 65, no directory")


@pytest.mark.case(19)
def test_a_run_directory_that_not_all_ranks_see_is_refused(reference: Exam, told):
    elsewhere = reference.place / "elsewhere"
    elsewhere.mkdir()
    words = command(0, *reference.words("unshared"))
    done = reference.begin_line("unshared", [MPIRUN, "-np", "1", *words, ":", "-np", "1", "-wdir", elsewhere, *words])
    ended = done.end()
    assert ended.returncode == ExitCode.USAGE, ended.stderr
    assert f"--out {elsewhere / 'unshared'}: rank 1 on " in ended.stderr and "all nodes share" in ended.stderr
    assert not (elsewhere / "unshared").exists() and not metrics_of(done.run)
    told("a run directory that rank 1 does not see", "refused with rank and node, exit code 64, before step 1")


@pytest.mark.case(30)
def test_ranks_of_another_mpi_are_refused(reference: Exam, told):
    """What a rank sees under the launcher of the other family: its variables, and a world of one."""
    variable = "OMPI_COMM_WORLD_SIZE" if "MPICH" in library_version() else "MPI_LOCALNRANKS"
    line = command(0, *reference.words("foreign"))
    found = refused(reference, "foreign", line, ExitCode.USAGE, **{variable: "2"})
    assert "the launcher started 2 ranks, but MPI sees a world of 1" in found
    told(f"{variable}=2 and a world of 1", "refused, exit code 64, no directory")


@pytest.mark.case(30)
def test_fewer_ranks_than_the_mesh_has_are_refused(reference: Exam, told):
    line = command(2, *reference.words("half", settings=("--mesh.data", "2", "--mesh.pipe", "2")))
    found = refused(reference, "half", line, ExitCode.USAGE)
    assert "2 data x 2 pipe x 1 tensor = 4, but there are 2 ranks" in found
    told("2 ranks for a mesh of 4", "refused with the arithmetic, exit code 64, no directory")


@pytest.mark.case(31)
def test_a_second_job_is_refused_and_the_lock_of_a_dead_one_is_not(reference: Exam, told):
    reference.reference(2)
    first = reference.begin(2, "shared", MPITRAIN_FAILPOINT="forward:0:5=sleep30", SLURM_JOB_ID="17")
    first.wait_until(lambda: bool(metrics_of(first.run)))
    second = reference.run(2, "shared")
    assert second.returncode == ExitCode.USAGE
    holder = f"another job writes to it (process {ranks_of(first.mark)[0]} on "
    assert holder in second.stderr and ", job 17)" in second.stderr, second.stderr
    os.kill(ranks_of(first.mark)[0], signal.SIGKILL)
    first.end()
    reference.finish(2, "shared", max(steps_of(first.run), default=0))
    told("a second job in the directory of the first", "refused with host, process and job; after its death taken up")


@pytest.mark.case(32)
def test_a_run_directory_that_vanishes_ends_the_job(reference: Exam, told):
    attempt = reference.begin(2, "vanished", MPITRAIN_FAILPOINT="forward:0:7=sleep1")
    attempt.wait_until(lambda: len(metrics_of(attempt.run)) == 3)
    attempt.run.rename(reference.place / "gone")
    done = attempt.end()
    assert done.returncode == ExitCode.FAULT and "Traceback" not in done.stderr, done.stderr
    assert "vanished" in done.stderr and "cannot be written: No such file or directory" in done.stderr
    told("the run directory deleted at step 4", "exit code 70, said so")


@pytest.mark.case(32)
def test_a_run_directory_that_can_only_be_read_is_refused(reference: Exam, told):
    place = reference.place / "read-only"
    place.mkdir()
    line = command(2, *reference.words("read-only"))
    if os.geteuid() == 0:  # who may write everywhere, but not to a file system that takes nothing
        line = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs -o ro none {place} && exec "$@"', "sh", *line]
    place.chmod(0o555)
    done = reference.begin_line("read-only", line).end()
    assert done.returncode == ExitCode.USAGE and "Traceback" not in done.stderr, done.stderr
    assert "--out read-only: " in done.stderr and "give a path that can be written" in done.stderr
    told("a run directory that can only be read", "refused, exit code 64")


@pytest.mark.case(29)
def test_nobody_reads_what_the_job_says(reference: Exam, told):
    reference.reference(2)
    line = command(2, *reference.words("unread"))
    attempt = reference.begin_line("unread", ["sh", "-c", '"$@" | head -1', "sh", *line])
    attempt.end(10 + reference.seconds[2])
    steps = steps_of(attempt.run)  # all of them if mpirun takes it well
    reference.finish(2, "unread", max(steps, default=0))
    told("output into `head -1`", f"all gone, went on from {steps}, bit-equal")


@pytest.mark.case(29)
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGKILL])
def test_a_terminal_is_closed_or_the_launcher_killed(reference: Exam, told, number):
    reference.reference(2)
    out = f"launcher-{number.name}"
    attempt = reference.begin(2, out)
    attempt.wait_until(lambda: len(metrics_of(attempt.run)) >= 2)
    began = time.monotonic()
    if number == signal.SIGHUP:
        os.killpg(attempt.process.pid, number)  # all of a terminal's processes get it
    else:
        os.kill(attempt.process.pid, number)
    attempt.end(10)
    took = time.monotonic() - began
    steps = steps_of(attempt.run)
    reference.finish(2, out, max(steps, default=0))
    told(
        f"{number.name} to {'all' if number == signal.SIGHUP else 'mpirun'}", f"all gone after {took:.1f} s, bit-equal"
    )


SMALL_MEMORY = """
import resource, sys, torch
from mpitrain import cli
from mpitrain.pipeline.executor import Executor
from mpitrain.runtime.agree import MPI

forward = Executor._forward
def forward_with_little_memory(self, *arguments):
    if MPI.COMM_WORLD.rank == 1:
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)
        hoard = [torch.ones(1 << 22) for _ in range(1000)]
    return forward(self, *arguments)

Executor._forward = forward_with_little_memory
cli.main(sys.argv[1:])
"""


@pytest.mark.case(28)
def test_a_rank_without_memory_is_named(reference: Exam, told):
    script = reference.place / "small.py"
    script.write_text(SMALL_MEMORY)
    done = reference.run(2, "small", str(script))
    assert done.returncode == ExitCode.FAULT, done.stderr
    assert "error (rank 1): out of memory on " in done.stderr, done.stderr
    assert exit_of(reference.place / "small")["code"] == 70
    told("64 MiB more are all that rank 1 may have", "named as out of memory, exit code 70")
