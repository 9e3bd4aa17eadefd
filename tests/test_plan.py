"""`plan` tells of ranks that are not there which meshes they can be and what those would do, and draws the schedule."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from launching import mpitrain
from tiny import make_tiny

from mpitrain.machine import read_machine

MACHINE = "ranks_per_node = 8\nprocessors_per_node = 8\nmemory_gib_per_node = 64\ngflops = 50\n"
FILE = ("--machine", "machine.toml")
SHAPE = (
    "--ranks",
    "8",
    "--mesh.pipe",
    "4",
    "--mesh.tensor",
    "1",
    "--model",
    "bert-base-cased",
    "--train.micro_batches",
    "8",
    *FILE,
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return {"MPITRAIN_CACHE": str(tmp_path_factory.mktemp("cache"))}


@pytest.fixture
def place(tmp_path) -> Path:
    (tmp_path / "machine.toml").write_text(MACHINE)
    return tmp_path


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_plan_of_a_job_is_shown_without_it(place, cache, ranks):
    flags = ("--pipeline.schedule", "zb-v", "--pipeline.balance", "measured")
    done = mpitrain(ranks, "plan", *SHAPE, *flags, cwd=place, **cache)
    assert done.returncode == 0, done.stderr
    assert "a plan splits the model by estimated cost" in done.stdout + done.stderr
    assert done.stdout.count("8 rank(s) = 2 data x 4 pipe") == 1
    line = f"run      mpirun -np 8 python -m mpitrain --model bert-base-cased --train.micro_batches 8 {' '.join(flags)}"
    assert f"{line} --mesh.data 2 --mesh.pipe 4 --mesh.tensor 1\n" in done.stdout
    assert "zb-v, up to 4 micro-batches a replica and step" in done.stdout
    sizes = [int(size.replace(",", "")) for size in re.findall(r"^\d .*?  +([\d,]{9,})", done.stdout, re.MULTILINE)]
    assert len(sizes) == 4
    own_pieces, own_labels = 28996 - 1426, 9 - 7  # those of the sample, cased
    assert sum(sizes) == 107_726_601 - 768 * own_pieces - 769 * own_labels, "of bert-base-cased with nine labels"
    assert [file.name for file in place.iterdir()] == ["machine.toml"]


def test_the_schedule_is_drawn_on_the_terminal_and_into_files(place, cache):
    flags = (*SHAPE, "--pipeline.schedule", "zb-h1", "--show-schedule", "--out", "drawn")
    done = mpitrain(1, "plan", *flags, cwd=place, **cache)
    assert done.returncode == 0, done.stderr
    lines = re.findall(r"^stage (\d)  ([0-3a-dA-D.]+)$", done.stdout, re.MULTILINE)
    assert [stage for stage, _ in lines] == ["0", "1", "2", "3"]
    for _, line in lines:
        assert set("0123abcdABCD") <= set(line)
    assert (place / "drawn" / "schedule.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (place / "drawn" / "schedule.svg").read_text()


@pytest.mark.parametrize("ranks", [0, 2])
def test_what_does_not_fit_is_said_before_anything_is_measured(place, cache, ranks):
    done = mpitrain(ranks, "plan", "--ranks", "4", "--mesh.pipe", "3", cwd=place, **cache)
    assert done.returncode == 64 and "measure" not in done.stdout
    assert "error: --mesh.pipe 3: of 4 ranks no such mesh can be made" in done.stderr


def test_a_bad_machine_ends_all_ranks_of_plan_and_train(place, cache):
    (place / "machine.toml").write_text(MACHINE.replace("8", "0"))
    for words in (["plan"], [*make_tiny(place / "tiny"), "--out", "run"]):
        done = mpitrain(3, *words, *FILE, cwd=place, **cache)
        assert done.returncode == 64 and done.stderr.count("ranks_per_node: input should be greater than 0") == 1


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_plan_measures_this_job_and_the_run_is_compared_with_it(place, cache, ranks):
    words = make_tiny(place / "tiny")
    done = mpitrain(ranks, "plan", *words, "--out", "made", cwd=place, **cache)
    assert done.returncode == 0, done.stderr
    meshes = {
        mesh: [float(n.replace(",", "")) for n in row.split()]
        for mesh, row in re.findall(r"^(\d+x\d+x\d+) +(.*)$", done.stdout, re.M)
    }
    expected = {1: {"1x1x1"}, 2: {"2x1x1", "1x2x1", "1x1x2"}, 3: {"3x1x1", "1x3x1"}}
    assert meshes.keys() == expected[ranks]
    for _, milliseconds, *terms in meshes.values():
        assert sum(terms[:5]) == pytest.approx(milliseconds, abs=3)
    machine = read_machine(place / "made" / "machine.toml")
    assert machine.ranks_per_node == ranks and machine.gflops > 0.01
    trained = mpitrain(ranks, *words, "--train.max_steps", "9", "--out", "made", cwd=place, **cache)
    assert re.search(
        r"^forecast a step took [\d.]+ ms, and [\d.]+ were foretold .* by the figures of \d", trained.stdout, re.M
    ), trained.stdout
    assert "of the mean of the last 7 steps" in trained.stdout


def test_a_schedule_of_ones_own_that_fits_no_ranks_is_told_as_for_a_run(place, cache):
    (place / "own.csv").write_text("0F0,0B0\n1F0,1B0\n")
    flags = ("--pipeline.schedule", "own.csv", "--train.micro_batches", "1")
    done = mpitrain(1, "plan", "--ranks", "3", *flags, *FILE, cwd=place, **cache)
    assert done.returncode == 64 and "2 pipe" in done.stderr and "3" in done.stderr, done.stderr


def test_a_cache_that_cannot_be_written_does_not_spoil_a_plan(place, cache):
    words = make_tiny(place / "tiny")
    prepared = mpitrain(1, "prepare", *words, "--out", "shards", cwd=place, **cache)
    assert prepared.returncode == 0, prepared.stderr
    words[words.index("--data") + 1] = "shards"
    (place / "file").write_text("no directory")
    done = mpitrain(1, "plan", *words, cwd=place, MPITRAIN_CACHE=str(place / "file"))
    assert done.returncode == 0 and "will not be compared with this plan" in done.stdout + done.stderr, done.stderr
