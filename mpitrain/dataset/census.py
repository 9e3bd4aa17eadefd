"""What a text holds, counted by sentence blocks and summed; from it the label names. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from pydantic import BaseModel, ConfigDict

from mpitrain.dataset.conll import Sentence
from mpitrain.dataset.recipe import Recipe, Split
from mpitrain.errors import DataError


class SplitSummary(BaseModel):
    """What a person wants to know of a split: counts, the longest sentence in words, what was normalised."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sentences: int
    words: int
    pieces: int
    longest_sentence: int
    labels: dict[str, int]
    normalised: dict[str, int]


@dataclass
class Census:
    """Counts of some sentences; all fields are JSON.

    Attributes:
        labels: words by tag.
        first_lines: line where each tag stands first.
        longest: words of the longest sentence.
        loose_insides: I- tags after O or after another type; they open an entity.
    """

    labels: dict[str, int] = field(default_factory=dict)
    first_lines: dict[str, int] = field(default_factory=dict)
    sentences: int = 0
    longest: int = 0
    empty_words: int = 0
    loose_insides: int = 0

    def add(self, sentences: Iterable[Sentence]) -> None:
        """Count some more."""
        for sentence in sentences:
            self.sentences += 1
            self.longest = max(self.longest, len(sentence.words))
            self.empty_words += sum(not word.strip() for word in sentence.words)
            for tag, before, line in zip(sentence.tags, ["O", *sentence.tags], sentence.lines, strict=False):
                self.labels[tag] = self.labels.get(tag, 0) + 1
                self.first_lines.setdefault(tag, line)
                self.loose_insides += tag[:2] == "I-" and tag[1:] != before[1:]

    @classmethod
    def merged(cls, parts: Iterable[Census]) -> Census:
        """The census of all parts together."""
        whole = cls()
        for part in parts:
            for tag, count in part.labels.items():
                whole.labels[tag] = whole.labels.get(tag, 0) + count
                whole.first_lines[tag] = min(part.first_lines[tag], whole.first_lines.get(tag, part.first_lines[tag]))
            whole.sentences += part.sentences
            whole.longest = max(whole.longest, part.longest)
            whole.empty_words += part.empty_words
            whole.loose_insides += part.loose_insides
        return whole

    def summary(self, pieces: int, oddities: Iterable[Mapping[str, int]]) -> SplitSummary:
        """For `dataset.json`, with what reading and tokenizing counted."""
        normalised = Counter({"empty words": self.empty_words, "I- that follows no B-": self.loose_insides})
        for counts in oddities:
            normalised.update(counts)
        return SplitSummary(
            sentences=self.sentences,
            words=sum(self.labels.values()),
            pieces=pieces,
            longest_sentence=self.longest,
            labels=dict(sorted(self.labels.items())),
            normalised={what: count for what, count in sorted(normalised.items()) if count},
        )


def label_names(recipe: Recipe, censuses: dict[Split, Census]) -> list[str]:
    """The labels of a dataset in their order: as the recipe lists them, else O, then B- and I- of each type by name.

    They are collected from the train split, or from all splits if there is none. I-X belongs to them wherever B-X
    does: a test split may hold a longer entity than any in train.

    Raises:
        DataError: a split has a label that is not among them; names its first line.
    """
    if recipe.labels != "collect":
        names, where = recipe.labels, "the recipe's labels"
    else:
        known = [censuses["train"]] if "train" in censuses else list(censuses.values())
        tags = {tag for census in known for tag in census.labels}
        types = sorted({tag[2:] for tag in tags if tag != "O"})
        names = ["O", *(f"{prefix}-{kind}" for kind in types for prefix in "BI")]
        names, where = sorted(tags) if recipe.scheme == "none" else names, "the train split"
    for split, census in censuses.items():
        unknown = [(line, tag) for tag, line in census.first_lines.items() if tag not in names]
        if unknown:
            line, tag = min(unknown)
            raise DataError(
                f"{recipe.files[split]}:{line}: found label {tag!r}, which is not among those of {where}: "
                f"{', '.join(names)}; mend the tag, or list all labels in a recipe"
            )
    return names
