"""Event files hold what metrics.jsonl and the evaluations tell, each step once, after a restart too."""

from __future__ import annotations

import pytest
from launching import mpitrain
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import exit_of, make_tiny, metrics_of

from mpitrain.observe.board import CURVES

# An epoch is three steps; the second start begins with step 3, which the first one has done, too.
FLAGS = ["--train.batch_size", "68", "--train.epochs", "2", "--log.tensorboard", "true", "--out", "run"]


def curves_of(run) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    place = tmp_path_factory.mktemp("board")
    line = [*make_tiny(place), *FLAGS, "--checkpoint.every", "2", "--checkpoint.async", "false"]
    environment = {"MPITRAIN_CACHE": str(place / "cache")}
    died = mpitrain(
        2, *line, "--checkpoint.best", "false", cwd=place, MPITRAIN_FAILPOINT="reduce:0:4=raise", **environment
    )
    assert died.returncode == 70, died.stderr
    assert [line["step"] for line in metrics_of(place / "run")] == [1, 2, 3]
    done = mpitrain(2, *line, cwd=place, **environment)
    assert done.returncode == 0 and "step 2" in done.stdout, done.stdout + done.stderr
    return place / "run"


def test_every_step_is_there_once_with_what_metrics_tell(resumed):
    assert exit_of(resumed)["code"] == 0
    curves, metrics = curves_of(resumed), metrics_of(resumed)
    for heading, names in CURVES.items():
        for name in names:
            steps, values = zip(*curves[f"{heading}/{name}"], strict=True)
            assert steps == (1, 2, 3, 4, 5, 6)
            assert values == pytest.approx([line[name] for line in metrics], rel=1e-6)


def test_scores_are_there_after_each_epoch(resumed):
    curves = curves_of(resumed)
    assert [step for step, _ in curves["dev/f1_conlleval"]] == [3, 6]
    assert {tag for tag in curves if tag.startswith("dev/")} == {
        f"dev/{name}" for name in ("loss", "token_accuracy", "f1_conlleval", "f1_strict")
    }


def test_without_the_package_all_ranks_end_with_what_to_install(tmp_path):
    (tmp_path / "tensorboard.py").write_text("raise ImportError('not here')\n")
    done = mpitrain(
        3, *make_tiny(tmp_path), *FLAGS, cwd=tmp_path, PYTHONPATH=str(tmp_path), MPITRAIN_CACHE=str(tmp_path / "cache")
    )
    assert done.returncode == 64 and "pip install 'mpitrain[tensorboard]'" in done.stderr, done.stderr
    assert done.stderr.count("error:") == 1
