"""What is made of facts: of machines that are not at hand, too."""

from __future__ import annotations

import pytest

from mpitrain.doctor.findings import bad, exit_code, ok, warn
from mpitrain.doctor.judge_files import (
    FREE,
    HELD,
    judge_directory,
    judge_hdf5,
    judge_locks,
    judge_rename,
)
from mpitrain.doctor.judge_node import (
    Gpus,
    Node,
    Room,
    judge_binding,
    judge_cores,
    judge_gpu_memory,
    judge_gpus,
    judge_memory,
    judge_program,
)
from mpitrain.doctor.judge_speed import judge_links, judge_products, judge_sums
from mpitrain.doctor.report import Report
from mpitrain.observe.console import Console

HOSTS = ["node1", "node1", "node2", "node2"]
MIB = 1 << 20


def test_the_exit_code_is_that_of_the_worst():
    fine, doubtful = ok("a", "x"), warn("b", "y", "z")
    assert exit_code([]) == exit_code([fine, doubtful]) == 0
    assert exit_code([fine, bad("c", "x", "y")]) == 64
    assert exit_code([bad("d", "x", "y", {}, 70), bad("c", "x", "y"), fine]) == 70


BINDINGS = {
    "apart": ([[0, 1], [2, 3]], range(4), "ok"),
    "shared": ([[0, 1, 2, 3]] * 4, range(4), "ok"),
    "all that the job has": ([[4]], [4], "ok"),
    "some are idle": ([[0], [1]], range(64), "warn"),
    "hardware threads, one of each core": ([[0], [1]], [[0, 2], [1, 3]], "ok"),
    "hardware threads, and a core is idle": ([[0], [3]], [[0, 3], [1, 4]], "warn"),
    "more ranks than cores, and all are used": ([[0, 1]] * 8, range(2), "ok"),
    "more ranks than cores, and some are idle": ([[0]] * 8, range(2), "bad"),
    "two on one core, and others are idle": ([[0], [0], [1]], range(4), "bad"),
}


@pytest.mark.parametrize("name", BINDINGS)
def test_ranks_that_crowd_while_cores_are_idle_are_badly_bound(name):
    masks, usable, verdict = BINDINGS[name]
    fine = Node("node1", [[0, 1]], [[0], [1]])
    cores = [core if isinstance(core, list) else [core] for core in usable]
    found = judge_binding([fine, Node("node2", masks, cores)])
    assert found.verdict == verdict and (found.advice == "") == (verdict == "ok")
    assert verdict == "ok" or "of node2 " in found.found


def test_a_crowded_node_comes_before_one_that_is_only_wasteful():
    found = judge_binding([Node("node1", [[0]], [[0], [1]]), Node("node2", [[0], [0]], [[0], [1]])])
    assert (found.verdict, found.found) == (
        "bad", "2 rank(s) of node2 share core(s) 0, while core(s) 1 of this job are idle"
    )  # fmt: skip


@pytest.mark.parametrize(
    "masks, excess, misread, verdict, words",
    [
        ([[0, 1], [2, 3]], 0, "", "ok", "2 a rank, 2 thread(s) each"),
        ([[0, 1]] * 2, 0, "", "ok", "1 a rank"),
        ([[0, 1]] * 8, 0, "", "warn", "8 rank(s) on 2 core(s) of node2, 0.25 a rank"),
        ([[0, 1]], 3, "", "warn", "3 rank(s) have more threads than cores"),
        ([[0, 1]], 0, "many", "warn", "OMP_NUM_THREADS is 'many'"),
    ],
)
def test_too_few_cores_are_told(masks, excess, misread, verdict, words):
    nodes = [Node("node1", [[0, 1]], [[0], [1]]), Node("node2", masks, [[0], [1], [2], [3]])]
    found = judge_cores(nodes, 2, excess, misread)
    assert found.verdict == verdict and words in found.found


def test_ranks_of_other_programs_are_named():
    same = {"mpitrain": "0.1.0 (abc)", "torch": "2.13"}
    assert judge_program([same] * 4, HOSTS).verdict == "ok"
    found = judge_program([same, same, same | {"torch": "2.12"}, same], HOSTS)
    assert (found.verdict, found.found) == ("bad", "rank 2 on node2 has torch 2.12 (on rank 0 2.13)")
    assert "numpy None" in judge_program([same | {"numpy": "2"}, same], HOSTS).found


