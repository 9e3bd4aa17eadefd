"""What a run is told: flags over environment over TOML over defaults, and all mistakes in one message."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from mpitrain import config
from mpitrain.config import Config
from mpitrain.errors import UsageError


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch) -> None:
    for name in [name for name in os.environ if name.startswith("MPITRAIN_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def table(tmp_path) -> Path:
    file = tmp_path / "run.toml"
    file.write_text(
        'model = "bert-base-cased"\n[train]\nbatch_size = 7\nepochs = 9\nseed = 3\n[pipeline]\nbalance = [2, 2]\n'
    )
    return file


def test_without_any_word_it_is_the_sample_with_bert_mini():
    found = config.load([])
    assert (found.model, found.data, found.resume, found.out) == ("bert-mini", "sample", "auto", None)
    assert found.mesh.data is found.mesh.pipe is found.train.max_steps is None
    assert (found.train.batch_size, found.checkpoint.every, found.checkpoint.keep, found.train.seed) == (32, 200, 3, 0)


def test_flags_win_over_variables_which_win_over_the_file(table, monkeypatch):
    monkeypatch.setenv("MPITRAIN_TRAIN__BATCH_SIZE", "8")
    monkeypatch.setenv("MPITRAIN_TRAIN__EPOCHS", "10")
    found = config.load(["--train.epochs", "11"], table)
    assert (found.train.seed, found.train.batch_size, found.train.epochs) == (3, 8, 11)
    assert (found.model, found.pipeline.layers) == ("bert-base-cased", (2, 2))


def test_values_are_typed_in_every_source(monkeypatch):
    monkeypatch.setenv("MPITRAIN_PIPELINE__BALANCE", "1,2")
    flags = ["--train.learning_rate=5e-5", "--mesh.data", "4", "--checkpoint.best", "false", "--out", "a/b"]
    found = config.load(flags)
    assert (found.train.learning_rate, found.mesh.data, found.checkpoint.best) == (5e-5, 4, False)
    assert (found.pipeline.layers, found.out) == ((1, 2), Path("a/b"))
    assert config.load(["--pipeline.balance", "3,3,4,2"]).pipeline.layers == (3, 3, 4, 2)


def test_all_mistakes_of_all_sources_are_in_one_message(tmp_path, monkeypatch):
    file = tmp_path / "bad.toml"
    file.write_text('colour = "red"\n[train]\nprecision = "fp8"\n')
    monkeypatch.setenv("MPITRAIN_CHECKPOINT__KEEP", "0")
    monkeypatch.setenv("MPITRAIN_NONSENSE", "1")
    with pytest.raises(UsageError) as caught:
        config.load(["--train.batch_size", "-3", "--mesh.tensor", "0"], file)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"configuration (flags, MPITRAIN_ variables, {file}): 6 mistake(s)"
    for expected in [
        "--colour: no such field; found 'red'",
        "--train.precision: input should be 'fp32', 'bf16' or 'fp16'; found 'fp8'",
        "--checkpoint.keep: input should be greater than 0; found '0'",
        "--train.batch_size: input should be greater than 0; found '-3'",
        "--mesh.tensor: input should be greater than 0; found '0'",
        "MPITRAIN_NONSENSE: no such field (environment variable)",
    ]:
        assert f"  {expected}" in lines


@pytest.mark.parametrize("variable", ["MPITRAIN_TRAIN__", "MPITRAIN_TRAIN__SEEDS", "MPITRAIN_MODEL__X"])
def test_a_variable_that_is_no_field_is_named(monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    with pytest.raises(UsageError, match=variable) as refusal:
        config.load([])
    assert "2 mistake" not in str(refusal.value), "one slip is one mistake"


def test_the_programs_other_variables_are_no_fields(monkeypatch):
    for name in ("MPITRAIN_CACHE", "MPITRAIN_CORPORA"):
        monkeypatch.setenv(name, "1")
    assert config.load([]).data == "sample"
    assert "data" not in config.load([]).model_fields_set


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--nonsense", "1"], "--nonsense"),
        (["--train.seed"], "--train.seed"),
        (["--train.batch", "3"], "--train.batch"),
    ],
)
def test_an_unknown_or_empty_flag_is_named(flags, message):
    with pytest.raises(UsageError, match=message):
        config.load(flags)


def test_a_file_that_is_no_toml_or_not_there_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"none\.toml: cannot be read: No such file"):
        config.load([], tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_bytes(b"a = 1\nb = \xff\n")
    with pytest.raises(UsageError, match=r"bad\.toml: is not TOML"):
        config.load([], tmp_path / "bad.toml")


def test_one_load_leaves_nothing_to_the_next(table):
    config.load(["--train.seed", "8"], table)
    assert config.load([]).train.seed == 0
    with pytest.raises(UsageError):
        config.load(["--nonsense", "1"], table)
    assert config.load([]) == Config()


def test_a_configuration_does_not_change():
    with pytest.raises(ValidationError, match="frozen"):
        config.load([]).train.seed = 5


def test_what_is_resolved_can_be_written_and_read_again():
    found = config.load(["--train.seed", "8", "--out", "x", "--pipeline.balance", "1,3"])
    assert Config.model_validate(found.model_dump(mode="json")) == found


def test_the_help_names_every_field_with_its_meaning():
    text = " ".join(config.help_text().split())
    for name, field in Config.model_fields.items():
        section = getattr(field.annotation, "model_fields", {})
        leaves = {f"{name}.{leaf.alias or part}": leaf for part, leaf in section.items()} or {name: field}
        for flag, leaf in leaves.items():
            assert f"--{flag} " in text
            assert leaf.description and leaf.description[:20] in text, f"{flag} says nothing"


@pytest.mark.parametrize("flags", [["--comm.algorithm", "ring"], ["--comm.wire_dtype", "bf16"]])
def test_reproducible_sums_leave_no_choice_of_an_algorithm(flags):
    with pytest.raises(UsageError, match=r"reproducible sums in fp32, by a tree; leave --comm.algorithm"):
        config.load(["--train.reproducible", "true", *flags])


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--comm.error_feedback", "true"], "error_feedback sends what a bf16 wire loses"),
        (
            ["--comm.error_feedback", "true", "--comm.wire_dtype", "bf16", "--train.precision", "fp16"],
            "\n  --comm.error_feedback keeps gradients of earlier steps, whose scale --train.precision fp16 changes; "
            "take --train.precision bf16 or fp32",
        ),
    ],
)
def test_error_feedback_needs_a_wire_that_rounds_and_gradients_of_one_scale(flags, words):
    with pytest.raises(UsageError) as error:
        config.load(flags)
    assert words in str(error.value) and "found {" not in str(error.value)
