"""Node-hours add up, whatever became of the starts of a run; what was done again is counted as lost."""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from launching import finish, mpitrain, start
from tiny import make_tiny, metrics_of, ranks_of

from mpitrain.observe.ledger import Start, by_start, node_hours, read_starts, see, settle
from mpitrain.observe.lines import read_lines
from mpitrain.observe.record import RunDirectory

NODES = 3


def begun_at(step: int, seconds: float) -> Start:
    return Start(step=step, ranks=6, nodes=NODES, start=seconds, seconds=seconds)


def steps(first: int, last: int, elapsed: float) -> list[dict[str, float]]:
    """Steps of 10 s, the first of which ends at `elapsed`: 6 s of work, of which 4 are passes; 2 s of bubble."""
    told = {"seconds": 10.0, "work": 6.0, "passes": 4.0, "bubble": 2.0, "copy": 0.5, "save": 0.75}
    tokens = {"tokens": 300, "padding": 100}
    return [
        {"step": step, "elapsed": elapsed + 11.0 * (step - first), **told, **tokens} for step in range(first, last + 1)
    ]


def in_seconds(found: dict[str, float]) -> dict[str, float]:
    assert sum(found.values()) == pytest.approx(2 * found["used"]), "the parts add up"
    return {name: hours * 3600 / NODES for name, hours in found.items()}


def test_the_parts_of_a_start_are_disjoint_and_add_up_to_its_time():
    starts, lines = [begun_at(0, 18)], steps(1, 4, elapsed=30)
    scored = [{"start": 1, "step": 4, "seconds": 5.0, "elapsed": 70.0}]
    see(starts, lines, scored)
    starts[0].seconds, starts[0].saves = 100, 3.0
    assert in_seconds(node_hours(starts, lines, scored)) == pytest.approx(
        {
            "used": 100,
            "computing": 4 * 6 - 4,
            "padding": 4,  # a quarter of the tokens of 4 x 4 s of passes
            "bubble": 4 * 2,
            "waiting": 4 * (10 - 6 - 2 - 0.5),
            "saves": 4 * 0.75 + 3,
            "evaluation": 5,
            "start": 20,
            "restarts": 0,
            "other": 100 - 20 - 4 * 10.25 - 3 - 5,
        }
    )


def test_steps_that_are_done_again_are_lost_with_all_that_came_after_them():
    starts, lines = [begun_at(0, 18)], steps(1, 4, elapsed=30)
    settle(starts, lines, [{"start": 1, "step": 4, "seconds": 1.0, "elapsed": 80.0}], 2)
    again = begun_at(2, 7)
    kept, new = lines[:2], steps(3, 6, elapsed=18)
    found = [*starts, again]
    see(found, [*kept, *new], [])
    assert (starts[0].seconds, starts[0].lost) == (80, 80 - (52 - 10)), "alive until its last line, lost from step 3 on"
    told = in_seconds(node_hours(found, [*kept, *new], []))
    assert told["restarts"] == pytest.approx(38 + 8)
    assert told["start"] == 20 and told["computing"] == pytest.approx(6 * 5)
    assert told["used"] == pytest.approx(80 + 51)


def test_scores_that_a_start_makes_up_for_before_its_first_step_count_once_and_as_its_own():
    starts, lines = [begun_at(0, 18)], steps(1, 2, elapsed=30)  # stopped while it scored, at 45 s
    starts[0].seconds = 45
    settle(starts, lines, [], 2)
    starts.append(begun_at(2, 9))
    scored = [{"start": 2, "step": 2, "seconds": 15.0, "elapsed": 24.0}]
    lines += steps(3, 3, elapsed=36)
    see(starts, lines, scored)
    told = in_seconds(node_hours(starts, lines, scored))
    assert (told["evaluation"], told["restarts"], told["used"]) == pytest.approx((15, 26 - 15, 45 + 36))


def test_a_start_that_falls_back_behind_others_takes_their_steps_from_all_of_them():
    starts, lines = [begun_at(0, 18)], steps(1, 4, elapsed=30)
    settle(starts, lines, [], 4)
    assert starts[0].lost == 0
    lines += steps(5, 6, elapsed=20)
    starts.append(begun_at(4, 9))
    settle(starts, lines, [], 3)
    starts.append(begun_at(3, 9))
    assert [start.lost for start in starts] == [10, 31 - 10, 0]
    assert [len(own) for own in by_start(starts, lines[:3])] == [3, 0, 0]
    assert in_seconds(node_hours(starts, lines[:3], []))["restarts"] == pytest.approx(10 + (10 + 21) + 9)


values = st.none() | st.floats() | st.integers() | st.text(max_size=2)
line = st.fixed_dictionaries(
    {"step": st.integers(1, 30)},
    optional=dict.fromkeys(
        ("start", "elapsed", "seconds", "work", "passes", "bubble", "copy", "save", "tokens"), values
    ),
)


