"""Packed sequences as training, evaluation and prediction see them, wherever they come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mpitrain.dataset.batches import Indices


@dataclass(frozen=True)
class SplitIndex:
    """What every rank knows of every sequence of a split: int64 [num_sequences] each.

    Attributes:
        lengths: tokens.
        words: words, each with one label.
        sentences: number of the sentence that the sequence is (a window of), ascending.
    """

    lengths: Indices
    words: Indices
    sentences: Indices


class Sequences(Protocol):
    """What training, evaluation and prediction read from."""

    index: SplitIndex

    def read(self, field: str, sequences: Indices) -> NDArray[np.int64]:
        """`field` ("tokens", "labels", "word_starts") of some sequences end to end, int64 [num_tokens]."""
        ...


class MemorySplit:
    """Sequences that are at hand, such as text to be tagged."""

    def __init__(self, fields: dict[str, NDArray[Any]], lengths: Indices, words: Indices, sentences: Indices) -> None:
        """Each of `fields` [num_tokens], by name; the rest per sequence."""
        self.index = SplitIndex(lengths.astype(np.int64), words.astype(np.int64), sentences.astype(np.int64))
        self._fields = fields
        self._offsets = np.concatenate([[0], np.cumsum(self.index.lengths)])

    def read(self, field: str, sequences: Indices) -> NDArray[np.int64]:
        """As in `Sequences`."""
        values = self._fields[field]
        parts = [values[self._offsets[number] : self._offsets[number + 1]] for number in sequences]
        return np.concatenate(parts).astype(np.int64)
