"""A page tells what the files of runs hold, whatever they hold, and needs nothing but itself."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from launching import mpitrain
from recorded import FIGURES, line, make_run, write_lines

from mpitrain.errors import DataError, UsageError
from mpitrain.observe.console import Console
from mpitrain.report import command
from mpitrain.report.facts import duration, facts, hour_table, hours, setting_table
from mpitrain.report.recorded import once, read_run, read_runs
from mpitrain.report.style import LIGHT
from mpitrain.runtime.agree import MPI

HOSTILE = "<img src=x onerror=alert(1)> $\\frac{a}$ & _'\"_"


class Page(HTMLParser):
    """Elements, attributes and text of a page."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.feed(file.read_text(encoding="utf-8"))
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    handle_startendtag = handle_starttag

    def handle_data(self, data):
        self.texts.append(data)


def report(out: Path, *runs: Path) -> Page:
    command.report(MPI.COMM_SELF, runs, out, Console(loud=False))
    return Page(out / "report.html")


def test_a_page_holds_its_figures_and_the_numbers_of_the_run_and_asks_for_nothing(tmp_path):
    page = report(tmp_path / "out", make_run(tmp_path / "mine"))
    ids = [value for name, value in page.attributes if name == "id"]
    assert set(ids) >= FIGURES and len(ids) == len(set(ids)), "each id once"
    assert page.tags.count("svg") == page.tags.count("figure") == len(FIGURES)
    assert not {"script", "img", "iframe", "object"} & set(page.tags)
    asked = [value for name, value in page.attributes if name in ("src", "href", "xlink:href", "action")]
    assert [value for value in asked if not value.startswith("#")] == ["data:,"], "only the absence of an icon"
    assert "url(http" not in (text := (tmp_path / "out" / "report.html").read_text()) and "@import" not in text
    for words in ("mine", "bert-mini", "4 layers x 256", "2 = 1 data x 2 pipe", "on 2 nodes, up to 3.00 GiB each"):
        assert words in page.text, words
    for words in ("60.00 at step 20, on test 55.00", "1,980 tokens/s and 1.00 % padding", "Time 18.0 s"):
        assert words in page.text, words
    assert "Node-hours 0.0100" in page.text, "two nodes for 18 s"
    for key in {*FIGURES, "node-hours"}:
        assert (tmp_path / "out" / f"{key}.png").read_bytes().startswith(b"\x89PNG")


def test_figures_take_the_colours_of_the_page(tmp_path):
    report(tmp_path / "out", make_run(tmp_path / "mine"))
    text = (tmp_path / "out" / "report.html").read_text()
    drawn = " ".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert not [color for color in LIGHT.values() if color in drawn]
    used = set(re.findall(r"var\(--([a-z0-9]+)\)", text))
    assert used >= {"ink", "muted", "grid", "s1", "s2"}
    assert all(len(re.findall(rf"--{role}: #", text)) == 2 for role in LIGHT), "by day and by night"


def test_names_and_labels_of_any_kind_stay_text(tmp_path):
    labels = ("</svg><script>alert(2)</script>", "$x_1^{", "\ud800\x00B", HOSTILE)
    run = make_run(tmp_path / HOSTILE.replace("/", ""), labels=labels, reason=f"</title>{HOSTILE}", precision=HOSTILE)
    runs = [run, make_run(tmp_path / "_other", labels=labels)]
    for page in (report(tmp_path / "one", runs[0]), report(tmp_path / "both", *runs)):
        assert not {"script", "img"} & set(page.tags)
        assert not [name for name, _ in page.attributes if name.startswith("on")]
        assert page.text.count(HOSTILE) >= 4, "heading, reason, label, setting"
        assert "</svg><script>alert(2)</script>" in page.text and "\N{REPLACEMENT CHARACTER}B" in page.text