@settings(deadline=None)
@given(st.lists(st.integers(0, 20), max_size=4), st.lists(line, max_size=8), st.lists(line, max_size=3))
def test_whatever_the_files_hold_parts_add_up_and_none_is_negative(first, lines, scored):
    starts: list[Start] = []
    for step in first:
        settle(starts, lines, scored, step)
        starts.append(begun_at(step, 1))
    found = node_hours(starts, lines, scored)
    assert min(found.values()) >= 0
    assert sum(found.values()) == pytest.approx(2 * found["used"])


@pytest.mark.parametrize("text", ["", "{}", "[1]", '[{"step": -1}]', "[" * 10_000, "\xff"])
def test_a_damaged_ledger_counts_for_nothing(text):
    assert read_starts(text) == []


def test_lines_that_are_cut_or_damaged_are_left_out_and_counted(tmp_path):
    (tmp_path / "file").write_bytes(b'{"step": 1}\ngarbage\n\n{"step": 1e999}\n{"step": 2}\n{"step": 3')
    assert read_lines(tmp_path / "file") == ([{"step": 1}, {"step": 2}], 3)
    assert read_lines(tmp_path / "none") == ([], 0)


def test_a_run_that_is_killed_and_started_again_counts_both_starts(tmp_path):
    flags, environment = make_tiny(tmp_path), {"MPITRAIN_CACHE": str(tmp_path / "cache")}
    words = (*flags, "--train.max_steps", "30", "--checkpoint.every", "8", "--mesh.pipe", "2", "--out", "run")
    mark, run = f"ledger-{os.getpid()}", tmp_path / "run"
    slow = {"MPITRAIN_FAILPOINT": "forward:0=sleep0.02"}
    process = start(2, "-m", "mpitrain", *words, cwd=tmp_path, **environment, **slow, TEST_MARK=mark)
    limit = time.monotonic() + 90
    while len(metrics_of(run)) < 12:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit
        time.sleep(0.01)
    os.kill(ranks_of(f"TEST_MARK={mark}")[1], signal.SIGKILL)
    finish(process, 30)
    assert not (run / "exit.json").exists()
    before = metrics_of(run)
    done = mpitrain(2, *words, cwd=tmp_path, **environment)
    assert done.returncode == 0 and "resume   step 8 from" in done.stdout, done.stdout + done.stderr
    first, second = read_starts((run / "ledger.json").read_text())
    assert (first.step, second.step, first.ranks, first.nodes) == (0, 8, 2, 1)
    assert first.seconds >= before[-1]["elapsed"]
    assert first.lost == pytest.approx(first.seconds - before[8]["elapsed"] + before[8]["seconds"])
    told = json.loads((run / "exit.json").read_text())["node_hours"]
    assert told["used"] * 3600 == pytest.approx(first.seconds + second.seconds)
    assert told["restarts"] * 3600 == pytest.approx(first.lost + second.start)
    assert sum(told.values()) == pytest.approx(2 * told["used"])
    for part in ("computing", "padding", "bubble", "waiting", "saves", "evaluation", "start"):
        assert told[part] > 0, part
    ranks = json.loads((run / "ranks.json").read_text())
    assert [(rank["rank"], rank["replica"], rank["stage"], rank["tensor"]) for rank in ranks] == [
        (0, 0, 0, 0),
        (1, 0, 1, 0),
    ]
    assert all(2**27 < rank["memory"] < 2**33 and rank["work"] > 0 for rank in ranks)
    evaluations = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert [(line["split"], line["step"]) for line in evaluations][:2] == [("dev", 26), ("dev", 30)]
    scores = json.loads((run / "eval.json").read_text())
    assert evaluations[-1]["split"] == "test" and evaluations[-1]["f1_conlleval"] == scores["test"]["f1_conlleval"]


def test_a_rank_that_is_ended_while_it_tells_the_code_leaves_what_another_has_told(tmp_path, monkeypatch):
    RunDirectory(tmp_path).write_exit(70, "first", 3)
    whole = (tmp_path / "exit.json").read_text()
    assert json.loads(whole)["node_hours"]["used"] == 0
    monkeypatch.setattr(RunDirectory, "_settled", lambda *told: sys.exit("by another rank"))
    with pytest.raises(SystemExit):
        RunDirectory(tmp_path).write_exit(70, "second", 3)
    assert (tmp_path / "exit.json").read_text() == whole and len(list(tmp_path.iterdir())) == 1
    (tmp_path / "exit.json").unlink()
    with pytest.raises(SystemExit):
        RunDirectory(tmp_path).write_exit(70, "alone", 3)
    assert json.loads((tmp_path / "exit.json").read_text()) == {"code": 70, "reason": "alone", "step": 3}