# Of 1,000,000 parameters in fp32 each of 3 ranks has gradients, and the node weights: 16 MB, beside 64 MiB.
@pytest.mark.parametrize(
    "room, verdict, words",
    [
        (Room("node1", 3, 82 * MIB, ""), "ok", "82 MiB free"),
        (Room("node1", 3, 78 * MIB, ""), "warn", "78 MiB free; a-model takes up to 79 on 3 ranks"),
        (Room("node1", 1, 66 * MIB, ""), "ok", "66 MiB free"),
        (Room("node1", 3, None, ""), "ok", "1,048,576 MiB free"),
        (Room("node1", 3, 1 * MIB, "/dev/shm has 1 MiB; have it made larger"), "bad", "node1: /dev/shm has 1 MiB"),
    ],
)
def test_shared_memory_that_is_short_is_told(room, verdict, words):
    found = judge_memory([Room("node0", 1, 1 << 40, ""), room], "a-model", 10**6, 64 * MIB)
    assert found.verdict == verdict and words in found.found
    assert found.advice == "have it made larger" or verdict != "bad"


def test_windows_may_live_elsewhere():
    found = judge_memory([Room("node1", 3, None, "")], "a-model", 10**6, 64 * MIB)
    assert (found.verdict, found.found) == ("ok", "windows do not live in /dev/shm here, enough for a-model")


def gpus(*taken: str, visible: int = 2) -> list[Gpus]:
    """Ranks that take these, of those that they see."""
    uuids = {f"GPU-{number}": "H200" for number in range(visible)}
    return [Gpus(uuids if name else {}, name, driver=bool(name)) for name in taken]


def test_the_map_of_gpus_is_told_by_uuid():
    found = judge_gpus(gpus("GPU-0", "GPU-1"), HOSTS[:2], "auto")
    assert (found.verdict, found.found) == ("ok", "H200: rank 0 GPU-0, rank 1 GPU-1")


@pytest.mark.parametrize(
    "ranks, wanted, verdict, words",
    [
        (gpus("", "", "", ""), "auto", "ok", "none: ranks compute on cores"),
        (gpus("", "", "", ""), "cuda", "bad", "no GPU on rank(s) 0-3"),
        (gpus("GPU-0", "GPU-1", "", ""), "auto", "bad", "no GPU on rank(s) 2-3 (the first on node2)"),
        (gpus("GPU-0", "GPU-1", "", ""), "cpu", "ok", "as --train.device cpu says"),
        (gpus("GPU-0", "GPU-1", "GPU-0", "GPU-1"), "auto", "warn", "ranks 0, 2 share GPU-0"),
        (gpus("GPU-0", "GPU-1", "GPU-2", "GPU-3", visible=8), "auto", "warn", "4 are idle, GPU-4 among them"),
        ([Gpus({}, "", driver=True)] * 4, "auto", "warn", "node1 has the driver of a GPU, but torch sees none"),
    ],
)
def test_gpus_that_are_missing_shared_or_idle_are_told(ranks, wanted, verdict, words):
    found = judge_gpus(ranks, HOSTS, wanted)
    assert found.verdict == verdict and words in found.found, found


@pytest.mark.parametrize(
    "on_gpu, direct, ranks, verdict",
    [(False, True, 4, "ok"), (True, True, 4, "ok"), (True, False, 1, "ok"), (True, False, 4, "warn")],
)
def test_how_gpu_memory_travels_is_told_with_the_reason(on_gpu, direct, ranks, verdict):
    found = judge_gpu_memory(on_gpu, direct, "the reason", ranks)
    assert found.verdict == verdict and ("the reason" in found.found) == on_gpu


def test_a_directory_that_some_ranks_do_not_see_is_bad():
    fine = judge_directory("/scratch", "lustre", 3 << 30, [True] * 4, HOSTS)
    assert (fine.verdict, fine.found) == ("ok", "/scratch (lustre): seen by all 4 rank(s), 3.0 GiB free")
    found = judge_directory("/tmp", "", 0, [True, True, False, False], HOSTS)
    assert found.verdict == "bad" and "--out on a file system that all nodes share" in found.advice
    assert found.found.startswith("rank 2 on node2 does not see what rank 0 on node1 has written in /tmp (2 of 4")


def test_locks_are_to_keep_others_out():
    assert judge_locks([HELD] * 4, HOSTS).verdict == "ok"
    assert "rank 2 on node2 is not kept out" in judge_locks([HELD, HELD, FREE, HELD], HOSTS).found
    refused = judge_locks([HELD, "Function not implemented"], HOSTS)
    assert (refused.verdict, refused.found) == ("warn", "refused on rank 1 (node1): Function not implemented")


