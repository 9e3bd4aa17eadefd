"""What a person sees: lines by topic, and progress as a bar on a terminal, as lines elsewhere; rank 0 alone speaks."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import Any

from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderableType, RenderResult
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from mpitrain.observe.terminal import terminal_width

SECONDS_BETWEEN_LINES = 5.0  # where there is no bar
SECONDS_BETWEEN_PICTURES = 0.1  # of the bar
WIDEST = 1000  # columns of a table
WIDE = 110  # columns from which on all numbers have room beside a bar
NARROWEST = 20  # columns of a paragraph
LEVELS = ("debug", "info", "warning", "error")
RECENT = 20  # steps that speed and shares are of: batches differ in size
LEAST_SHARE = 0.005  # of a step that is worth a word
PARTS = ("data", "forward_backward", "pipeline_wait", "reduce", "update", "save")  # of a step


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


@dataclass(frozen=True)
class _Roomy:
    """Something to draw as if the screen were so wide that tables lose no digit."""

    what: RenderableType

    def __rich_console__(self, console: RichConsole, options: ConsoleOptions) -> RenderResult:
        yield from console.render(self.what, options.update(max_width=WIDEST))


class Console:
    """Rank 0's voice; on other ranks every method does nothing."""

    def __init__(self, loud: bool, *, to_stderr: bool = False, level: str = "info") -> None:
        """Speak only if `loud`, that is on rank 0; on standard error where standard output carries results.

        Args:
            level: of LEVELS, which may change later; what is shown, not said, is a result and has none.
        """
        self.loud, self.level = loud, level
        width = terminal_width() if loud and not to_stderr else None
        self._rich = _Unbreakable(
            stderr=to_stderr, quiet=not loud, highlight=False, soft_wrap=True, width=width, force_terminal=bool(width)
        )
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._last_line = 0.0
        self._recent: deque[Mapping[str, Any]] = deque(maxlen=RECENT)

    @property
    def width(self) -> int:
        """Columns of the terminal; 80 where there is none."""
        return self._rich.width

    def say(self, topic: str, text: str) -> None:
        """A line with its topic in front."""
        if self.hears("info"):
            self._tell(f"{topic:<9}", "bold", text)

    def say_whole(self, topic: str, text: str) -> None:
        """A line to be copied, which no screen is too narrow for."""
        if self.hears("info"):
            self.show(Text.assemble((f"{topic:<9}", "bold"), text))

    def detail(self, topic: str, text: str) -> None:
        """A line for who looks for a fault."""
        if self.hears("debug"):
            self._tell(f"{topic:<9}", "bold dim", text, "dim")

    def warn(self, text: str) -> None:
        """A line that should not be overlooked."""
        if self.hears("warning"):
            self._tell("warning  ", "bold yellow", text)

    def _tell(self, topic: str, bold: str, text: str, style: str = "") -> None:
        head = Text.assemble((topic, bold))
        if self._rich.is_terminal:
            self.paragraph(head, text, style)
        else:
            self.show(Text.assemble(head, (text, style)))

    def paragraph(self, head: Text, text: str, style: str = "") -> None:
        """One line of text, wrapped behind its head; a word too long is cut in a file, and left whole on a terminal."""
        room, cut = max(NARROWEST, self.width - len(head)), not self._rich.is_terminal
        for line in wrap(text, room, break_long_words=cut, break_on_hyphens=False) or [""]:
            self.show(Text.assemble(head, (line, style)))
            head = Text(" " * len(head))

    def hears(self, level: str) -> bool:
        """Whether what is of this level is said."""
        return LEVELS.index(level) >= LEVELS.index(self.level)

    def show(self, renderable: Any) -> None:
        """Anything that rich can draw; no screen is too narrow for the numbers of a table."""
        self._rich.print(_Roomy(renderable))

    def start_steps(self, done: int, total: int) -> None:
        """Begin to show progress, from step `done` to `total`."""
        if not (self.loud and self._rich.is_terminal and self.hears("info")):
            return
        one_line = Column(no_wrap=True)
        columns = (
            TextColumn("[bold]{task.description}", table_column=one_line),
            BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=4)),
            MofNCompleteColumn(table_column=one_line),
            TextColumn("{task.fields[numbers]}", table_column=one_line),
            TimeRemainingColumn(table_column=one_line),
        )
        # A thread that draws would use the processor, and so be taken for work (`runtime.watchdog`).
        self._progress = Progress(*columns, console=self._rich, transient=True, auto_refresh=False, expand=True)
        self._progress.start()
        self._rich.show_cursor(True)  # rich hides it, and a rank that is killed cannot show it again
        self._task = self._progress.add_task("training", total=total, completed=done, numbers="")

    def step(self, metrics: Mapping[str, Any], total: int, f1: float | None) -> None:
        """Show a finished step, and the last F1 on dev, if there is one."""
        if not self.loud:
            return
        self._recent.append(metrics)
        now = time.monotonic()
        if self._progress is not None and self._task is not None:
            wide = self._rich.width >= WIDE
            epoch, numbers = f"epoch {metrics['epoch'] + 1}" if wide else "", self._numbers(f1, wide)
            self._progress.update(self._task, completed=metrics["step"], description=epoch, numbers=numbers)
            if now - self._last_line > SECONDS_BETWEEN_PICTURES or metrics["step"] == total:
                self._last_line = now
                self._progress.refresh()
        elif now - self._last_line > SECONDS_BETWEEN_LINES or metrics["step"] == total or self.hears("debug"):
            self._last_line = now
            numbers = self._numbers(f1, wide=True)
            self.say("step", f"{metrics['step']:>6}/{total}  epoch {metrics['epoch'] + 1}  {numbers}")
        parts = "  ".join(f"{part} {1e3 * metrics[part]:.3g}" for part in PARTS if part in metrics)
        self.detail("", f"step {metrics['step']}, ms: {parts}")

    def _numbers(self, f1: float | None, wide: bool) -> str:
        """The last loss; of recent steps the speed, and the shares in which stages idle and rank 0 awaits sums."""

        def recent(part: str) -> float:
            return float(sum(metrics.get(part, 0.0) for metrics in self._recent))

        found = [f"loss {self._recent[-1]['loss']:.4f}", *([f"F1 {f1:.4f}"] if f1 is not None else [])]
        found += [f"{recent('tokens') / recent('seconds'):,.0f} {'tokens/s' if wide else 'tok/s'}"]
        for part in ("bubble", "reduce"):
            share = recent(part) / recent("seconds")
            found += [f"{part} {share:.0%}"] if share >= LEAST_SHARE else []
        return ("  " if wide else " ").join(found)

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
