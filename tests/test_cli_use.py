"""What a trained model is used for: the same scores and tags on any mesh, words in are words out, export."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launching import clean_environment, command, mpitrain
from seqeval.metrics import accuracy_score, f1_score
from tiny import make_tiny

MESHES = {"one rank": (1,), "two ranks": (2,), "three ranks": (3,), "two stages": (2, "--mesh.pipe", "2")}
MESHES["shared layers"] = (2, "--mesh.tensor", "2")
MESHES["a V of two stages"] = (2, "--mesh.pipe", "2", "--pipeline.schedule", "zb-v")
# An empty word, a mark without width, a blank inside, one that BERT's text clean-up deletes, one of 600 pieces,
# one that no piece fits, and texts of special tokens.
WEIRD = ["Maria", "", "\u200e", "New\u00a0York", "\ufffd", "-" * 600, "\u4e09" * 3, "[SEP]", "\u2028", "#", "."]
LONG = [f"word{number}" for number in range(2000)]
FLAGS = ("--model", "tiny.toml", "--data", "corpus", "--tokenizer.vocab_size", "300")
SHORT = ("--train.max_steps", "4", "--train.threads", "1")
PLAIN = ["Dr. Jordan (of Paris) left.", "Hello", "", "  two   blanks  "]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """A folder with `run`, trained far enough to score above zero, and its environment."""
    place = tmp_path_factory.mktemp("use")
    environment = {"MPITRAIN_CACHE": str(place / "cache")}
    flags = [*make_tiny(place), "--train.learning_rate", "2e-3", "--train.epochs", "6", "--out", "run"]
    done = mpitrain(2, *flags, cwd=place, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return place, environment


def use(trained: tuple[Path, dict[str, str]], ranks: int, *arguments: str, stdin: str = "") -> str:
    """Standard output of a command that must succeed."""
    place, environment = trained
    line = command(ranks, "-m", "mpitrain", *arguments, "--train.threads", "1")
    settings: Any = {"cwd": place, "env": clean_environment(**environment), "input": stdin.encode(), "timeout": 120}
    done = subprocess.run(line, capture_output=True, **settings)
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
    return done.stdout.decode()


@pytest.mark.parametrize("mesh", MESHES)
def test_scores_are_those_of_the_run_on_any_mesh(trained, mesh):
    ranks, *flags = MESHES[mesh]
    out = mesh.replace(" ", "-")
    printed = use(trained, ranks, "evaluate", "--checkpoint", "run", "--out", out, *flags)
    expected, found = (json.loads((trained[0] / run / "eval.json").read_text()) for run in ("run", out))
    assert expected["dev"]["f1_conlleval"] > 0
    for split, scores in expected.items():
        losses = [report.pop("loss") for report in (scores, found[split])]
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)
        assert json.dumps(found[split]) == json.dumps(scores)
        assert f"{split}: entity scores" in printed
    assert (expected["dev"]["sentences"], expected["test"]["sentences"]) == (30, 25)


def test_what_was_trained_in_bf16_is_used_in_bf16_unless_told_otherwise(trained):
    place, environment = trained
    done = mpitrain(2, *FLAGS, "--out", "half", "--train.precision", "bf16", *SHORT, cwd=place, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "in bf16; trained in bf16" in use(trained, 2, "evaluate", "--checkpoint", "half", "--out", "half-scores")
    found, expected = (json.loads((place / run / "eval.json").read_text()) for run in ("half-scores", "half"))
    assert found["test"]["token_accuracy"] == expected["test"]["token_accuracy"]
    assert found["test"]["loss"] == pytest.approx(expected["test"]["loss"], rel=1e-6)
    flags = ("--train.precision", "fp32", "--out", "whole-scores")
    assert "in fp32; trained in bf16" in use(trained, 1, "evaluate", "--checkpoint", "half", *flags)
    assert json.loads((place / "whole-scores" / "eval.json").read_text())["test"]["loss"] != found["test"]["loss"]


def test_scores_of_a_run_on_shards_given_by_a_relative_path_are_found_from_anywhere(trained, tmp_path):
    place, environment = trained
    for arguments in (["prepare", *FLAGS, "--out", "shards"], [*FLAGS[:3], "shards", "--out", "on-shards", *SHORT]):
        done = mpitrain(1, *arguments, cwd=place, **environment)
        assert done.returncode == 0, done.stdout + done.stderr
    done = mpitrain(1, "evaluate", "--checkpoint", str(place / "on-shards"), "--out", "scores", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "scores" / "eval.json").read_bytes() == (place / "on-shards" / "eval.json").read_bytes()


def test_a_reader_that_goes_away_does_not_end_the_training(trained):
    place, environment = trained
    line = shlex.join(command(0, "-m", "mpitrain", *FLAGS, "--out", "unread", *SHORT))
    settings: Any = {"cwd": place, "env": clean_environment(**environment), "timeout": 120}
    for end in ("| head -1", "> /dev/full", ">&-"):
        done = subprocess.run(["bash", "-c", f"set -o pipefail; {line} {end}"], capture_output=True, **settings)
        assert (done.returncode, done.stderr) == (0, b"")
        assert json.loads((place / "unread" / "exit.json").read_text())["code"] == 0
        shutil.rmtree(place / "unread")


def conll_of(sentences: list[list[str]]) -> str:
    return "".join("".join(f"{word}\tO\n" for word in words) + "\n" for words in sentences)


def rows_of(output: str) -> list[list[list[str]]]:
    """Columns of each word of each sentence."""
    return [[row.split("\t") for row in block.split("\n")] for block in output.removesuffix("\n\n").split("\n\n")]


@pytest.fixture(scope="module")
def tagged_by_one(trained) -> list[list[list[str]]]:
    dev = (trained[0] / "corpus" / "dev.conll").read_text()
    (trained[0] / "weird.conll").write_text(conll_of([WEIRD, LONG]) + dev, newline="\n")
    return rows_of(use(trained, 1, "predict", "--checkpoint", "run", "weird.conll"))


def test_words_in_are_words_out_in_the_same_order_whatever_they_hold(trained, tagged_by_one):
    dev = (trained[0] / "corpus" / "dev.conll").read_text().strip("\n").split("\n\n")
    sentences = [WEIRD, LONG, *([row.split("\t")[0] for row in block.split("\n")] for block in dev)]
    assert [[row[0] for row in rows] for rows in tagged_by_one] == sentences
    labels = {"O", "B-LOC", "I-LOC", "B-ORG", "I-ORG", "B-PER", "I-PER"}
    assert all(len(row) == 3 and row[1] in labels and 0 < float(row[2]) <= 1 for rows in tagged_by_one for row in rows)
    assert len({row[1] for rows in tagged_by_one for row in rows}) > 1


def test_tags_are_those_that_the_scores_were_made_of(trained, tagged_by_one):
    dev = (trained[0] / "corpus" / "dev.conll").read_text().strip("\n").split("\n\n")
    gold = [[row.split("\t")[1] for row in block.split("\n")] for block in dev]
    predicted = [[row[1] for row in rows] for rows in tagged_by_one[2:]]
    expected = json.loads((trained[0] / "run" / "eval.json").read_text())["dev"]
    assert f1_score(gold, predicted) == pytest.approx(expected["f1_conlleval"])
    assert accuracy_score(gold, predicted) == pytest.approx(expected["token_accuracy"])


@pytest.mark.parametrize("mesh", ["three ranks", "two stages", "shared layers"])
def test_tags_are_the_same_on_any_mesh(trained, tagged_by_one, mesh):
    ranks, *flags = MESHES[mesh]
    use(trained, ranks, "predict", "--checkpoint", "run", "weird.conll", "--out", f"{mesh}.conll", *flags)
    found = rows_of((trained[0] / f"{mesh}.conll").read_text())
    assert [[row[:2] for row in rows] for rows in found] == [[row[:2] for row in rows] for rows in tagged_by_one]
    scores = ([float(row[2]) for rows in output for row in rows] for output in (found, tagged_by_one))
    assert next(scores) == pytest.approx(next(scores), abs=2e-4)


def test_lines_of_plain_text_on_standard_input_become_json_lines(trained):
    printed = use(trained, 2, "predict", "--checkpoint", "run", "--to", "jsonl", "-", stdin="\n".join(PLAIN))
    found = [json.loads(line) for line in printed.split("\n")[:-1]]
    words = ["Dr . Jordan ( of Paris ) left .", "Hello", "two blanks"]
    assert [line["words"] for line in found] == [text.split() for text in words]
    assert all(len(line["words"]) == len(line["tags"]) == len(line["scores"]) for line in found)


def test_no_input_gives_no_output(trained):
    assert use(trained, 2, "predict", "--checkpoint", "run", "-") == ""


def test_transformers_loads_what_export_writes_with_the_same_pieces_and_logits(trained):
    from mpi4py import MPI
    from transformers import AutoModelForTokenClassification, AutoTokenizer

    from mpitrain.dataset.tokenize import encode_sentences
    from mpitrain.model.bert import BertStage, num_blocks
    from mpitrain.model.initial import load_weights
    from mpitrain.model.layout import PackedLayout
    from mpitrain.observe.console import Console
    from mpitrain.restore import open_checkpoint, restore_weights

    use(trained, 2, "export", "--checkpoint", "run", "--out", "exported")
    ours = open_checkpoint(MPI.COMM_SELF, trained[0] / "run", Console(False))
    stage = BertStage(ours.problem.card, 7, [(0, num_blocks(ours.problem.card))])
    load_weights(stage, restore_weights(MPI.COMM_SELF, ours, [name for name, _ in stage.named_parameters()]))
    model = AutoModelForTokenClassification.from_pretrained(trained[0] / "exported").eval()
    tokenizer = AutoTokenizer.from_pretrained(trained[0] / "exported")
    assert list(model.config.id2label.values()) == ours.problem.label_names
    for words in [
        ["Maria", "Jordan", "flew", "to", "Paris", "."],
        ["Zo\u00eb", "WASHINGTON", "3.5", "?"],
        ["\u4e09", "a"] * 9,
    ]:
        encoded = encode_sentences(ours.problem.tokenizer, [words], 64)
        theirs = tokenizer(words, is_split_into_words=True, return_tensors="pt")
        assert theirs["input_ids"][0].tolist() == encoded.tokens.tolist()
        with torch.no_grad():
            found = stage(torch.from_numpy(encoded.tokens.astype(np.int64)), PackedLayout(np.diff(encoded.offsets)))
            torch.testing.assert_close(found, model(**theirs).logits[0], rtol=0, atol=1e-5)


def test_inspect_shows_the_checkpoint_of_a_run(trained):
    shown = use(trained, 1, "inspect", "run")
    assert "step-00000156" in shown
    assert shown.count("whole") == 4 and "DAMAGED" not in shown