def test_several_runs_share_their_axes_and_a_table_of_what_differs(tmp_path):
    runs = [make_run(tmp_path / name, learning_rate=rate) for name, rate in (("slow", 1e-4), ("fast", 1e-3))]
    page = report(tmp_path / "out", *runs)
    assert page.tags.count("svg") == len(FIGURES), "a curve more, not a figure"
    assert setting_table(read_runs(runs)) == [["train.learning_rate", "0.0001", "0.001"]]
    assert "Settings that differ" in page.text and "0.0001 0.001" in page.text
    assert page.text.count("slow fast") >= 3, "heads of tables"
    text = (tmp_path / "out" / "report.html").read_text()
    loss = re.search(r'<figure id="loss".*?</figure>', text, re.DOTALL)
    assert loss and "var(--s1)" in loss[0] and "var(--s2)" in loss[0]


def test_runs_of_one_name_are_told_apart(tmp_path):
    runs = [make_run(tmp_path / parent / "run") for parent in ("here", "there")]
    assert [run.name for run in read_runs(runs)] == ["here/run", "there/run"]


def test_a_line_that_a_job_died_while_writing_is_told_and_left_out(tmp_path):
    run = make_run(tmp_path / "killed", steps=7)
    (run / "exit.json").unlink()
    (run / "eval.json").write_text('{"dev": {"f1')
    with (run / "metrics.jsonl").open("a") as file:
        file.write('garbage\n{"step": 8, "loss": 0.2')
    page = report(tmp_path / "out", run)
    assert "metrics.jsonl: 2 line(s) are damaged or cut" in page.text
    assert "eval.json: is missing or damaged" in page.text
    assert "there is no exit.json: the run is under way, or its job was killed" in page.text
    assert "not ended" in page.text and "7 of 20" in page.text and "Scores on dev" in page.text
    assert read_run(run).steps.tolist() == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("name", ["trace/trace.json", "ledger.json", "ranks.json", "evaluations.jsonl", "exit.json"])
def test_a_damaged_file_is_told_and_left_out(tmp_path, name):
    run = make_run(tmp_path / "run")
    (run / "trace").mkdir(exist_ok=True)
    (run / name).write_text('{"a":\n')
    page = report(tmp_path / "out", run)
    assert f"{Path(name).name}: " in page.text and "under way" not in page.text


def test_steps_that_were_done_again_are_drawn_once_as_they_were_last(tmp_path):
    first, again = [line(step, loss=1.0) for step in range(1, 9)], [line(step, loss=2.0) for step in range(5, 7)]
    kept = once([*first, *again])
    assert [(each["step"], each["loss"]) for each in kept] == [(n, 1.0 if n < 5 else 2.0) for n in range(1, 7)]
    damaged = [*first[:5], line(2, loss=9.0), *first[5:]]
    assert once(damaged) == first, "a step that nobody went on from"
    run = make_run(tmp_path / "again")
    write_lines(run / "metrics.jsonl", [*first, *again])
    assert "4 line(s) are of steps that were done again" in report(tmp_path / "out", run).text


def test_a_mark_stands_where_a_run_was_started_again(tmp_path):
    run = make_run(tmp_path / "again")

    def marks() -> int:
        report(tmp_path / "out", run)
        loss = re.search(r'<figure id="loss".*?</figure>', (tmp_path / "out" / "report.html").read_text(), re.DOTALL)
        assert loss
        return loss[0].count("stroke-dasharray")

    before = marks()
    starts = json.loads((run / "ledger.json").read_text())
    (run / "ledger.json").write_text(json.dumps([*starts, starts[0] | {"step": 12}]))
    assert marks() == before + 1


@pytest.mark.parametrize("left", ["all of it", "steps", "numbers"])
def test_a_run_that_tells_less_still_has_a_page(tmp_path, left):
    run = tmp_path / "old"
    make_run(run)
    for file in run.iterdir():
        if file.name != "metrics.jsonl":
            file.unlink()
    told = {"all of it": line(1), "steps": {"step": 1}, "numbers": line(1, loss=None, tokens="many", seconds=math.nan)}
    write_lines(run / "metrics.jsonl", [told[left]])
    page = report(tmp_path / "out", run)
    assert "config.json: is missing or damaged" in page.text
    assert ("svg" in page.tags) == (left != "steps")


