"""Exact scores as sums of counts: ranks count their own sentences, add up the vectors, and divide once.

Two modes count entities, because published figures differ by them:
"conlleval" (as the CoNLL-2000 script and seqeval's default do): an I- after O or after another type opens an entity.
"strict" (as seqeval does with mode="strict", scheme=IOB2): only a B- opens an entity; a stray I- is part of none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpitrain.errors import DataError

MODES = ("conlleval", "strict")
TOTALS = ("tokens_correct", "tokens", "sentences", "words")
Scores = tuple[dict[str, Any], list[dict[str, Any]]]  # reports of a split and of each replica's share
_PREFIXES = ("B-", "I-", "E-", "S-")


def _check(names: Sequence[str], prefixes: tuple[str, ...]) -> None:
    for name in names:
        if name != "O" and not name.startswith(prefixes):
            raise DataError(
                f"label names: {name!r} does not go with entity labels; use O, or a type after {', '.join(prefixes)}"
            )


def is_plain(label_names: Sequence[str]) -> bool:
    """Whether labels are plain tags such as parts of speech: none begins with B-, I-, E- or S-."""
    return not any(name.startswith(_PREFIXES) for name in label_names)


@dataclass(frozen=True)
class _Table:
    """What each label id means; the id after the last label stands for "no label"."""

    types: list[str]
    type_of: NDArray[np.int64]  # [num_labels + 1]: index into types, -1 outside of entities
    opens: NDArray[np.bool_]  # [num_modes, num_labels + 1]: a run whose first label is this one is an entity
    continues: NDArray[np.bool_]  # [num_labels + 1, num_labels + 1]: the second label belongs to the first one's run

    @classmethod
    def of(cls, label_names: Sequence[str], plain: bool) -> _Table:
        """A plain tag is read as S-tag: each word is a run by itself."""
        parts = [("S", name) if plain else (name[0], name[2:]) for name in label_names]
        types = sorted({kind for prefix, kind in parts if prefix != "O"})
        prefix = np.array([*(prefix for prefix, _ in parts), "O"])
        type_of = np.array([*(types.index(kind) if prefix != "O" else -1 for prefix, kind in parts), -1])
        opens = np.stack([prefix != "O", np.isin(prefix, ["B", "S"])])
        same_type = type_of[:, None] == type_of
        return cls(
            types, type_of, opens, same_type & np.isin(prefix, ["B", "I"])[:, None] & np.isin(prefix, ["I", "E"])
        )

    def runs(self, labels: NDArray[np.integer[Any]], is_first: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Cut words into runs: [num_words], whether a word begins a run; `is_first` of its sentence always does."""
        begins = is_first.copy()
        begins[1:] |= ~self.continues[labels[:-1], labels[1:]]
        return begins


def entities(tags: Sequence[str], mode: str) -> set[tuple[str, int, int]]:
    """The entities (type, start, stop) in one sentence's tags; the words [start, stop) belong to it.

    Tags are O, B- and I-; in mode "conlleval" E- and S- (IOBES) as well. IOB1 is read as seqeval's default reads it.

    Raises:
        DataError: a tag is none of these.
    """
    _check(tags, _PREFIXES if mode == "conlleval" else _PREFIXES[:2])
    names = sorted(set(tags))
    table = _Table.of(names, plain=False)
    labels = np.array([names.index(tag) for tag in tags], np.int64)
    borders = np.append(np.flatnonzero(table.runs(labels, np.arange(labels.size) == 0)), labels.size)
    return {
        (table.types[table.type_of[labels[start]]], int(start), int(stop))
        for start, stop in pairwise(borders)
        if table.opens[MODES.index(mode), labels[start]]
    }


