"""What is wrong with a machine or a start is found, told once, and never waited for; a sound one is let through."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from launching import BIN, begin, command, finish, mpitrain
from tiny import processes_of

from mpitrain.runtime.launch import library_version

CHECKS = {
    "MPI", "threads", "launcher", "program", "binding", "cores", "shared memory", "GPUs", "GPU memory",
    "run directory", "locks", "rename", "HDF5", "node link", "network link", "sums", "fp32 products", "bf16 products",
}  # fmt: skip
USAGE, FAULT = 64, 70
NO_HANG = 30  # seconds in which all processes must be gone
IS_MPICH = "MPICH" in library_version()

# As launchers do, it ends all ranks when one has failed; and the first comes last.
LAUNCHER = """
import os, subprocess, sys, time
variables, line = dict(word.split("=", 1) for word in sys.argv[2].split()), sys.argv[3:]
ranks = []
for rank in reversed(range(int(sys.argv[1]))):
    time.sleep(2 * (rank == 0))
    told = {name: value.replace("RANK", str(rank)) for name, value in variables.items()}
    ranks.append(subprocess.Popen(line, env=os.environ | told))
while not any(rank.poll() for rank in ranks) and any(rank.poll() is None for rank in ranks):
    time.sleep(0.05)
for rank in ranks:
    rank.terminate()
sys.exit(max(rank.wait() for rank in ranks))
"""
OF_OPEN_MPI = "OMPI_COMM_WORLD_SIZE=3 OMPI_COMM_WORLD_RANK=RANK"
OF_MPICH = "PMI_SIZE=3 PMI_RANK=RANK MPI_LOCALNRANKS=3 MPI_LOCALRANKID=RANK"

# Starts doctor where rank 1, or whoever it is, has been done something to.
SCRIPT = """
import errno, fcntl, os, signal, sys, time
from mpitrain import cli
from mpitrain.comm import native
from mpitrain.doctor import files, node
from mpitrain.runtime.agree import MPI

def on_rank_1(misfortune):
    def have(*arguments):
        if MPI.COMM_WORLD.rank == 1:
            misfortune()
        return [[0]]
    return have

def raise_(error):
    raise error

{misfortune}
cli.main(sys.argv[1:])
"""


def examined(done: Any) -> tuple[dict[str, str], dict[str, Any]]:
    """The verdict of each check, and the whole document."""
    document = json.loads(done.stdout)
    assert document["exit_code"] == done.returncode and document["healthy"] == (done.returncode == 0)
    return {check["check"]: check["verdict"] for check in document["checks"]}, document


def words_of(document: dict[str, Any], name: str) -> str:
    """What was found by a check, and what to do."""
    return next(f"{check['found']} -> {check['advice']}" for check in document["checks"] if check["check"] == name)


def run(line: list[str], cwd: Path, timeout: float = 120, **environment: str) -> Any:
    return finish(begin(line, cwd, **environment), timeout)


def doctor(ranks: int, *arguments: str) -> list[str]:
    return command(ranks, "-m", "mpitrain", "doctor", "--json", *arguments)


@pytest.mark.parametrize("ranks", [0, 1, 2, 4])
def test_a_sound_machine_is_let_through_and_nothing_is_left_behind(tmp_path, ranks):
    done = run(doctor(ranks, "--out", "run"), tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    verdicts, document = examined(done)
    assert set(verdicts) == CHECKS and "bad" not in verdicts.values()
    assert {name for name, verdict in verdicts.items() if verdict == "warn"} <= {
        "cores", "binding", "shared memory", "HDF5", "node link", "fp32 products", "bf16 products", "sums",
    }, document  # fmt: skip
    assert document["ranks"] == max(1, ranks) and document["nodes"] == 1
    assert ("MPICH" if IS_MPICH else "Open MPI") in words_of(document, "MPI")
    assert "right on 1 to 1,000,003 elements" in words_of(document, "sums")
    assert list(tmp_path.iterdir()) == []


def test_a_file_holds_lines_of_80_columns_without_colours(tmp_path):
    done = mpitrain(2, "doctor", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80 and "\x1b" not in done.stdout
    assert {line[5:19].strip() for line in lines if re.match("ok|warn|bad", line)} == CHECKS
    assert all(re.match(r"(ok  |warn|bad ) |doctor   healthy: \d+ ok| {19}\S", line) for line in lines), done.stdout


@pytest.mark.parametrize("variables", ["PMIx", "world of 1"] if IS_MPICH else ["world of 1"])
@pytest.mark.parametrize("as_json", [True, False])
def test_a_launcher_of_another_family_is_told_once(tmp_path, variables, as_json):
    """What ranks find under the mpirun of the other family; under PMIx alone MPICH's start would end them."""
    told = OF_OPEN_MPI if IS_MPICH else OF_MPICH
    told += " PMIX_NAMESPACE=prterun-1 PMIX_RANK=RANK" if variables == "PMIx" else ""
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    line = [*command(0, "launcher.py", "3", told), *doctor(0)]
    done = run(line if as_json else [word for word in line if word != "--json"], tmp_path)
    assert done.returncode == USAGE, done.stdout + done.stderr
    if as_json:
        verdicts, document = examined(done)
        assert verdicts == {"launcher": "bad"}
        text = words_of(document, "launcher")
    else:
        text = " ".join(done.stdout.split())
        assert len(re.findall("^bad +launcher", done.stdout, re.M)) == 1, done.stdout
    reason = "it speaks PMIx" if "PMIX" in told else "MPI sees a world of 1"
    assert f"the launcher started 3 ranks, but {reason}" in text and "do not belong together" in text
    assert ("Open MPI's mpirun and" if IS_MPICH else "Hydra") in text


