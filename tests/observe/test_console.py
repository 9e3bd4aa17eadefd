"""What a person sees of a run: one line of progress that fits the screen, and no more words than were asked for."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Group
from rich.table import Table

from mpitrain.observe.console import Console

METRICS = {"step": 0, "epoch": 11, "loss": 0.123456, "tokens": 41_000, "seconds": 0.5, "tokens_per_second": 82_000.0}
METRICS |= {
    "data": 0.01,
    "forward_backward": 0.3,
    "pipeline_wait": 0.3,
    "bubble": 0.1,
    "reduce": 0.05,
    "update": 0.04,
    "save": 0.0,
}


def a_console(width: int | None, level: str = "info") -> tuple[Console, io.StringIO]:
    """One that writes on a terminal of that many columns, or into a file."""
    console, written = Console(loud=True, level=level), io.StringIO()
    told = {"file": written, "width": width or 80, "force_terminal": bool(width), "soft_wrap": True}
    console._rich = type(console._rich)(**told, _environ={})
    return console, written


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


@pytest.mark.parametrize("width", [80, 100, 120])
def test_progress_of_a_long_run_is_one_line_with_all_numbers(width):
    console, written = a_console(width)
    console.start_steps(0, 20_000)
    for step in range(1, 4):
        console.step(METRICS | {"step": step}, 3, 0.9123)
    console.stop_steps()
    lines = [line.strip() for line in re.split(r"[\r\n]+", plain(written.getvalue())) if "/20000" in line]
    assert len(lines) >= 1
    for number in ("loss 0.1235", "F1 0.9123", "82,000 tok", "bubble 20%", "reduce 10%", "━"):
        assert number in lines[-1], (number, lines[-1])
    assert all(len(line) <= width and "…" not in line for line in lines), lines


@pytest.mark.parametrize("width", [80, 120, None])
def test_on_a_terminal_words_stay_whole_and_behind_their_topic(width):
    console, written = a_console(width)
    words = "some words of it " * 12
    console.say("topic", words.strip())
    console.warn(words.strip())
    lines = plain(written.getvalue()).splitlines()
    assert [line[:9] for line in lines if line[:1] != " "] == ["topic    ", "warning  "]
    assert " ".join(line[9:] for line in lines) == (words * 2).strip()
    assert len(lines) == 2 if width is None else width - 6 < max(map(len, lines)) <= width


def test_on_a_terminal_a_topic_alone_is_bold_and_a_long_word_stays_whole():
    console, written = a_console(80)
    for tell in (console.say, console.say_whole):
        tell("topic", "words")
    path = "/".join(["directory"] * 12)
    console.say("run", f"into {path}")
    assert written.getvalue().count("\x1b[1mtopic    \x1b[0mwords\n") == 2 and path in written.getvalue()


def test_a_line_to_be_copied_stays_whole():
    console, written = a_console(80)
    command = f"python -m mpitrain export {'--an option ' * 10}"
    console.say_whole("next", command)
    assert plain(written.getvalue()) == f"next     {command}\n"


@pytest.mark.parametrize("width", [40, None])
def test_no_screen_is_too_narrow_for_the_numbers_of_a_table(width):
    console, written = a_console(width)
    table = Table()
    for number in range(12):
        table.add_column(str(number), no_wrap=True)
    table.add_row(*["123,456,789"] * 12)
    for shown in (table, Group("a line", Group(table))):
        written.truncate(0)
        console.show(shown)
        assert plain(written.getvalue()).count("123,456,789") == 12


def test_in_a_file_progress_is_a_line_now_and_then_and_no_bar():
    console, written = a_console(None)
    console.start_steps(0, 100)
    for step in range(1, 101):
        console.step(METRICS | {"step": step, "bubble": 0.0}, 100, None)
    lines = written.getvalue().splitlines()
    assert [line.split()[:2] for line in lines] == [["step", "1/100"], ["step", "100/100"]]
    assert "bubble" not in lines[0] and "F1" not in lines[0] and "\x1b" not in written.getvalue()


def test_speed_is_that_of_recent_steps_not_of_the_last_small_batch():
    console, written = a_console(None)
    console.step(METRICS | {"step": 1}, 9, None)
    console.step(METRICS | {"step": 9, "tokens": 100, "seconds": 0.5}, 9, None)
    assert "41,100 tokens/s" in written.getvalue().splitlines()[-1]


@pytest.mark.parametrize(
    "level, said",
    [
        ("error", ["result"]),
        ("warning", ["warning", "result"]),
        ("info", ["topic", "warning", "result", "step"]),
        ("debug", ["topic", "detail", "warning", "result", "step", "step 1, ms: data 10  forward_backward 300  "]),
    ],
)
def test_a_level_lets_through_what_is_as_important_and_results_always(level, said):
    console, written = a_console(None, level)
    console.say("topic", "a")
    console.detail("detail", "b")
    console.warn("c")
    console.show("result")
    console.step(METRICS | {"step": 1}, 9, None)
    lines = written.getvalue().splitlines()
    assert len(lines) == len(said)
    assert all(line.strip().startswith(start) for line, start in zip(lines, said, strict=True)), lines