def test_what_is_put_in_place_is_to_be_whole_and_seen():
    assert judge_rename("", []).verdict == "ok"
    assert judge_rename("a fault", []).found == "a fault"
    assert (judge_rename("", [3]).verdict, judge_rename("", [3]).found[:6]) == ("bad", "rank 3")


def test_files_that_are_slow_or_wrong_are_told():
    assert judge_hdf5([200.0 * MIB] * 4, [], 32 * MIB, crowded=False).verdict == "ok"
    slow = [200.0 * MIB, 9.0 * MIB]
    assert judge_hdf5(slow, [], 32 * MIB, crowded=False).verdict == "warn"
    assert judge_hdf5(slow, [], 32 * MIB, crowded=True).verdict == "ok"
    found = judge_hdf5(slow, [1], 32 * MIB, crowded=True)
    assert (found.verdict, found.code) == ("bad", 70) and "rank 1" in found.found


def link(first: int, second: int, latency: float = 2e-6, bandwidth: float = 5e9, right: bool = True) -> dict:
    return {"ranks": [first, second], "latency": latency, "bandwidth": bandwidth, "right": right}


def test_links_that_are_slow_or_wrong_are_told():
    fine = judge_links("node link", [link(0, 1), link(2, 3, bandwidth=3e9)], HOSTS, crowded=False)
    assert (fine.verdict, fine.found) == ("ok", "2.0 us, 3.00 GB/s, the worst of 2 pairs")
    assert judge_links("network link", [], HOSTS, crowded=False).found == "no such pair of ranks in this job"
    gigabit = [link(0, 2, 60e-6, 0.11e9)]
    assert "not TCP" in judge_links("network link", gigabit, HOSTS, crowded=False).advice
    assert judge_links("network link", gigabit, HOSTS, crowded=True).verdict == "ok"
    assert judge_links("node link", [link(0, 1, latency=2e-3)], HOSTS, crowded=False).verdict == "warn"
    found = judge_links("node link", [link(0, 1), link(2, 3, right=False)], HOSTS, crowded=True)
    assert (found.verdict, found.code) == ("bad", 70) and "between rank 2 (node2) and 3 (node2)" in found.found


def test_one_link_that_is_slower_than_the_others_is_named():
    hosts = [f"node{number}" for number in range(5)]
    links = [link(0, 1), link(1, 2), link(2, 3, bandwidth=1.2e9), link(3, 4)]
    found = judge_links("network link", links, hosts, crowded=False)
    assert (found.verdict, found.found) == ("warn", "1.20 GB/s between rank 2 (node2) and 3 (node3), 5.00 elsewhere")


def test_wrong_sums_are_a_fault():
    assert judge_sums(["ring", "MPI"], [1, 3], [], "").found == "ring, MPI: right on 1 to 3 elements"
    assert judge_sums(["ring"], [1, 3], [], "no room").verdict == "warn"
    found = judge_sums(["ring"], [1, 3], [f"ring, {size}" for size in range(4)], "no room")
    assert (found.verdict, found.code, found.found) == ("bad", 70, "wrong: ring, 0, ring, 1, ring, 2, ...")


def test_a_rank_that_multiplies_slowly_is_named():
    rates = {"cpu": [(1e11, 2e11)] * 3 + [(0.9e11, 1.9e11)], "cuda": [(6e14, 7e14)] * 4}
    fine = judge_products("bf16", rates, HOSTS, 4.4)
    told = "390 GFLOP/s on cores, 2,400,000 GFLOP/s on GPUs, all 4 rank(s) at once; 4.4 times as fast as fp32"
    assert (fine.verdict, fine.check, fine.found) == ("ok", "bf16 products", told)
    rates["cuda"][2] = (1e14, 1e14)
    found = judge_products("fp32", rates, HOSTS, None)
    assert (found.verdict, found.found) == ("warn", "rank 2 on node2 multiplies at 0.14 of the usual rate")


@pytest.mark.parametrize("columns", [80, 120])
def test_lines_are_as_long_as_they_may_be(monkeypatch, capsys, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    words = "found " * 40
    Report(Console(loud=True)).add([ok("a check", words.strip()), warn("another", "is short", words.strip())])
    lines = capsys.readouterr().out.splitlines()
    assert columns - 6 < max(map(len, lines)) <= columns
    assert [line[:19] for line in lines if line[:1] != " "] == ["ok   a check       ", "warn another       "]
    assert all(line[19] != " " for line in lines)
    text = " ".join(line[19:] for line in lines)
    assert text == f"{words}is short -> {words.strip()}"