class Counts:
    """Counts of sentences scored so far, in one int64 vector whose layout depends on the label names alone.

    Layout: [mode, (true positives, predicted, gold), type] flattened, then TOTALS (`tokens`: words with a gold label).

    Label names are IOB2, or plain tags (`is_plain`). A plain tag, O included, is
    a type, and each word an entity of that type: both modes agree, and their f1 is the token-level micro F1, which is
    the token accuracy where every word has a prediction.
    """

    def __init__(self, label_names: Sequence[str], table: _Table) -> None:
        self.label_names, self._table = tuple(label_names), table
        self.vector = np.zeros(len(MODES) * 3 * len(table.types) + len(TOTALS), np.int64)

    @classmethod
    def of(cls, label_names: Sequence[str]) -> Counts:
        """No sentence yet.

        Raises:
            DataError: some names have an entity prefix, and some are neither IOB2 nor O.
        """
        plain = is_plain(label_names)
        if not plain:
            _check(label_names, _PREFIXES[:2])
        return cls(label_names, _Table.of(label_names, plain))

    @classmethod
    def from_vector(cls, label_names: Sequence[str], vector: NDArray[Any]) -> Counts:
        """The counts that `vector` holds, such as a sum over ranks; float64 is exact up to 2 ** 53."""
        counts = cls.of(label_names)
        assert counts.vector.shape == vector.shape
        counts.vector[:] = vector
        return counts

    @property
    def types(self) -> list[str]:
        """Entity types or plain tags, sorted."""
        return self._table.types

    @property
    def by_type(self) -> NDArray[np.int64]:
        """The part [mode, (true positives, predicted, gold), type] of the vector, as a view."""
        return self.vector[: -len(TOTALS)].reshape(len(MODES), 3, len(self.types))

    def add(
        self, gold: NDArray[np.integer[Any]], predicted: NDArray[np.integer[Any]], lengths: Sequence[int] | None = None
    ) -> None:
        """Count one sentence, or several laid end to end; many in one call are counted faster.

        Args:
            gold: label ids [num_words]; a negative one (-100) is a word that is not scored.
            predicted: label ids [num_words]; a negative one (-100) is a word that has no prediction: a miss.
            lengths: words of each sentence, adding up to num_words; one sentence when None.
        """
        assert gold.shape == predicted.shape
        table, no_label, num_words = self._table, len(self.label_names), gold.size
        scored = gold >= 0
        gold = np.where(scored, gold, no_label)
        predicted = np.where(scored & (predicted >= 0), predicted, no_label)
        sizes = np.array([num_words] if lengths is None else lengths, np.int64)
        stops = np.cumsum(sizes)
        assert not sizes.size or stops[-1] == num_words
        is_first = np.zeros(num_words + 1, np.bool_)
        is_first[stops - sizes] = True
        begins = [table.runs(labels, is_first[:-1]) for labels in (gold, predicted)]
        starts = [np.flatnonzero(found) for found in begins]
        hits = np.flatnonzero(begins[0] & begins[1] & (table.type_of[gold] == table.type_of[predicted]))
        stop = [np.append(found, num_words)[np.searchsorted(found, hits) + 1] for found in starts]
        hits = hits[stop[0] == stop[1]]
        for opens, counts in zip(table.opens, self.by_type, strict=True):
            found = [hits[opens[gold[hits]] & opens[predicted[hits]]], starts[1], starts[0]]
            for row, where, labels in zip(counts, found, (gold, predicted, gold), strict=True):
                first = labels[where]
                row += np.bincount(table.type_of[first[opens[first]]], minlength=row.size)
        num_correct = np.count_nonzero(scored & (gold == predicted))
        self.vector[-len(TOTALS) :] += np.array([num_correct, np.count_nonzero(scored), sizes.size, num_words])


def _scores(true_positives: int, predicted: int, gold: int) -> dict[str, float]:
    """What has no denominator is 0, as in seqeval."""
    return {
        "precision": true_positives / predicted if predicted else 0.0,
        "recall": true_positives / gold if gold else 0.0,
        "f1": 2 * true_positives / (predicted + gold) if predicted + gold else 0.0,
    }


def report(counts: Counts) -> dict[str, Any]:
    """The scores as JSON values.

    `token_accuracy`; `precision_<mode>`, `recall_<mode>` and `f1_<mode>` over all types (micro); `per_type` in mode
    "conlleval", with the number of gold entities as `support`; `sentences` and `words`.
    """
    totals = dict(zip(TOTALS, counts.vector[-len(TOTALS) :].tolist(), strict=True))
    result: dict[str, Any] = {"token_accuracy": totals["tokens_correct"] / max(totals["tokens"], 1)}
    for mode, sums in zip(MODES, counts.by_type.sum(axis=2).tolist(), strict=True):
        result |= {f"{name}_{mode}": score for name, score in _scores(*sums).items()}
    result["per_type"] = {
        kind: _scores(*sums) | {"support": sums[2]}
        for kind, sums in zip(counts.types, counts.by_type[0].T.tolist(), strict=True)
    }
    return result | {"sentences": totals["sentences"], "words": totals["words"]}
