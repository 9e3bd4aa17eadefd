"""`mpitrain report`: one page of one or several runs, its figures as PNG beside it, and what there is of a pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from mpitrain.errors import DataError, UsageError
from mpitrain.files import replace_file, user_path
from mpitrain.observe.console import Console
from mpitrain.pipeline.draw import chart
from mpitrain.report import figures
from mpitrain.report.facts import facts
from mpitrain.report.figures import Picture, picture
from mpitrain.report.page import render
from mpitrain.report.recorded import Recorded, read_runs
from mpitrain.report.style import png_of, styled, svg_of
from mpitrain.report.timeline import Step, panels_of, read_steps, table_of
from mpitrain.runtime.agree import Comm, together

PAGE = "report.html"
NEEDED = ("matplotlib", "jinja2")
SECTIONS = {
    "Learning": figures.LEARNING,
    "Speed": figures.SPEED,
    "Ranks": figures.RANKS,
    "Scores": figures.SCORES,
    "Node-hours": figures.COST,
}


def report(comm: Comm, paths: Sequence[Path], out: Path, console: Console) -> None:
    """Print what there is to say of each run, and write `report.html` and PNGs into `out` (collective).

    Raises:
        DataError: a directory is no run.
        UsageError: matplotlib is missing, or `out` cannot be written.
    """
    with together(comm, "reporting"):
        if comm.rank == 0:
            runs = read_runs(paths)
            traced = [(run, *found) for run in runs if (found := trace_of(run)) is not None]
            for run in runs:
                say(run, console)
            for run, steps, crowded in traced:
                if crowded:
                    console.warn(
                        f"{run.name}: ranks shared cores: what others took of them counts as if it had been computed"
                    )
                console.show(table_of(steps))
            missing = [name for name in NEEDED if find_spec(name) is None]
            if missing:
                raise UsageError(f"report: needs {' and '.join(missing)}: pip install 'mpitrain[report]'")
            write(out, runs, [(run, steps) for run, steps, _ in traced], console)


def trace_of(run: Recorded) -> tuple[list[Step], bool] | None:
    """Of a run that was trained with --trace N, and came that far; damage is told among its notes."""
    file = run.path / "trace" / "trace.json"
    try:
        return read_steps(file) if file.is_file() else None
    except DataError as error:
        run.notes.append(str(error))
        return None


def say(run: Recorded, console: Console) -> None:
    """The summary of a run, and what is wrong with its files."""
    told = facts(run)
    for topic, names in (("run", ("Model", "Data", "Ranks", "Steps", "Time", "Speed")), ("F1", ("Best F1 on dev",))):
        words = (" ".join(filter(None, told[name])) for name in names)
        console.say(topic, f"{run.path}: {', '.join(words)}" if topic == "run" else ", ".join(words))
    for note in run.notes:
        console.warn(f"{run.name}: {note}")


def write(out: Path, runs: Sequence[Recorded], traced: Sequence[tuple[Recorded, list[Step]]], console: Console) -> None:
    """The page, last, and each figure as PNG."""
    sections = {
        heading: [drawn for figure in wanted if (drawn := picture(figure, runs)) is not None]
        for heading, wanted in SECTIONS.items()
    }
    sections["Pipeline"] = [timeline(run, steps, number, len(runs)) for number, (run, steps) in enumerate(traced)]
    order = ("Learning", "Scores", "Speed", "Pipeline", "Ranks")  # the page has a bar of its own for node-hours
    page = render(runs, {heading: sections[heading] for heading in order})
    with user_path("--out", out):
        out.mkdir(parents=True, exist_ok=True)
        for each in (each for pictures in sections.values() for each in pictures):
            (out / f"{each.key}.png").write_bytes(each.png)
        replace_file(out / PAGE, page)
    console.say("written", f"{out / PAGE}: open it in a browser; it needs no other file")


def timeline(run: Recorded, steps: list[Step], number: int, num_runs: int) -> Picture:
    """The step of median length, measured and predicted."""
    with styled():
        figure = chart(panels_of(steps), "ms")
        key = f"timeline-{number + 1}" if number else "timeline"
        name = f"Pipeline of {run.name}" if num_runs > 1 else "Pipeline"
        caption = (
            "Passes of each stage in the traced step of median length, above as measured, below as the schedule has it "
            "for the same times; numbers are micro-batches, gaps are idle."
        )
        return Picture(key, name, caption, svg_of(figure, key), png_of(figure))
