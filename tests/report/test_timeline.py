"""A traced run tells what each rank did when, and its bubble stands beside the one that the schedule promises."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import pairwise

import pytest
from launching import mpitrain
from tiny import exit_of, make_tiny

from mpitrain.errors import DataError
from mpitrain.report.timeline import read_steps


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    place = tmp_path_factory.mktemp("report")
    return place, make_tiny(place), {"MPITRAIN_CACHE": str(place / "cache")}


def train(problem, ranks: int, out: str, *flags: str):
    place, common, environment = problem
    done = mpitrain(ranks, *common, "--out", out, *flags, cwd=place, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done, place / out / "trace" / "trace.json"


@pytest.mark.parametrize(
    "ranks, flags, passes",
    [
        (2, ["--mesh.pipe", "2", "--pipeline.schedule", "zb-v"], 2 * 2 * 3),
        (3, ["--mesh.data", "3"], 2),
        (4, ["--mesh.pipe", "2", "--pipeline.schedule", "1f1b"], 2 * 2),
        (4, ["--mesh.pipe", "2", "--mesh.tensor", "2"], 2 * 2 * 2),
    ],
)
def test_a_run_leaves_the_trace_of_the_steps_asked_for_and_a_report_of_it(problem, ranks, flags, passes):
    out = f"traced-{ranks}-{len(flags)}-{flags[-1]}"
    done, file = train(problem, ranks, out, "--trace", "3", "--train.max_steps", "6", *flags)
    assert f"open it at https://ui.perfetto.dev, or: python -m mpitrain report {out}" in done.stdout
    events = [event for event in json.loads(file.read_text())["traceEvents"] if event["ph"] == "X"]
    assert {event["args"]["step"] for event in events} == {3, 4, 5}
    assert {event["pid"] for event in events} == set(range(ranks))
    assert min(event["ts"] for event in events) == 0
    computed = Counter(event["args"]["step"] for event in events if event["cat"] == "compute")
    assert computed == dict.fromkeys([3, 4, 5], 4 * passes), "each pass of each micro-batch once, whoever does it"
    steps = Counter((event["name"], event["pid"]) for event in events if event["cat"] == "step")
    assert steps == {(name, rank): 3 for name in ("wait for reduce", "update") for rank in range(ranks)}
    reduced = [event for event in events if event["cat"] == "reduce"]
    assert {event["pid"] for event in reduced} == set(range(ranks)) and {event["tid"] for event in reduced} == {1}
    for rank in range(ranks):
        spans = sorted((event["ts"], event["dur"]) for event in events if event["pid"] == rank and event["tid"] == 0)
        assert all(a + long <= b + 1 for (a, long), (b, _) in pairwise(spans)), "one at a time"
    shown = mpitrain(1, "report", out, cwd=problem[0])
    assert shown.returncode == 0, shown.stderr
    rows = [line.split() for line in shown.stdout.splitlines() if line.strip()[:1].isdigit()]
    in_a_replica = 1 if "--mesh.data" in flags else 4 if "--mesh.tensor" in flags else 2
    replicas = range(ranks // in_a_replica)
    assert [row[:2] for row in rows] == [[str(step), str(replica)] for step in (3, 4, 5) for replica in replicas]
    drawn = file.parent.parent / "report"
    assert (drawn / "timeline.png").read_bytes().startswith(b"\x89PNG")
    timeline = re.search(r'<figure id="timeline".*?</figure>', (drawn / "report.html").read_text(), re.DOTALL)
    assert timeline and "stage 0" in timeline[0] and "as the schedule has it" in timeline[0]
    found, crowded = read_steps(file)
    assert crowded == ("ranks shared cores" in shown.stdout)
    assert all(0 <= step.predicted.bubble <= step.measured.bubble + 1e-9 < 1 for step in found)


def test_a_run_that_ends_before_the_last_traced_step_leaves_those_there_are(problem):
    _, file = train(problem, 2, "short", "--trace", "9", "--train.max_steps", "4", "--mesh.pipe", "2")
    events = [event["args"] for event in json.loads(file.read_text())["traceEvents"] if event["ph"] == "X"]
    assert {event["step"] for event in events} == {3, 4}
    computed = Counter(event["step"] for event in events if "kind" in event)
    assert computed[3] == computed[4], "nothing of the evaluation that follows"
    assert len(read_steps(file)[0]) == 2


@pytest.mark.parametrize("flags", [["--train.max_steps", "2", "--trace", "3"], ["--train.max_steps", "3"]])
def test_where_nothing_was_recorded_no_trace_is_left(problem, flags):
    done, file = train(problem, 1, f"none-{len(flags)}", *flags)
    assert not file.parent.exists() and "perfetto" not in done.stdout
    warning = "--trace 3: no step was recorded; the first 2 of a start are left out, and this one had 2"
    assert (warning in " ".join(done.stdout.split())) == ("--trace" in flags)


def test_a_trace_that_cannot_be_written_is_not_worth_a_run(problem):
    (problem[0] / "blocked" / "checkpoints").mkdir(parents=True)
    (problem[0] / "blocked" / "trace").write_text("in the way")
    done, file = train(problem, 2, "blocked", "--trace", "2", "--train.max_steps", "5")
    assert re.search(r"warning +--trace .*trace.json: (File exists|Not a directory)", done.stdout), done.stdout
    assert exit_of(file.parent.parent)["code"] == 0


def trace_of(tmp_path, order: list[tuple[int, str, int, float, float]], places=((0,), (1,))):
    """(rank, kind, micro-batch, start, stop) in ms."""
    events = [
        {
            **{"ph": "X", "cat": "compute", "name": kind, "pid": rank, "tid": 0},
            **{"ts": 1e3 * start, "dur": 1e3 * (stop - start)},
            "args": {"step": 1, "micro_batch": number, "chunk": 0, "kind": kind},
        }
        for rank, kind, number, start, stop in order
    ]
    (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": events, "otherData": {"places": places}}))
    return tmp_path / "trace.json"


def test_what_messages_take_is_in_the_measured_bubble_alone(tmp_path):
    passes = [(0, "forward", 0, 5, 6), (1, "forward", 0, 7, 8), (1, "backward", 0, 8, 10), (0, "backward", 0, 11, 13)]
    [step], crowded = read_steps(trace_of(tmp_path, passes))
    assert (step.number, step.replica, crowded) == (1, 0, False)
    assert (step.measured.makespan, step.predicted.makespan) == pytest.approx((8, 6))
    assert step.measured.bubble == pytest.approx(1 - 3 / 8)
    assert step.predicted.bubble == pytest.approx(1 - 3 / 6)


def test_each_pass_counts_with_its_own_time(tmp_path):
    passes = [(0, "forward", n, sum(range(1, n + 1)), sum(range(1, n + 2))) for n in range(3)]
    passes += [(1, "forward", n, stop, stop + 1) for n, (*_, stop) in enumerate(passes)]
    back = [(1, "backward", n, 10 + n, 11 + n) for n in range(3)]
    passes += back + [(0, "backward", n, stop, stop + 1) for _, _, n, _, stop in back]
    [step], _ = read_steps(trace_of(tmp_path, passes))
    assert [span.stop for span in step.predicted.spans[0][:3]] == [1, 3, 6]


PASS = '{"ph": "X", "cat": "compute", "pid": 0}'
NO_TRACES = ["", "{}", "[]", '{"traceEvents": [], "otherData": {"places": [[0]]}}', '{"otherData": 1}', "\xff"]
PLACES = ('[[0]], "tensor": 0', "[]")
NO_TRACES += [f'{{"traceEvents": [{PASS}], "otherData": {{"places": {told}}}}}' for told in PLACES]


@pytest.mark.parametrize("text", NO_TRACES)
def test_what_is_no_trace_is_refused(tmp_path, text):
    (tmp_path / "trace.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=r"is no trace of a run|holds no step"):
        read_steps(tmp_path / "trace.json")


def test_a_pass_that_never_was_or_two_of_the_same_make_no_step(tmp_path):
    for passes in ([(0, "forward", 0, 0, 1)], [(0, "forward", 0, 0, 1)] * 2):
        with pytest.raises(DataError, match="holds a step that no schedule has: stage"):
            read_steps(trace_of(tmp_path, passes))
