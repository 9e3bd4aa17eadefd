"""What a person sees: lines by topic, and progress as a bar on a terminal, as lines elsewhere; rank 0 alone speaks."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from mpitrain.observe.terminal import terminal_width

SECONDS_BETWEEN_LINES = 5.0  # where there is no bar
SECONDS_BETWEEN_PICTURES = 0.1  # of the bar


class _Unbreakable(RichConsole):
    """Goes quiet when nobody reads on, as in `... | head`, or a disk is full: a training run must not end by that."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())

    def _check_buffer(self) -> None:
        try:
            super()._check_buffer()
        except OSError:
            self.on_broken_pipe()


class Console:
    """Rank 0's voice; on other ranks every method does nothing."""

    def __init__(self, loud: bool, *, to_stderr: bool = False) -> None:
        """Speak only if `loud`, that is on rank 0; on standard error where standard output carries results."""
        self.loud = loud
        width = terminal_width() if loud and not to_stderr else None
        self._rich = _Unbreakable(
            stderr=to_stderr, quiet=not loud, highlight=False, soft_wrap=True, width=width, force_terminal=bool(width)
        )
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._last_line = 0.0

    def say(self, topic: str, text: str) -> None:
        """A line with its topic in front."""
        self.show(Text.assemble((f"{topic:<9}", "bold"), text))

    def warn(self, text: str) -> None:
        """A line that should not be overlooked."""
        self.show(Text.assemble(("warning  ", "bold yellow"), text))

    def show(self, renderable: Any) -> None:
        """A table, or any other thing that rich can draw."""
        self._rich.print(renderable)

    def start_steps(self, done: int, total: int) -> None:
        """Begin to show progress, from step `done` to `total`."""
        if not (self.loud and self._rich.is_terminal):
            return
        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
        )
        # A thread that draws would use the processor, and so be taken for work (`runtime.watchdog`).
        self._progress = Progress(*columns, console=self._rich, transient=True, auto_refresh=False)
        self._progress.start()
        self._task = self._progress.add_task("training", total=total, completed=done, numbers="")

    def step(self, metrics: Mapping[str, Any], total: int) -> None:
        """Show a finished step."""
        numbers = f"loss {metrics['loss']:.4f}  {metrics['tokens_per_second']:,.0f} tokens/s"
        if self._progress is not None and self._task is not None:
            epoch = f"epoch {metrics['epoch'] + 1}"
            self._progress.update(self._task, completed=metrics["step"], description=epoch, numbers=numbers)
            if time.monotonic() - self._last_line > SECONDS_BETWEEN_PICTURES or metrics["step"] == total:
                self._last_line = time.monotonic()
                self._progress.refresh()
        elif self.loud and (time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES or metrics["step"] == total):
            self._last_line = time.monotonic()
            self.say("step", f"{metrics['step']:>6}/{total}  epoch {metrics['epoch'] + 1}  {numbers}")

    def stop_steps(self) -> None:
        """Take the progress bar away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = self._task = None


def score_table(split: str, report: Mapping[str, Any], replicas: Sequence[Mapping[str, Any]], *, plain: bool) -> Table:
    """Scores per type, then a line per replica, then the line of all.

    Args:
        report: of the whole split, as in eval.json.
        replicas: reports of each replica's share.
        plain: each word is scored by its tag, because there are no entities.
    """
    title = f"{split}: {'tag scores (each word)' if plain else 'entity scores (conlleval)'}"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for name in ("", "precision", "recall", "F1", "support"):
        table.add_column(name, justify="left" if not name else "right")
    for kind, scores in report["per_type"].items():
        table.add_row(
            escape(kind), *(f"{scores[key]:.4f}" for key in ("precision", "recall", "f1")), f"{scores['support']:,}"
        )
    table.add_row()  # what follows are no types
    for number, share in enumerate(replicas):
        totals = _totals(share) if share["sentences"] else ["-", "-", "-", "no sentences"]
        table.add_row(f"replica {number}", *totals, style="dim")
    table.add_row("all", *_totals(report), style="bold")
    return table


def _totals(report: Mapping[str, Any]) -> list[str]:
    scores = [f"{report[f'{key}_conlleval']:.4f}" for key in ("precision", "recall", "f1")]
    return [*scores, f"{sum(kind['support'] for kind in report['per_type'].values()):,}"]
