"""Every command that a guide shows does what it is shown for: all are run, in their order, as a reader would run them.

Runs are cut short by environment variables, which flags would override: the commands stay as they are written.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from launching import BIN, clean_environment, mpitrain
from tiny import make_tiny

ROOT = Path(__file__).resolve().parents[1]
GUIDES = ["README.md", "models/README.md", "data/README.md", "jobs/README.md", "tests/README.md", "CONTRIBUTING.md"]
PROGRAMS = (
    "mpirun .*-np ",
    "python3? (-m [mv]|tests/)",
    "make ",
    "pip install",
    "hf ",
    "kill -USR1",
    "tensorboard ",
    "bash jobs/",
    r"\.\w+/",
)
STARTS = rf"(time |\w+=\S+ )*({'|'.join(PROGRAMS)})"
SHORT = {"TRAIN__MAX_STEPS": "2", "MODEL": "bert-tiny", "TRAIN__BATCH_SIZE": "8"}
# What stands for something of the reader's.
STANDS_FOR = {" ...": " --data shards", "FOLDER": "folder", "data/mine.toml": "my/recipe.toml"}
# Measurements are shown with what they took; here it is enough that they run.
QUICK = {
    "bench allreduce": "--repeats 1 --kib 64",
    "bench train": "--repeats 1 --steps 1 --model bert-tiny",
    "bench step": "--repeats 1 --steps 1 --model bert-tiny",
    "mpitrain plan": "--model bert-tiny --mesh.pipe 2",  # the last one counts
    "--trace 12": "--model bert-tiny --train.max_steps 14",
}
NAMED = ("python -m mpitrain job", "python -m mpitrain export")  # without what they need
# What is not run here, and where it is.
ELSEWHERE = {
    "pip install": "test_wheel.py installs it in an empty environment",
    "python3 -m venv": "the same",
    "hf download": "needs the network",
    "kill -USR1": "tests/exam/test_stops.py",
    "--with-ft ulfm": "tests/exam/test_survival.py, under Open MPI",
    ".ci/": "runs this",
    "tests/support/": "tests/browser/test_page.py",
    "pre-commit install": "changes the repository",
    "tensorboard --logdir": "serves until it is stopped; tests/observe/test_board.py reads what it would show",
}


def commands_of(guide: str) -> list[str]:
    """Lines of indented blocks, and code in running text, that begin like a command."""
    text = (ROOT / guide).read_text(encoding="utf-8").replace("\\\n", "")
    blocks = re.findall(r"^    (\S.*?)(?:\s+#.*)?$", text, re.M)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^    .*$", "", text, flags=re.M))
    words = [command for each in [*blocks, *spans] for command in each.split("; ")]
    return [each for each in dict.fromkeys(words) if re.match(STARTS, each) and each not in NAMED]


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> Path:
    """A directory with what the guides speak of: own text, own recipe, a model from elsewhere, a run."""
    place = tmp_path_factory.mktemp("reader")
    flags = make_tiny(place)
    (place / "corpus").rename(place / "folder")
    flags[flags.index("--data") + 1] = "folder"
    shutil.copytree(place / "folder", place / "my" / "folder")
    for file in (place / "folder").iterdir():
        shutil.copy(file, place)
    names = "\n".join(f'{split} = "folder/{split}.conll"' for split in ("train", "dev", "test"))
    (place / "my" / "recipe.toml").write_text(f'name = "mine"\n[files]\n{names}\n')
    (place / "text.txt").write_text("Maria Jordan flew to Paris .\n")
    for name in ("tests", "jobs", "Makefile", "constraints.txt", "pyproject.toml"):
        (place / name).symlink_to(ROOT / name)
    environment = {"MPITRAIN_CACHE": str(place / "cache")}
    done = mpitrain(1, *flags, "--train.max_steps", "1", "--out", "made", cwd=place, **environment)
    assert done.returncode == 0, done.stderr
    for out in ("bert-base-cased", "pretrained/bert-base-cased"):
        done = mpitrain(1, "export", "--checkpoint", "made", "--out", out, cwd=place, **environment)
        assert done.returncode == 0, done.stderr
    for run in ("one", "other", "first"):
        shutil.copytree(place / "made", place / "runs" / run)
    return place


def test_no_exception_is_for_nothing():
    shown = "\n".join(command for guide in GUIDES for command in commands_of(guide))
    assert [each for each in (*ELSEWHERE, *QUICK, *STANDS_FOR) if each not in shown] == []


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("guide", GUIDES)
def test_the_commands_of_a_guide_run(reader: Path, tmp_path: Path, guide: str):
    commands, place = commands_of(guide), tmp_path / "place"
    shutil.copytree(reader, place, symlinks=True)
    assert commands
    for command in commands:
        if not any(each in command for each in ELSEWHERE):
            run(place, command)


def run(place: Path, command: str) -> None:
    """In a shell, in the reader's directory."""
    for shown, meant in STANDS_FOR.items():
        command = command.replace(shown, meant)
    for benchmark in re.findall(r"tests/benchmarks/\w+\.py", command):
        assert (ROOT / benchmark).is_file()
        command = f"python {benchmark} --help"
    command = re.sub(r"\bmake (?=\w)", "make -n ", command)  # tests and runs of their own: what they would do is enough
    command += "".join(f" {flags}" for what, flags in QUICK.items() if what in command)
    short = {f"MPITRAIN_{name}": value for name, value in SHORT.items()}
    environment = clean_environment(MPITRAIN_CACHE=str(place / "cache"), PATH=f"{BIN}:{os.environ['PATH']}", **short)
    done = subprocess.run(
        ["bash", "-c", command.replace(".venv/bin/", "")],
        cwd=place,
        env=environment,
        input="Maria Jordan flew to Paris .\n",
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