def test_one_core_for_eight_ranks_is_found(tmp_path):
    core = str(min(os.sched_getaffinity(0)))
    done = run(["taskset", "--cpu-list", core, *doctor(8)], tmp_path, timeout=300)
    assert done.returncode == USAGE, done.stdout + done.stderr
    verdicts, document = examined(done)
    assert (verdicts["binding"], verdicts["cores"]) == ("bad", "warn") and len(verdicts) == len(CHECKS)
    assert re.match(
        rf"8 rank\(s\) of \S+ share core\(s\) {core}, while core\(s\) .* idle", words_of(document, "binding")
    )


SMALL = 'mount -t tmpfs -o size=8m none /dev/shm && exec "$@"'
SEEMS_SMALL = """
import os
before = os.statvfs
def statvfs(path):
    found = list(before(path))
    if str(path) == "/dev/shm":
        found[1:5] = 4096, 2048, 2048, 2048
    return os.statvfs_result(found)
os.statvfs = statvfs
"""


@pytest.mark.parametrize("way", ["mounted", "told"] if os.geteuid() == 0 else ["told"])
def test_tiny_shared_memory_is_found(tmp_path, way):
    line, environment = doctor(2), {}
    if way == "mounted":
        line = ["unshare", "--mount", "sh", "-c", SMALL, "sh", *line]
    else:
        (tmp_path / "sitecustomize.py").write_text(SEEMS_SMALL)
        environment = {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    done = run(line, tmp_path, **environment)
    assert done.returncode == USAGE, done.stdout + done.stderr
    verdicts, document = examined(done)
    assert verdicts["shared memory"] == "bad" and list(verdicts.values()).count("bad") == 1
    assert set(verdicts) == ({"shared memory"} if IS_MPICH else CHECKS), "MPICH would crash at its start"
    assert "/dev/shm has 8 MiB" in words_of(document, "shared memory")


def test_a_directory_that_not_all_ranks_see_is_found(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    words = doctor(0)
    mpirun = [str(BIN / "mpirun"), "-np", "1", *words, ":", "-np", "1", "-wdir", str(tmp_path / "elsewhere"), *words]
    done = run(mpirun, tmp_path)
    assert done.returncode == USAGE, done.stdout + done.stderr
    verdicts, document = examined(done)
    assert verdicts["run directory"] == "bad" and set(verdicts) == CHECKS
    assert re.search(rf"rank 1 on \S+ does not see what rank 0 .* in {tmp_path} ", words_of(document, "run directory"))
    assert list(tmp_path.rglob("*")) == [tmp_path / "elsewhere"]


def test_a_directory_that_cannot_be_written_is_found(tmp_path):
    (tmp_path / "file").write_text("")
    line = doctor(2, "--out", "file/run")
    if os.geteuid() == 0:  # who may write everywhere, but not to a file system that takes nothing
        line = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs -o ro none {tmp_path} && exec "$@"', "sh", *line]
    tmp_path.chmod(0o555)
    done = run(line, tmp_path)
    tmp_path.chmod(0o755)
    assert done.returncode == USAGE, done.stdout + done.stderr
    verdicts, document = examined(done)
    assert verdicts["run directory"] == "bad" and verdicts["HDF5"] == "warn" and set(verdicts) == CHECKS
    assert "--out" in words_of(document, "run directory") and "can be written" in words_of(document, "run directory")


@pytest.mark.parametrize("out, said", [("file", "Not a directory"), ("file/run", "Not a dir"), ("full", "holds other")])
def test_what_a_run_could_not_be_written_to_is_found(tmp_path, out, said):
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    done = run(doctor(2, "--out", out), tmp_path)
    assert done.returncode == USAGE, done.stdout + done.stderr
    verdicts, document = examined(done)
    assert verdicts["run directory"] == "bad" and set(verdicts) == CHECKS
    assert f"--out {out}: {said}" in words_of(document, "run directory")


def test_a_full_disk_is_told_with_what_would_do(tmp_path):
    mount = f'mount -t tmpfs -o size=2m none {tmp_path} && cd {tmp_path} && exec "$@"'
    line = ["unshare", "--mount", "sh", "-c", mount, "sh", *doctor(2, "--out", "run")]
    if os.geteuid() != 0:
        line = ["unshare", "--user", "--map-root-user", *line[1:]]
    done = run(line, tmp_path)
    assert done.returncode == USAGE, done.stdout + done.stderr
    verdicts, document = examined(done)
    assert verdicts["rename"] == "ok" and verdicts["HDF5"] == "bad"
    assert "No space left on device -> give a path that can be written" in words_of(document, "HDF5")


def patched(tmp_path: Path, ranks: int, misfortune: str, *arguments: str, timeout: float = 90) -> Any:
    """What became of doctor after a line of Python, all processes of which must be gone."""
    (tmp_path / "patched.py").write_text(SCRIPT.format(misfortune=misfortune))
    mark = f"doctor-{os.getpid()}-{tmp_path.name}"
    line = command(ranks, "patched.py", "doctor", "--json", *arguments)
    done = run(line, tmp_path, timeout, TEST_MARK=mark)
    limit = time.monotonic() + NO_HANG
    while left := processes_of(f"TEST_MARK={mark}"):
        assert time.monotonic() < limit, left
        time.sleep(0.05)
    return done


def test_locks_that_are_refused_are_found(tmp_path):
    refuse = "fcntl.flock = lambda *arguments: raise_(OSError(errno.ENOLCK, 'No locks available'))"
    done = patched(tmp_path, 2, refuse)
    assert done.returncode == 0, done.stdout + done.stderr  # a training does without
    verdicts, document = examined(done)
    assert verdicts["locks"] == "warn" and "No locks available" in words_of(document, "locks")


def test_locks_that_keep_nobody_out_are_found(tmp_path):
    done = patched(tmp_path, 2, "fcntl.flock = lambda *arguments: None")
    verdicts, document = examined(done)
    assert verdicts["locks"] == "warn" and "is not kept out" in words_of(document, "locks")


def test_a_sum_that_is_wrong_is_found(tmp_path):
    done = patched(tmp_path, 3, "native.all_reduce = lambda comm, flat: flat.add_(1) if comm.rank == 1 else None")
    assert done.returncode == FAULT, done.stdout + done.stderr
    verdicts, document = examined(done)
    assert verdicts["sums"] == "bad" and words_of(document, "sums").startswith("wrong: MPI, 1 of float32 on rank 1, ")


def test_a_rank_of_other_code_is_named(tmp_path):
    done = patched(tmp_path, 2, "node.program = lambda: dict(mpitrain=str(MPI.COMM_WORLD.rank), torch='2')")
    assert done.returncode == USAGE, done.stdout + done.stderr
    verdicts, document = examined(done)
    assert verdicts["program"] == "bad"
    assert re.match(r"rank 1 on \S+ has mpitrain 1 \(on rank 0 0\)", words_of(document, "program"))


def test_a_check_that_fails_on_one_rank_is_told_and_the_others_go_on(tmp_path):
    done = patched(tmp_path, 2, "node.usable_cores = on_rank_1(lambda: raise_(ValueError('no such core')))")
    assert done.returncode == FAULT, done.stdout + done.stderr
    verdicts, document = examined(done)
    assert verdicts["binding"] == "bad" and verdicts["cores"] == "warn" and set(verdicts) == CHECKS
    assert "rank 1, while looking at cores: ValueError: no such core" in words_of(document, "binding")


def test_a_check_that_fails_is_told_at_its_own_line(tmp_path):
    done = patched(tmp_path, 2, "files._rename = lambda *arguments: raise_(OSError('no such thing'))")
    assert done.returncode == FAULT, done.stdout + done.stderr
    verdicts, document = examined(done)
    assert [verdicts[name] for name in ("run directory", "locks", "rename", "HDF5")] == ["ok", "ok", "bad", "warn"]
    assert "OSError: no such thing" in words_of(document, "rename") and set(verdicts) == CHECKS


@pytest.mark.parametrize(
    "misfortune, said",
    [
        ("time.sleep(1000)", "no rank has made progress for 3 s"),
        ("sys.exit(3)", "rank 1"),
        ("os.kill(os.getpid(), signal.SIGKILL)", ""),
    ],
)
def test_no_rank_waits_for_one_that_does_not_come(tmp_path, misfortune, said):
    patch = f"node.usable_cores = on_rank_1(lambda: {misfortune})"
    done = patched(tmp_path, 3, patch, "--runtime.hang_timeout", "3")
    assert done.returncode != 0 and said in done.stderr, done.stdout + done.stderr
    assert '"healthy": true' not in done.stdout


def test_help_tells_of_it():
    done = finish(begin([sys.executable, "-m", "mpitrain", "doctor", "--help"], Path.cwd()), 60)
    assert done.returncode == 0 and "--json" in done.stdout
