"""Curves of a run as event files for TensorBoard, for those who ask: by torch's writer, on rank 0 alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpitrain.errors import UsageError

# What of a line of metrics becomes a curve, and under which heading.
CURVES = {
    "train": ("loss", "grad_norm", "learning_rate"),
    "speed": ("tokens_per_second", "imbalance"),
    "seconds": ("data", "forward_backward", "pipeline_wait", "reduce", "update", "save"),
}
SCORES = ("loss", "token_accuracy", "f1_conlleval", "f1_strict")


class Board:
    """Event files in a directory; steps that are done again after a restart replace those of before."""

    def __init__(self, directory: Path) -> None:
        """Write there from the first `add` on.

        Raises:
            UsageError: the package tensorboard is not installed.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UsageError(
                "--log.tensorboard true: the package tensorboard is missing; pip install 'mpitrain[tensorboard]'"
            ) from None
        self._kind, self._directory = SummaryWriter, directory
        self._writer: Any = None

    def add(self, metrics: Mapping[str, Any]) -> None:
        """A step, by its line of metrics; what is not finite, None there, is left out."""
        self._open(metrics["step"])
        for heading, names in CURVES.items():
            self._write(heading, {name: metrics.get(name) for name in names}, metrics["step"])

    def add_scores(self, split: str, scores: Mapping[str, Any], step: int) -> None:
        """Scores of a split after a step."""
        self._open(step + 1)
        self._write(split, {name: scores[name] for name in SCORES}, step)
        self._writer.flush()

    def _open(self, next_step: int) -> None:
        if self._writer is None:
            self._writer = self._kind(self._directory, purge_step=next_step)

    def _write(self, heading: str, values: Mapping[str, float | None], step: int) -> None:
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(f"{heading}/{name}", value, step)

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._writer.close()
