"""Wrong use and bad input: one message that names the place, no traceback, the documented exit code, on all ranks."""

from __future__ import annotations

import fcntl
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from launching import mpitrain
from tiny import exit_of, make_tiny, metrics_of

USAGE, BAD_DATA, NO_CHECKPOINT, FAULT = 64, 65, 66, 70


@dataclass(frozen=True)
class Wrong:
    """Arguments after those of a sound training, or a whole command, and what must come of them."""

    arguments: str
    code: int
    message: str


TRAINING = [
    Wrong("--nonsense 1", USAGE, "unrecognized arguments: --nonsense"),
    Wrong("--train.epochs x --mesh.data 0", USAGE, "--mesh.data: .*; found '0'(.|\n)*--train.epochs: .*'x'"),
    Wrong("--comm.gpu 1", USAGE, "--comm.gpu: input should be 'auto', 'direct' or 'staged'; found '1'"),
    Wrong("--mesh.data 3", USAGE, "3 data x 1 pipe x 1 tensor = 3, but there are 2 ranks; .*2 x 1, 1 x 2"),
    Wrong("--data wnut17", BAD_DATA, "wnut17train.conll(.|\n)*Fetch"),
    Wrong("--data ragged", BAD_DATA, r"ragged/train.conll:2: found 1 column\(s\) in 'b'"),
    Wrong("--data mixed.toml --train.epochs 1", BAD_DATA, "'NOUN' does not go with entity labels"),
    Wrong("--data outside --train.epochs 1", BAD_DATA, "every word is tagged O"),
    Wrong("--data plain", BAD_DATA, 'plain/train.conll:1: found .NOUN. as a tag.*a recipe with scheme = "none"'),
    Wrong(
        "--model bert-mimi", USAGE, "'bert-mimi' is no file or folder, nor a name on the shelf of models; .*bert-mini"
    ),
    Wrong("--out corpus", USAGE, "--out corpus: holds other things than a run"),
    Wrong("--out tiny.toml/run", USAGE, "--out tiny.toml/run: Not a directory"),
    Wrong("--out broken --resume run", NO_CHECKPOINT, "run: no complete checkpoint"),
]
COMMANDS = [
    Wrong("frobnicate", USAGE, "no command 'frobnicate'; commands are: train, prepare"),
    Wrong("evaluate --checkpoint corpus", NO_CHECKPOINT, "corpus: no complete checkpoint"),
    Wrong("prepare none.conll", BAD_DATA, "none.conll"),
    Wrong("prepare corpus", BAD_DATA, "found no file corpus; for a folder: prepare --data corpus"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a sound problem in it and several bad files."""
    folder = tmp_path_factory.mktemp("errors")
    make_tiny(folder)
    for name, split, text in [
        ("ragged", "train", "a O\nb\n"),
        ("mixed", "train", "a\tNOUN\nb\tB-LOC\n"),
        ("mixed", "dev", "a\tNOUN\n"),
        ("outside", "train", "a O\nb O\n"),
        ("plain", "train", "a NOUN\n"),
    ]:
        (folder / name).mkdir(exist_ok=True)
        (folder / name / f"{split}.conll").write_text(text)
    files = "train = 'mixed/train.conll'\ndev = 'mixed/dev.conll'\n"
    (folder / "mixed.toml").write_text(f"name = 'mixed'\nscheme = 'none'\n[files]\n{files}")
    return folder


def flags_of(place: Path) -> list[str]:
    fields = {
        "model": place / "tiny.toml",
        "data": place / "corpus",
        "tokenizer.vocab_size": 300,
        "train.batch_size": 8,
    }
    return [word for name, value in (fields | {"train.threads": 1}).items() for word in (f"--{name}", str(value))]


def mpitrain_on_two(place: Path, *arguments: str, **environment: str) -> Any:
    return mpitrain(2, *arguments, cwd=place, MPITRAIN_CACHE=str(place / "cache"), **environment)


def assert_refused(done: Any, code: int, message: str) -> None:
    output = done.stdout + done.stderr
    assert done.returncode == code, output
    assert len(re.findall("^error", output, re.M)) == 1, output
    assert re.search(message, done.stderr), output
    assert "Traceback" not in output
    assert "MPI_Abort" not in output, "all ranks leave together; none takes the others down"


@pytest.mark.parametrize("wrong", TRAINING, ids=lambda wrong: wrong.arguments)
def test_training_refuses(place, wrong):
    before = {*place.iterdir(), *(place / "corpus").iterdir()}
    assert_refused(mpitrain_on_two(place, *flags_of(place), *wrong.arguments.split()), wrong.code, wrong.message)
    left = {*place.iterdir(), *(place / "corpus").iterdir()} - before
    assert left <= {place / "cache"}, "nothing is left behind"


@pytest.mark.parametrize("wrong", COMMANDS, ids=lambda wrong: wrong.arguments)
def test_a_command_refuses(place, wrong):
    assert_refused(mpitrain_on_two(place, *wrong.arguments.split()), wrong.code, wrong.message)


@pytest.mark.parametrize("variable", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_a_launcher_of_another_mpi_is_refused_before_n_runs_write_one_directory(place, variable):
    done = mpitrain(0, *flags_of(place), "--out", "lonely", cwd=place, **{variable: "4"})
    assert_refused(done, USAGE, "started 4 ranks, but MPI sees a world of 1")
    assert not (place / "lonely").exists()


def test_only_the_first_of_ranks_that_do_not_know_of_each_other_speaks(place):
    done = mpitrain(0, *flags_of(place), cwd=place, OMPI_COMM_WORLD_SIZE="4", OMPI_COMM_WORLD_RANK="3")
    assert done.returncode == USAGE
    assert "error" not in done.stderr.replace("RuntimeWarning", "")


@pytest.fixture(scope="module")
def run(place) -> Path:
    """A finished run of two ranks with checkpoints of steps 2, 4 and 6."""
    options = ("--train.max_steps", "6", "--checkpoint.every", "2", "--out", "run", "--checkpoint.best", "false")
    done = mpitrain_on_two(place, *flags_of(place), *options)
    assert done.returncode == 0, done.stdout + done.stderr
    return place / "run"


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def swap(one: Path, other: Path) -> None:
    aside = one.with_suffix(".aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def test_damaged_checkpoints_are_passed_over_aloud_and_the_one_before_is_used(place, run):
    copy = shutil.copytree(run, place / "damaged")
    for step, damage in [
        ("6", lambda folder: flip(folder / "rank-00001.h5")),
        ("4", lambda folder: swap(folder / "rank-00000.h5", folder / "rank-00001.h5")),
    ]:
        damage(copy / "checkpoints" / f"step-{step:0>8}")
    done = mpitrain_on_two(place, *flags_of(place), "--train.max_steps", "6", "--out", "damaged")
    assert done.returncode == 0, done.stdout + done.stderr
    warnings = re.findall(r"^warning +(.*)", done.stdout, re.M)
    assert len(warnings) == 2
    assert re.search(r"step-00000006/rank-00001.h5: is damaged: xxh3 is \w+, the manifest says \w+", warnings[0])
    assert "step-00000004/rank-0000" in warnings[1]
    assert "resume   step 2 from damaged/checkpoints/step-00000002" in done.stdout
    assert [line["step"] for line in metrics_of(copy)] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in metrics_of(copy)] == [line["loss"] for line in metrics_of(run)]


def test_no_run_starts_over_silently_when_all_its_checkpoints_are_damaged(place, run):
    copy = shutil.copytree(run, place / "ruined")
    folders = sorted((copy / "checkpoints").iterdir())
    (folders[0] / "rank-00000.h5").unlink()
    (folders[1] / "rank-00000.h5").write_bytes((folders[1] / "rank-00000.h5").read_bytes()[:-1])
    (folders[2] / "config.json").write_text("{}")
    done = mpitrain_on_two(place, *flags_of(place), "--train.max_steps", "6", "--out", "ruined")
    message = "all checkpoints are damaged(.|\n)*6/config.json: (.|\n)*4/rank-00000.h5: (.|\n)*2/rank-00000.h5: "
    message += "(.|\n)*give another --out"
    assert_refused(done, NO_CHECKPOINT, message)
    assert exit_of(copy)["code"] == NO_CHECKPOINT


def test_a_damaged_checkpoint_is_not_used_and_inspect_says_which_file_it_is(place, run):
    copy = shutil.copytree(run / "checkpoints" / "step-00000006", place / "one")
    flip(copy / "rank-00000.h5")
    assert_refused(
        mpitrain_on_two(place, "evaluate", "--checkpoint", "one"), NO_CHECKPOINT, "one/rank-00000.h5: is damaged"
    )
    shown = mpitrain_on_two(place, "inspect", "one")
    assert_refused(shown, NO_CHECKPOINT, "damaged or missing: one/rank-00000.h5$")
    assert re.search("rank-00000.h5 .*DAMAGED", shown.stdout) and re.search("rank-00001.h5 .*whole", shown.stdout)


def test_what_could_be_used_instead_of_a_damaged_checkpoint_is_named(place, run):
    copy = shutil.copytree(run, place / "half")
    flip(copy / "checkpoints" / "step-00000006" / "rank-00000.h5")
    done = mpitrain_on_two(place, "export", "--checkpoint", "half", "--out", "exported")
    assert_refused(done, NO_CHECKPOINT, "06/rank-00000.h5: is damaged.*half/checkpoints/step-00000004, half/.*02$")


@pytest.mark.parametrize(
    "wrong",
    [
        Wrong("--resume none", USAGE, "run/checkpoints holds checkpoints of another run; give another --out"),
        Wrong("--train.seed 5", USAGE, "was written by another run(.|\n)*seed: 0 then, 5 now"),
    ],
    ids=lambda wrong: wrong.arguments,
)
def test_a_run_is_not_mixed_with_another(place, run, wrong):
    copy = shutil.copytree(run, place / f"with{wrong.arguments.replace(' ', '')}")
    before = (copy / "metrics.jsonl").read_text()
    done = mpitrain_on_two(place, *flags_of(place), "--out", copy.name, *wrong.arguments.split())
    assert_refused(done, wrong.code, wrong.message.replace("run/", f"{copy.name}/"))
    assert (copy / "metrics.jsonl").read_text() == before


def test_a_second_job_does_not_write_into_the_directory_of_the_first(place, run):
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    with (run / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as a job does that is still alive
        done = mpitrain_on_two(place, *flags_of(place), "--out", "run")
    assert_refused(done, USAGE, "--out run: another job writes to it")
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


def test_damaged_lines_of_metrics_do_not_keep_a_run_from_going_on(place, run):
    copy = shutil.copytree(run, place / "log")
    with (copy / "metrics.jsonl").open("a") as file:
        file.write("garbage\n{}\n")
    done = mpitrain_on_two(place, *flags_of(place), "--train.max_steps", "7", "--out", "log")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line["step"] for line in metrics_of(copy)] == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    "wrong",
    [
        Wrong("predict --checkpoint run latin.txt", BAD_DATA, r"latin.txt:2: found byte 0xe9, which is not UTF-8"),
        Wrong("predict --checkpoint run corpus/dev.conll --out nowhere/x", USAGE, "nowhere/x"),
        Wrong("predict --checkpoint run corpus/dev.conll --out /dev/full", USAGE, "/dev/full: No space left"),
        Wrong(
            "predict --checkpoint run title.txt", BAD_DATA, r"title.txt:2: found 'Anna lives', though .*--format text"
        ),
        Wrong("evaluate --checkpoint run --out tiny.toml/x", USAGE, "tiny.toml/x"),
        Wrong("export --checkpoint run --out corpus", USAGE, "--out corpus: exists already"),
    ],
    ids=lambda wrong: wrong.arguments,
)
def test_what_cannot_be_read_or_written_is_refused(place, run, wrong):
    (place / "latin.txt").write_bytes(b"fine\ncaf\xe9\n")
    (place / "title.txt").write_text("Hello\nAnna lives\n")
    assert_refused(mpitrain_on_two(place, *wrong.arguments.split()), wrong.code, wrong.message)


def test_a_damaged_shard_is_refused_before_training(place):
    shards = place / "shards"
    done = mpitrain_on_two(place, "prepare", *flags_of(place), "--out", "shards")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "shards   shards; to train on them: --data shards" in done.stdout
    flip(shards / "train-00000.h5")
    shown = mpitrain_on_two(place, "inspect", "shards")
    assert_refused(shown, BAD_DATA, "damaged or missing: shards/train-00000.h5$")
    done = mpitrain_on_two(place, *flags_of(place), "--data", "shards", "--out", "unborn")
    assert_refused(done, BAD_DATA, r"shards/train-00000.h5: damaged: its sha256 is \w+, dataset.json says \w+")
    assert not (place / "unborn").exists()


def test_training_gives_up_when_no_gradient_is_finite_any_more(place):
    options = ("--train.learning_rate", "1e30", "--train.warmup_ratio", "0", "--train.max_skipped_steps", "3")
    done = mpitrain_on_two(place, *flags_of(place), *options, "--out", "nan", "--checkpoint.every", "1")
    assert_refused(done, FAULT, "3 steps in a row .*the last is step 4.*--train.learning_rate")
    assert done.stdout.count("all ranks skip this update") == 3
    assert exit_of(place / "nan")["code"] == FAULT
    lines = [json.loads(line) for line in (place / "nan" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[-1]["loss"] is None
    for _ in range(2):  # another start begins with what is left of its patience, and ends where the first one did
        done = mpitrain_on_two(place, *flags_of(place), *options, "--out", "nan", "--checkpoint.every", "1")
        assert_refused(done, FAULT, "3 steps in a row .*the last is step 4")
        assert done.stdout.count("all ranks skip this update") == 1


def test_a_time_that_is_over_before_a_step_is_done_is_told(place):
    done = mpitrain_on_two(place, *flags_of(place), "--out", "late", "--runtime.time_limit", "0.1")
    assert done.returncode == 75 and exit_of(place / "late")["step"] == 1, done.stdout + done.stderr
    assert "warning  that was longer than its time (--runtime.time_limit): each start does one step" in done.stdout