def test_a_run_that_has_not_come_to_a_step_has_a_page_that_says_so(tmp_path):
    run = make_run(tmp_path / "empty", steps=0)
    assert "metrics.jsonl: tells of no step" in report(tmp_path / "out", run).text


ODD = [None, "<b>text</b>", [], {}, [[1]], True, -1, 0, 1e308, math.inf, 10**400, "\ud800"]


def replaced(value, odd):
    """The same table with something else for each value; steps are left, or there would be none."""
    if isinstance(value, dict):
        return {key: each if key in ("step", "split") else replaced(each, odd) for key, each in value.items()}
    return [replaced(each, odd) for each in value] if isinstance(value, list) else odd


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: repr(odd)[:20])
def test_whatever_the_values_are_there_is_a_page(tmp_path, odd):
    run = make_run(tmp_path / "odd", steps=3)
    for file in run.iterdir():
        documents = [json.loads(text) for text in file.read_text().splitlines()] if file.suffix == ".jsonl" else None
        if documents is not None:
            write_lines(file, [replaced(each, odd) for each in documents])
        else:
            file.write_text(json.dumps(replaced(json.loads(file.read_text()), odd)))
    assert "odd" in report(tmp_path / "out", run).text
    for name in ("config.json", "eval.json", "exit.json", "ledger.json", "ranks.json", "evaluations.jsonl"):
        (run / name).write_text(json.dumps(odd))
    assert "config.json: is missing or damaged" in report(tmp_path / "out", run).text or odd == {}


def test_node_hours_of_a_page_add_up(tmp_path):
    *parts, (name, [used], _) = hour_table([read_run(make_run(tmp_path / "mine"))])
    assert (name, used) == ("used", "0.0100")
    shares = [float(cells[0].split("(")[1].rstrip("%)")) for _, cells, _ in parts]
    assert sum(shares) == pytest.approx(100, abs=0.5)
    known = {part: cells[0].split()[0] for part, cells, _ in parts}
    assert known["bubble"] == hours(20 * 0.1 * 2 / 3600) and known["start"] == hours(4.0 * 2 / 3600)


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"nowhere: holds no metrics\.jsonl: give a run directory"):
        report(tmp_path / "out", make_run(tmp_path / "mine"), tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()


def test_without_matplotlib_an_error_says_what_brings_it(tmp_path, monkeypatch):
    run = make_run(tmp_path / "mine")
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "matplotlib" else object())
    with pytest.raises(UsageError, match=r"report: needs matplotlib: pip install 'mpitrain\[report\]'"):
        report(tmp_path / "out", run)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_command_says_where_the_page_is_or_what_is_wrong(tmp_path, ranks):
    make_run(tmp_path / "mine")
    done = mpitrain(ranks, "report", "mine", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "written  mine/report/report.html: open it in a browser; it needs no other file" in done.stdout
    assert (tmp_path / "mine" / "report" / "report.html").is_file()
    done = mpitrain(ranks, "report", "mine", "nothing", cwd=tmp_path)
    assert done.returncode == 65
    assert "nothing: holds no metrics.jsonl" in done.stderr


def test_times_are_told_in_two_units():
    told = [duration(seconds) for seconds in (0.25, 59.94, 61, 3600, 7384, math.nan)]
    assert told == ["0.2 s", "59.9 s", "1 min 1 s", "1 h 0 min", "2 h 3 min", "-"]


def test_facts_of_a_run_in_several_starts_count_them(tmp_path):
    run = make_run(tmp_path / "mine")
    starts = json.loads((run / "ledger.json").read_text())
    (run / "ledger.json").write_text(json.dumps([*starts, starts[0] | {"step": 12}]))
    assert facts(read_run(run))["Time"] == ("36.0 s", "in 2 starts")
