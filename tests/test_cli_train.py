"""Training as a user starts it: bare, on any number of ranks, stopped, killed and resumed on this and other meshes."""

from __future__ import annotations

import json
import math
import os
import random
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from launching import BIN, clean_environment, finish, mpitrain, start
from tiny import exit_of, make_tiny, metrics_of, processes_of, ranks_of, tensors_of

KEYS = {"step", "epoch", "loss", "grad_norm", "learning_rate", "tokens", "seconds", "tokens_per_second"}
SECONDS_KEYS = {"data", "forward_backward", "pipeline_wait", "reduce", "update"}
SCORES = {"loss", "token_accuracy", "f1_conlleval", "f1_strict", "per_type", "sentences", "words"}
TWO_BY_TWO = ("--mesh.data", "2", "--mesh.pipe", "2")


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> tuple[Path, Any]:
    """Eight ranks in an empty directory; nothing is given but the number of steps."""
    place = tmp_path_factory.mktemp("bare")
    done = mpitrain(8, "--train.max_steps", "4", cwd=place, timeout=400, XDG_CACHE_HOME=f"{place}-cache")
    assert done.returncode == 0, done.stdout + done.stderr
    return place, done


def test_the_bare_run_says_its_mesh_its_stages_its_scores_and_what_comes_next(bare):
    place, done = bare
    lines = done.stdout.splitlines()
    assert done.stderr == ""
    assert "mesh     8 rank(s) = 4 data x 2 pipe" in lines
    assert "         stage 0: embeddings, layers 0-1" in lines
    assert "         stage 1: layers 2-3, classifier" in lines
    table = [line for line in lines[lines.index("test: entity scores (conlleval)") + 1 :] if line.strip()]
    assert table[0].split() == ["precision", "recall", "F1", "support"]
    rows = ["LOC", "ORG", "PER", *(f"replica {number}" for number in range(4)), "all"]
    assert [row[:10].strip() for row in table[1:9]] == rows
    supports = [int(row.split()[-1].replace(",", "")) for row in table[1:9]]
    assert sum(supports[:3]) == sum(supports[3:7]) == supports[7]
    assert len([line for line in lines if "python -m mpitrain" in line]) == 3
    assert [path.name for path in place.iterdir()] == ["runs"]


def test_the_run_directory_holds_what_other_programs_rely_on(bare):
    run = bare[0] / "runs" / "bert-mini-sample-1"
    metrics = metrics_of(run)
    assert [line["step"] for line in metrics] == [1, 2, 3, 4]
    assert all(set(line) >= KEYS | SECONDS_KEYS for line in metrics)
    assert all(sum(line[key] for key in SECONDS_KEYS) <= line["seconds"] * 1.01 for line in metrics)
    evaluation = json.loads((run / "eval.json").read_text())
    assert set(evaluation) == {"dev", "test"}
    for scores in evaluation.values():
        assert set(scores) >= SCORES
        assert scores["sentences"] == 600
        assert all(set(kind) == {"precision", "recall", "f1", "support"} for kind in scores["per_type"].values())
    assert exit_of(run) == {"code": 0, "reason": "done", "step": 4}
    assert (run / "config.json").is_file()
    files = {path.name for path in (run / "checkpoints" / "step-00000004").iterdir()}
    assert files == {"manifest.json", "config.json", "tokenizer.json", *(f"rank-{r:05d}.h5" for r in range(8))}


def test_the_commands_that_it_names_next_work_as_they_stand(bare):
    place, done = bare
    commands = [line[9:] for line in done.stdout.splitlines() if "python -m mpitrain" in line]
    environment = clean_environment(
        PATH=f"{BIN}:{os.environ['PATH']}", XDG_CACHE_HOME=f"{place}-cache", OMP_WAIT_POLICY="passive"
    )
    outputs = []
    for command in commands:
        ended = subprocess.run(command, shell=True, cwd=place, env=environment, capture_output=True, text=True)
        assert ended.returncode == 0, f"{command}\n{ended.stdout}\n{ended.stderr}"
        outputs.append(ended.stdout)
    assert "test: entity scores" in outputs[0]
    rows = [line.split("\t") for line in outputs[1].splitlines() if line]
    assert [row[0] for row in rows] == ["Maria", "Jordan", "flew", "to", "Paris", "."]
    assert (place / shlex.split(commands[2])[-1] / "model.safetensors").is_file()


