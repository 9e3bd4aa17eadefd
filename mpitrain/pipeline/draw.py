"""What a schedule looks like: a line of text for each stage, or a Gantt chart."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mpitrain.files import user_path
from mpitrain.observe.console import Console
from mpitrain.pipeline.prove import Proof, Span
from mpitrain.pipeline.schedule import Kind, Placement

LETTERS = {Kind.FORWARD: "0123456789"}
LETTERS |= dict.fromkeys((Kind.BACKWARD, Kind.BACKWARD_INPUT), "abcdefghijklmnopqrstuvwxyz")
LETTERS[Kind.BACKWARD_WEIGHT] = LETTERS[Kind.BACKWARD].upper()
LEGEND = "0 1 2 forward; a b c backward, or its half for inputs; A B C its half for weights"
DIGIT, DENSITY = 0.008, 0.9  # a digit's part of the picture's width; of colours, before any is paler
COLORS = {Kind.FORWARD: "C0", Kind.BACKWARD: "C1", Kind.BACKWARD_INPUT: "C1", Kind.BACKWARD_WEIGHT: "C2"}


def text(proof: Proof, placement: Placement, columns_per_unit: float = 1.0) -> str:
    """A line for each stage, and below it the chunks if there are several: a column is so much time.

    Micro-batches beyond the last letter begin again at the first.
    """
    width = round(proof.makespan * columns_per_unit)
    lines = []
    for stage, spans in enumerate(proof.spans):
        head = f"stage {stage:<{len(str(len(proof.spans) - 1))}}  "
        lines.append(head + _line(spans, width, columns_per_unit, chunks=False))
        if placement.num_chunks > 1:
            lines.append(" " * len(head) + _line(spans, width, columns_per_unit, chunks=True).replace(".", " "))
    return "\n".join(line.rstrip() for line in lines)


def _line(spans: list[Span], width: int, columns_per_unit: float, *, chunks: bool) -> str:
    line = ["."] * width
    for span in spans:
        step, letters = span.instruction, LETTERS[span.instruction.kind]
        letter = str(step.chunk % 10) if chunks else letters[step.micro_batch % len(letters)]
        for column in range(round(span.start * columns_per_unit), round(span.stop * columns_per_unit)):
            line[column] = letter
    return "".join(line)


def write(out: Path, stem: str, panels: dict[str, Proof], unit: str, console: Console) -> None:
    """`<stem>.png` and `<stem>.svg` in `out`, if matplotlib is here; `draw` tells what they show.

    Raises:
        UsageError: `out` cannot be written.
    """
    files = [out / f"{stem}.{ending}" for ending in ("png", "svg")]
    if find_spec("matplotlib") is None:
        console.warn("no picture: matplotlib is not installed; pip install 'mpitrain[report]' brings it")
        return
    with user_path("--out", out):
        out.mkdir(parents=True, exist_ok=True)
        for file in files:
            draw(file, panels, unit)
    console.say("written", ", ".join(map(str, files)))


def draw(file: Path, panels: dict[str, Proof], unit: str) -> None:
    """Into a file: PNG, SVG or PDF as its name ends."""
    chart(panels, unit).savefig(file, dpi=150)


def chart(panels: dict[str, Proof], unit: str) -> Any:
    """A row for each stage, later chunks paler, below each panel's title; a figure of matplotlib."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    num_stages = max(len(proof.spans) for proof in panels.values())
    figure = Figure(figsize=(10, 0.5 + (0.7 + 0.5 * num_stages) * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    makespan = max(proof.makespan for proof in panels.values()) or 1
    for axis, (title, proof) in zip(axes, panels.items(), strict=True):
        _draw_stages(axis, proof, makespan)
        axis.set(yticks=range(num_stages), yticklabels=[f"stage {stage}" for stage in range(num_stages)])
        axis.invert_yaxis()
        axis.set_title(title, fontsize=10)
    steps = {span.instruction for proof in panels.values() for spans in proof.spans for span in spans}
    paler = "; the paler, the later a stage's chunk" if any(step.chunk for step in steps) else ""
    axes[-1].set(xlabel=unit + paler, xlim=(0, makespan))
    kinds = [kind for kind in COLORS if kind in {step.kind for step in steps}]
    patches = [Patch(color=COLORS[kind], alpha=DENSITY, label=kind.value) for kind in kinds]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches) or 1, frameon=False, fontsize=8)
    return figure


def _draw_stages(axis: Any, proof: Proof, makespan: float) -> None:
    for stage, spans in enumerate(proof.spans):
        for span in spans:
            step, length = span.instruction, span.stop - span.start
            bars = axis.barh(stage, length, left=span.start, height=0.9, color=COLORS[step.kind])
            bars[0].set(alpha=DENSITY / (1 + step.chunk), edgecolor="white", linewidth=0.5)
            number = str(step.micro_batch)
            if length >= DIGIT * len(number) * makespan:
                axis.text(span.start + length / 2, stage, number, ha="center", va="center", fontsize=7)
