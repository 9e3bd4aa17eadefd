"""The benchmark prints and writes what it measured, and times nothing that sums wrongly."""

from __future__ import annotations

import json
import re
import subprocess

import pytest
import torch
from launching import clean_environment, command, mpitrain

from mpitrain.bench.allreduce import Contender, _check
from mpitrain.bench.step import read_lengths
from mpitrain.errors import DataError, MpitrainError
from mpitrain.model.card import load_card


@pytest.mark.parametrize("ranks", [1, 3])
def test_every_contender_is_timed_at_every_size_beside_the_others(tmp_path, ranks):
    done = mpitrain(ranks, "bench", "allreduce", "--kib", "1,64", "--repeats", "2", "--out", "results", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning" not in done.stdout, "gloo and matplotlib are here"
    assert "node/MPI" in done.stdout and "node/gloo" in done.stdout
    found = json.loads((tmp_path / "results" / f"allreduce-{ranks}.json").read_text())
    contenders = [("fp32", name) for name in ("node", "ring", "ring16", "native", "MPI", "gloo")]
    contenders += [("bf16", name) for name in ("node", "ring", "gloo")]
    rows = {(row["dtype"], row["contender"], row["bytes"]): row for row in found["seconds"]}
    assert set(rows) == {(*contender, 1024 * kib) for contender in contenders for kib in (1, 64)}
    assert all(0 < row["lower"] <= row["median"] <= row["upper"] for row in rows.values())
    assert (found["ranks"], found["repeats"]) == (ranks, 2)
    assert found["command"].endswith("bench allreduce --kib 1,64 --repeats 2 --out results")
    assert (tmp_path / "results" / f"allreduce-{ranks}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.mpi(min_size=2)
def test_a_contender_that_sums_wrongly_is_not_timed(comm):
    values = torch.zeros(10)
    with pytest.raises((RuntimeError, MpitrainError), match="lazy summed 10 elements wrongly"):
        _check(comm, "lazy", Contender(values, lambda: None, lambda: values))


@pytest.mark.parametrize("wrong", ["--kib x", "--kib 0", "--repeats 0", "--repeats x"])
def test_sizes_and_repeats_are_counts(tmp_path, wrong):
    done = mpitrain(2, "bench", "allreduce", *wrong.split(), cwd=tmp_path)
    assert done.returncode == 64, done.stdout + done.stderr
    assert f"argument {wrong.split()[0]}" in done.stderr and "Traceback" not in done.stderr


STEP = ["--model", "bert-tiny", "--train.batch_size", "6", "--train.micro_batches", "3"]


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_step_is_timed_by_its_parts(tmp_path, ranks):
    (tmp_path / "lengths").write_text("5 40\n9 20\n")
    turns = ("--repeats", "3", "--steps", "2", "--lengths", "lengths", "--out", "results")
    done = mpitrain(ranks, "bench", "step", *STEP, "--mesh.data", str(ranks), *turns, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "forward_backward" in done.stdout and "tokens/s" in done.stdout
    found = json.loads((tmp_path / "results" / f"step-{ranks}.json").read_text())
    assert (found["ranks"], found["steps"], len(found["turns"])) == (ranks, 2, 3)
    for turn in found["turns"]:
        assert 12 * 5 <= turn["tokens"] <= 12 * 9
        assert (
            0
            < sum(seconds for name, seconds in turn["parts"].items() if name not in ("reduce_hidden", "gather"))
            < turn["seconds"]
        )
        assert turn["parts"]["reduce"] + turn["parts"]["reduce_hidden"] > 0


def test_the_time_of_each_stage_is_told_before_and_after(tmp_path):
    flags = ("--mesh.pipe", "2", "--pipeline.balance", "measured", "--repeats", "3", "--steps", "2", "--out", "results")
    done = mpitrain(2, "bench", "step", *STEP, *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^balance  stage times [\d.]+ / [\d.]+ ms a micro-batch$", done.stdout, re.MULTILINE)
    assert re.search(r"stages compute\s+\d+ / \d+ ms, the\s+longest 1\.\d\d of the mean", done.stdout)
    for turn in json.loads((tmp_path / "results" / "step-2.json").read_text())["turns"]:
        assert len(turn["stages"]) == 2 and 0 < min(turn["stages"]) <= max(turn["stages"]) < turn["seconds"]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_is_held_against_the_fastest_product_and_shared_out_by_parts(tmp_path, ranks, precision):
    flags = (*STEP, "--train.precision", precision, "--train.dropout", "0.1", "--out", "results")
    done = mpitrain(ranks, "bench", "train", *flags, "--repeats", "3", "--steps", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "results" / f"train-{ranks}.json").read_text())
    parts = found["seconds_of_a_step"]
    always = {"attention", "linear", "activation", "norm", "dropout", "embedding", "loss", "optimizer", "data"}
    assert always <= {name for name, seconds in parts.items() if seconds > 0}
    assert sum(parts.values()) <= max(turn["seconds"] for turn in found["turns"]) / 2 * 1.5
    card = load_card("bert-tiny")
    hidden, wide = card.hidden_size, card.intermediate_size
    matrices = card.num_hidden_layers * (4 * hidden**2 + 2 * hidden * wide)
    flop = 6 * found["tokens_per_second"]
    assert flop * matrices < found["model_flop_per_second"] < flop * matrices * 1.05
    assert found["utilisation"] == found["model_flop_per_second"] / found["product_flop_per_second"] < 1
    assert len(found["peak_memory"]) == ranks
    assert (tmp_path / "results" / f"train-{ranks}.png").read_bytes().startswith(b"\x89PNG")


def test_flags_of_another_benchmark_are_refused(tmp_path):
    done = mpitrain(1, "bench", "train", "--kib", "4", cwd=tmp_path)
    assert done.returncode == 64 and "--kib is no flag of bench train" in done.stderr


def test_a_turn_waits_for_a_line_of_standard_input(tmp_path):
    arguments = ["bench", "step", *STEP, "--mesh.data", "2", "--await-turns", "--repeats", "3"]
    process = subprocess.Popen(
        command(2, "-m", "mpitrain", *arguments),
        cwd=tmp_path,
        env=clean_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    out, errors = process.communicate("go\ngo\n", timeout=120)
    lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert process.returncode == 64 and "standard input ended before the last turn" in errors
    assert len(lines) == 2 and all(line["tokens"] > 0 and line["seconds"] > 0 for line in lines)


WRONG_LENGTHS = {
    "5\n": "line 1: found '5'",
    "5 3\nfive 3\n": "line 2: found 'five 3'",
    "5 0\n": "line 1: found '5 0'",
    "-4 2\n": "line 1: found '-4 2'",
    "600 3\n": "line 1: found '600 3'; a length from 1 to 512 and a number of sequences would work",
    "16 5 9\n": "line 1: found '16 5 9'",
    "": "is empty",
    "\xff": "is no text",
}


@pytest.mark.parametrize("content, words", WRONG_LENGTHS.items())
def test_lengths_that_are_none_are_named(tmp_path, content, words):
    (tmp_path / "lengths").write_text(content, encoding="latin-1")
    with pytest.raises(DataError, match=re.escape(f"--lengths {tmp_path / 'lengths'}: {words}")):
        read_lengths(tmp_path / "lengths", 512)


def test_a_file_of_lengths_that_is_not_there_ends_the_benchmark_with_a_word(tmp_path):
    done = mpitrain(2, "bench", "step", *STEP, "--lengths", "lengths", cwd=tmp_path)
    assert done.returncode == 65, done.stdout + done.stderr
    assert "--lengths lengths: cannot be read: No such file" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "what, flag", [("allreduce", "--steps 2"), ("allreduce", "--await-turns"), ("step", "--kib 64")]
)
def test_a_flag_of_the_other_benchmark_is_refused(tmp_path, what, flag):
    done = mpitrain(2, "bench", what, *flag.split(), cwd=tmp_path)
    assert done.returncode == 64, done.stdout + done.stderr
    assert f"{flag.split()[0]} is no flag of bench {what}" in done.stderr