@pytest.fixture(scope="module")
def problem(tmp_path_factory) -> tuple[Path, list[str], dict[str, str]]:
    """A folder, the flags of a tiny training in it, and its environment."""
    place = tmp_path_factory.mktemp("tiny")
    flags = [*make_tiny(place), "--train.learning_rate", "2e-3"]
    return place, flags, {"MPITRAIN_CACHE": str(place / "cache")}


@pytest.fixture(scope="module")
def without_mpirun(problem) -> list[dict[str, Any]]:
    place, flags, environment = problem
    done = mpitrain(0, *flags, "--train.max_steps", "2", "--out", "bare", cwd=place, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return metrics_of(place / "bare")


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 6])
def test_any_number_of_ranks_trains_as_no_mpirun_at_all_does(problem, without_mpirun, ranks):
    place, flags, environment = problem
    done = mpitrain(ranks, *flags, "--train.max_steps", "2", "--out", f"on-{ranks}", cwd=place, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    found = metrics_of(place / f"on-{ranks}")
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in found] == pytest.approx([line[key] for line in without_mpirun], rel=1e-5)


@pytest.fixture(scope="module")
def uninterrupted(problem) -> Path:
    """All 104 steps on 2 data x 2 pipe, dropout on."""
    place, flags, environment = problem
    done = mpitrain(4, *flags, *TWO_BY_TWO, "--out", "whole", cwd=place, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return place / "whole"


def when_trained(run: Path, steps: int, process: subprocess.Popen[str], timeout: float = 120) -> None:
    """Return once the run has written the metrics of so many steps."""
    limit = time.monotonic() + timeout
    while len(metrics_of(run)) < steps:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit, f"no {steps} steps within {timeout} s"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def stopped(problem) -> Path:
    """The same, stopped by two signals to mpirun after a few steps."""
    place, flags, environment = problem
    out = ("--out", "stopped", "--checkpoint.every", "4", "--checkpoint.keep", "2")
    process = start(4, "-m", "mpitrain", *flags, *TWO_BY_TWO, *out, cwd=place, **environment)
    when_trained(place / "stopped", 9, process)
    os.kill(process.pid, signal.SIGUSR1)
    os.kill(process.pid, signal.SIGUSR1)
    done = finish(process, 60)
    assert done.returncode == 75, done.stdout + done.stderr
    return place / "stopped"


def test_a_signal_to_mpirun_leaves_a_checkpoint_and_asks_to_be_started_again(stopped):
    exit = exit_of(stopped)
    assert (exit["code"], exit["reason"]) == (75, "stopped by SIGUSR1")
    assert metrics_of(stopped)[-1]["step"] == exit["step"] < 80
    assert (stopped / "checkpoints" / f"step-{exit['step']:08d}" / "manifest.json").is_file()
    assert not (stopped / "eval.json").exists()


def assert_same_run(run: Path, reference: Path) -> None:
    for key in ("step", "loss", "grad_norm", "learning_rate", "tokens"):
        assert [line[key] for line in metrics_of(run)] == [line[key] for line in metrics_of(reference)]
    last = f"step-{metrics_of(reference)[-1]['step']:08d}"
    found, expected = (tensors_of(place / "checkpoints" / last) for place in (run, reference))
    assert found.keys() == expected.keys()
    assert [name for name in expected if not np.array_equal(found[name], expected[name])] == []
    assert (run / "eval.json").read_text() == (reference / "eval.json").read_text()


def test_a_resumed_run_is_the_uninterrupted_run_bit_for_bit(problem, stopped, uninterrupted):
    place, flags, environment = problem
    shutil.copytree(stopped, place / "continued")
    done = mpitrain(4, *flags, *TWO_BY_TWO, "--out", "continued", cwd=place, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"resume   step {exit_of(stopped)['step']} from continued" in done.stdout
    assert_same_run(place / "continued", uninterrupted)
    assert exit_of(place / "continued")["code"] == 0


@pytest.mark.parametrize("library", ["onednn", "torch"])
def test_a_resumed_run_multiplies_by_the_library_of_the_run_before(problem, library):
    place, flags, environment = problem
    settings = (*flags, "--train.max_steps", "8", "--checkpoint.every", "4")
    whole, half = place / f"by-{library}", place / f"by-{library}-again"
    done = mpitrain(2, *settings, "--train.linear", library, "--out", str(whole), cwd=place, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    shutil.copytree(whole, half)
    shutil.rmtree(half / "checkpoints" / "step-00000008")
    settings = (*settings, "--pipeline.schedule", "gpipe")  # the same with one stage
    done = mpitrain(2, *settings, "--out", str(half), cwd=place, **environment)
    assert done.returncode == 0 and "resume   step 4" in done.stdout, done.stdout + done.stderr
    assert "--pipeline.schedule was 1f1b, is gpipe from here on" in done.stdout
    assert json.loads((half / "config.json").read_text())["linear"] == library
    assert_same_run(half, whole)


@pytest.mark.parametrize("ranks", [2, 3])
def test_residuals_of_error_feedback_are_resumed_or_begin_anew_with_a_warning(problem, ranks):
    place, flags, environment = problem
    wire = ("--comm.algorithm", "ring", "--comm.wire_dtype", "bf16", "--comm.error_feedback", "true")
    settings = (*flags, *wire, "--train.max_steps", "8", "--checkpoint.every", "4")
    whole, half = place / f"feedback-{ranks}", place / f"feedback-{ranks}-again"
    done = mpitrain(2, *settings, "--mesh.data", "2", "--out", str(whole), cwd=place, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    shutil.copytree(whole, half)
    shutil.rmtree(half / "checkpoints" / "step-00000008")
    done = mpitrain(ranks, *settings, "--mesh.data", str(ranks), "--out", str(half), cwd=place, **environment)
    assert done.returncode == 0 and "resume   step 4" in done.stdout, done.stdout + done.stderr
    assert ("error feedback begins anew" in done.stdout) == (ranks == 3)
    found, expected = ([line["grad_norm"] for line in metrics_of(run)] for run in (half, whole))
    assert (found[4:] == expected[4:]) == (ranks == 2), "the same bits on the same mesh"
    assert all(0 < error < 2**-7 for line in metrics_of(whole) for stage in line["wire_error"] for error in stage)


@pytest.mark.parametrize(
    "shape, schedule",
    [
        ((1, 1, 1), "1f1b"),
        ((2, 1, 1), "1f1b"),
        ((1, 2, 1), "zb-v"),
        ((1, 3, 1), "interleaved"),
        ((3, 1, 1), "1f1b"),
        ((1, 1, 2), "1f1b"),
        ((1, 2, 2), "zb-h1"),
    ],
)
def test_a_run_resumed_on_another_mesh_goes_on_with_the_same_data_and_losses(
    problem, stopped, uninterrupted, shape, schedule
):
    place, flags, environment = problem
    out = "moved-" + "x".join(map(str, shape))
    axes = zip(("--mesh.data", "--mesh.pipe", "--mesh.tensor"), map(str, shape), strict=True)
    mesh = (*(word for axis in axes for word in axis), "--pipeline.schedule", schedule)
    done = mpitrain(math.prod(shape), *flags, *mesh, "--resume", "stopped", "--out", out, cwd=place, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    first = exit_of(stopped)["step"]
    found, expected = metrics_of(place / out)[:20], metrics_of(uninterrupted)[first : first + 20]
    assert len(found) == 20
    for key in ("step", "tokens", "learning_rate"):
        assert [line[key] for line in found] == [line[key] for line in expected]
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], abs=1e-4)
    if shape[2] > 1:  # what such ranks have saved, one rank reads
        done = mpitrain(1, "evaluate", "--checkpoint", out, "--out", f"{out}-again", cwd=place, **environment)
        assert done.returncode == 0, done.stdout + done.stderr
        scores, again = (json.loads((place / run / "eval.json").read_text())["test"] for run in (out, f"{out}-again"))
        assert again["f1_conlleval"] == scores["f1_conlleval"]
        assert again["loss"] == pytest.approx(scores["loss"], rel=1e-5)


def test_a_rank_that_is_killed_ends_the_job_which_restarts_to_the_same_end(problem, uninterrupted):
    place, flags, environment = problem
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    dice, mark = random.Random(seed), f"TEST_MARK=killed-{seed}"
    command = ("-m", "mpitrain", *flags, *TWO_BY_TWO, "--out", "killed", "--checkpoint.every", "1")
    process = start(4, *command, cwd=place, **environment, TEST_MARK=f"killed-{seed}")
    when_trained(place / "killed", 1, process)
    time.sleep(dice.uniform(0, 1))
    os.kill(dice.choice(ranks_of(mark)), signal.SIGKILL)
    assert finish(process, 30).returncode not in (0, 75)
    limit = time.monotonic() + 30
    while left := processes_of(mark):
        assert time.monotonic() < limit, left
        time.sleep(0.1)
    again = finish(start(4, *command, cwd=place, **environment), 200)
    assert again.returncode == 0, again.stdout + again.stderr
    assert_same_run(place / "killed", uninterrupted)
    assert list((place / "killed" / "checkpoints").glob("*.tmp-*")) == []
