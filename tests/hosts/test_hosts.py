"""Hosts with a network between them: the same numbers, a slow or cut link, a host whose ranks die."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
from hosts import Hosts, obstacle
from launching import begin, finish
from tiny import exit_of, make_tiny, processes_of

pytestmark = pytest.mark.hosts
SECONDS = 30  # until a job must have ended
LIMIT = 180  # for what takes seconds where cores are free
# Launchers do not hand all variables on to other hosts.
AS_RANK = "import os; os.environ['MPITRAIN_FAILPOINT'] = {!r}; from mpitrain.cli import main; main()"
SCRIPT = str(Path(__file__).parents[1] / "support" / "train_on_hosts.py")


@pytest.fixture(scope="module")
def hosts():
    found = obstacle()
    if found:
        pytest.skip(f"reason: {found}")
    with Hosts(4) as four:
        yield four


def progress(place: Path) -> int:
    """Steps begun."""
    text = (place / "progress").read_text() if (place / "progress").exists() else ""
    return int(text or 0)


def wait_for_step(step: int, place: Path, process) -> None:
    limit = time.monotonic() + LIMIT
    while progress(place) < step:
        assert process.poll() is None and time.monotonic() < limit, finish(process, 1)
        time.sleep(0.02)


def numbers_of(done) -> dict:
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for together, alone in (found["losses"], found["grad_norms"]):
        assert together == pytest.approx(alone, rel=1e-5)
    return found


@pytest.mark.parametrize("ranks", [(1, 1, 1, 1), (2, 2, 2, 2), (3, 2, 1)], ids=str)
def test_training_over_hosts_gives_the_numbers_of_one_rank_and_shares_memory_inside_a_host_only(hosts, tmp_path, ranks):
    done = finish(begin(hosts.command(ranks, SCRIPT, "10", cwd=tmp_path), tmp_path), LIMIT)
    found = numbers_of(done)
    assert found["places"] == [[f"host{number}", count] for number, count in enumerate(ranks, 1) for _ in range(count)]
    if max(ranks) > 1:
        assert found["why"] == "node: gradients and weights in shared memory, rings between nodes"
    else:
        assert found["why"] == "ring: messages between all replicas (no two replicas on one node)"


def test_doctor_finds_a_slow_network_and_a_directory_that_hosts_do_not_share(hosts, tmp_path):
    words = ("-m", "mpitrain", "doctor", "--json", "--out", "/dev/shm/run")  # of each host its own
    done = finish(begin(hosts.command((2, 1), *words, cwd=tmp_path), tmp_path), LIMIT)
    assert done.returncode == 64, done.stdout + done.stderr
    document = json.loads(done.stdout)
    checks = {check["check"]: check for check in document["checks"]}
    assert [name for name, check in checks.items() if check["verdict"] == "bad"] == ["run directory"]
    seen, (link,) = checks["run directory"]["facts"]["seen"], checks["network link"]["facts"]["links"]
    assert seen == [True, True, False] and "rank 2 on host2 does not see" in checks["run directory"]["found"]
    assert link["ranks"] == [0, 2] and 0.2e8 < link["bandwidth"] < 1.3e8, "of 1.25e8 bytes a second"
    assert checks["network link"]["verdict"] == "warn" or checks["cores"]["verdict"] == "warn"
    assert checks["node link"]["facts"]["links"][0]["ranks"] == [0, 1]


def test_ranks_of_two_hosts_share_no_layers_unless_that_is_asked_for(hosts, tmp_path):
    program = ("-m", "mpitrain", *make_tiny(tmp_path), "--train.max_steps", "2", "--mesh.tensor", "2")
    done = finish(begin(hosts.command((1, 1), *program, "--out", "refused", cwd=tmp_path), tmp_path), LIMIT)
    assert done.returncode == 64, done.stdout + done.stderr
    assert "some of them on different nodes (of 1 ranks)" in done.stdout + done.stderr
    across = (*program, "--mesh.tensor_across_nodes", "true")
    by_node = (*across, "--comm.algorithm", "node", "--out", "by-node")
    done = finish(begin(hosts.command((1, 1), *by_node, cwd=tmp_path), tmp_path), LIMIT)
    assert done.returncode == 64 and "ring would work" in done.stdout + done.stderr
    asked = (*across, "--out", "asked")
    done = finish(begin(hosts.command((1, 1), *asked, cwd=tmp_path), tmp_path), LIMIT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 data x 1 pipe x 2 tensor, tensor groups send messages" in done.stdout


def test_the_benchmark_runs_over_hosts_and_counts_them(hosts, tmp_path):
    bench = ("-m", "mpitrain", "bench", "allreduce", "--kib", "64", "--repeats", "2", "--out", str(tmp_path))
    done = finish(begin(hosts.command((2, 2, 2, 2), *bench, cwd=tmp_path), tmp_path), LIMIT)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "allreduce-8.json").read_text())
    assert (found["ranks"], found["nodes"]) == (8, 4)
    assert {row["contender"] for row in found["seconds"]} == {"node", "ring", "ring16", "native", "MPI", "gloo"}


def test_a_host_whose_ranks_are_killed_ends_the_job_on_all_hosts(hosts, tmp_path):
    mark = {"TEST_MARK": f"hosts-{os.getpid()}"}
    process = begin(hosts.command((1, 2, 1), SCRIPT, "100000", cwd=tmp_path), tmp_path, **mark)
    wait_for_step(5, tmp_path, process)
    everything = processes_of(f"TEST_MARK={mark['TEST_MARK']}")
    victims = [pid for pid in hosts.processes("host2") if SCRIPT in everything.get(pid, [])]
    assert len(victims) >= 2, "no ranks there to kill"
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    done = finish(process, SECONDS)
    assert done.returncode != 0, done.stdout + done.stderr
    limit = time.monotonic() + SECONDS
    while left := [pid for name in hosts.names for pid in hosts.processes(name)]:
        assert time.monotonic() < limit, left
        time.sleep(0.1)


def test_a_rank_that_is_stopped_is_named_by_its_own_host(hosts, tmp_path):
    program = ("-m", "mpitrain", *make_tiny(tmp_path), "--out", "run", "--runtime.hang_timeout", "5")
    line = hosts.command((2, 2), "-c", AS_RANK.format("reduce:3:2=stop"), *program[2:], cwd=tmp_path)
    done = finish(begin(line, tmp_path), LIMIT)
    assert done.returncode != 0
    assert exit_of(tmp_path / "run")["code"] == 70
    assert re.search("1 of 2 ranks on host2 are at: step 2, ", done.stderr), done.stderr
    assert re.search(r"^  rank 3: step 2, .*: stopped by a signal", done.stderr, re.M), done.stderr
    assert re.search("2 of 2 ranks on host1 are at: step 2, ", done.stderr), done.stderr


def test_other_hosts_know_that_a_rank_works_long(hosts, tmp_path):
    program = (*make_tiny(tmp_path), "--train.max_steps", "2", "--runtime.hang_timeout", "5")
    line = hosts.command((2, 1, 1), "-c", AS_RANK.format("save.slices:0:1=work12"), *program, cwd=tmp_path)
    done = finish(begin(line, tmp_path), LIMIT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "save.slices on rank 0, visit 1: work" in done.stderr


def test_a_link_that_is_cut_for_three_seconds_changes_no_number(hosts, tmp_path):
    process = begin(hosts.command((1, 1, 1), SCRIPT, "60", "0.1", cwd=tmp_path), tmp_path)
    wait_for_step(5, tmp_path, process)
    hosts.cut("host2")
    time.sleep(1)  # a step that was under way may still end
    before = progress(tmp_path)
    time.sleep(2)
    stood_still = progress(tmp_path) == before
    hosts.heal("host2")
    found = numbers_of(finish(process, LIMIT))
    assert stood_still and 5 <= before < 59, "the link was not cut while they trained"
    assert len(found["losses"][0]) == 60
