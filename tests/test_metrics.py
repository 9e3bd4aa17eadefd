from __future__ import annotations

import random
import warnings
from itertools import chain

import numpy as np
import pytest
from seqeval.metrics import accuracy_score, f1_score, precision_score, recall_score
from seqeval.metrics.sequence_labeling import get_entities, precision_recall_fscore_support
from seqeval.scheme import IOB2, Entities

from mpitrain.errors import DataError
from mpitrain.metrics import Counts, entities, report

NAMES = ["O", "B-LOC", "I-LOC", "B-PER-SON", "I-PER-SON", "B-ORG", "I-ORG"]
IOBES = [f"{prefix}-{kind}" for prefix in "IBES" for kind in ("LOC", "ORG")] + ["O"]
MODES = {"conlleval": {}, "strict": {"mode": "strict", "scheme": IOB2}}


def random_tags(rng: random.Random, names: list[str]) -> list[str]:
    """Mostly invalid: any tag may follow any other."""
    return rng.choices(names, k=rng.randint(1, 14))


def random_iob2(rng: random.Random) -> list[str]:
    tags: list[str] = []
    while len(tags) < 8 or rng.random() < 0.5:
        kind = rng.choice(["LOC", "PER-SON", "ORG"])
        tags += ["O"] * rng.randint(0, 3) + [f"B-{kind}"] + [f"I-{kind}"] * rng.randint(0, 2)
    return tags


def corpus(seed: int, num_sentences: int = 40) -> tuple[list[list[str]], list[list[str]]]:
    """Gold and predicted tags; half of the sentences valid, each prediction partly right."""
    rng = random.Random(seed)
    gold = [random_iob2(rng) if rng.random() < 0.5 else random_tags(rng, NAMES) for _ in range(num_sentences)]
    return gold, [[tag if rng.random() < 0.7 else rng.choice(NAMES) for tag in tags] for tags in gold]


def ids(tags: list[str], names: list[str] = NAMES) -> np.ndarray:
    return np.array([names.index(tag) for tag in tags], np.int64)


def counted(gold: list[list[str]], predicted: list[list[str]], names: list[str] = NAMES) -> Counts:
    counts = Counts.of(names)
    for gold_tags, predicted_tags in zip(gold, predicted, strict=True):
        counts.add(ids(gold_tags, names), ids(predicted_tags, names))
    return counts


def test_entities_equal_those_of_seqeval_on_random_tags_in_both_modes():
    rng = random.Random(0)
    for _ in range(2000):
        tags = random_tags(rng, NAMES)
        assert entities(tags, "conlleval") == {(kind, start, last + 1) for kind, start, last in get_entities(tags)}
        strict = Entities([tags], IOB2).entities[0]
        assert entities(tags, "strict") == {(entity.tag, entity.start, entity.end) for entity in strict}


def test_entities_of_iobes_tags_equal_those_of_seqeval_by_default():
    rng = random.Random(1)
    for _ in range(2000):
        tags = random_tags(rng, IOBES)
        assert entities(tags, "conlleval") == {(kind, start, last + 1) for kind, start, last in get_entities(tags)}


def test_a_sentence_without_words_has_no_entities():
    assert entities([], "conlleval") == entities([], "strict") == set()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(50))
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.UndefinedMetricWarning")
def test_scores_equal_those_of_seqeval(seed, mode):
    gold, predicted = corpus(seed)
    scores = report(counted(gold, predicted))
    expected = [score(gold, predicted, **MODES[mode]) for score in (precision_score, recall_score, f1_score)]
    assert [scores[f"{name}_{mode}"] for name in ("precision", "recall", "f1")] == pytest.approx(expected)
    assert scores["token_accuracy"] == pytest.approx(accuracy_score(gold, predicted))


@pytest.mark.parametrize("seed", range(10))
def test_scores_per_type_equal_those_of_seqeval(seed):
    gold, predicted = corpus(seed)
    per_type = report(counted(gold, predicted))["per_type"]
    expected = np.array(precision_recall_fscore_support(gold, predicted, average=None)).T
    assert list(per_type) == ["LOC", "ORG", "PER-SON"]
    assert np.array([list(scores.values()) for scores in per_type.values()]) == pytest.approx(expected)


def test_an_entity_that_begins_with_inside_counts_by_default_and_not_when_strict():
    scores = report(counted([["B-LOC", "I-LOC"]], [["I-LOC", "I-LOC"]]))
    assert (scores["f1_conlleval"], scores["f1_strict"]) == (1.0, 0.0)
    scores = report(counted([["I-LOC", "I-LOC"]], [["B-LOC", "I-LOC"]]))
    assert (scores["f1_conlleval"], scores["precision_strict"]) == (1.0, 0.0)


def test_no_entities_at_all_scores_zero_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = report(counted([["O", "O"]], [["O", "O"]]))
        nothing = report(Counts.of(NAMES))
    assert (scores["f1_conlleval"], scores["f1_strict"], scores["token_accuracy"]) == (0.0, 0.0, 1.0)
    assert (nothing["f1_conlleval"], nothing["token_accuracy"], nothing["sentences"]) == (0.0, 0.0, 0)


def test_the_sum_over_parts_equals_the_whole():
    gold, predicted = corpus(3)
    whole = counted(gold, predicted)
    summed = counted(gold[:13], predicted[:13]).vector.astype(float) + counted(gold[13:], predicted[13:]).vector
    assert summed.tolist() == whole.vector.tolist()
    assert report(Counts.from_vector(NAMES, summed)) == report(whole)


def test_many_sentences_in_one_call_count_as_one_by_one():
    gold, predicted = corpus(4)
    gold.insert(2, [])
    predicted.insert(2, [])
    counts = Counts.of(NAMES)
    lengths = [len(tags) for tags in gold]
    counts.add(ids([*chain(*gold)]), ids([*chain(*predicted)]), lengths)
    assert counts.vector.tolist() == counted(gold, predicted).vector.tolist()
    assert report(counts)["sentences"] == 41 and report(counts)["words"] == sum(lengths)


def test_a_word_without_prediction_is_a_miss():
    counts = Counts.of(NAMES)
    counts.add(ids(["B-LOC", "I-LOC", "B-ORG"]), np.array([1, -100, 5]))
    scores = report(counts)
    assert scores["token_accuracy"] == pytest.approx(2 / 3)
    assert scores["per_type"]["LOC"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 1}
    assert scores["per_type"]["ORG"]["f1"] == 1.0


def test_a_word_without_gold_label_is_not_scored():
    counts = Counts.of(NAMES)
    counts.add(np.array([-100, 1, 0], np.int16), np.array([5, 1, 0], np.int64))
    scores = report(counts)
    assert (scores["precision_conlleval"], scores["token_accuracy"], scores["words"]) == (1.0, 1.0, 3)


def test_plain_tags_are_scored_word_by_word():
    names = ["ADJ", "NOUN", "O", "VERB"]
    gold, predicted = ["NOUN", "NOUN", "VERB", "O"], ["NOUN", "ADJ", "VERB", "O"]
    scores = report(counted([gold], [predicted], names))
    assert scores["f1_conlleval"] == scores["f1_strict"] == scores["token_accuracy"] == 0.75
    assert scores["per_type"]["NOUN"] == {"precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3), "support": 2}


@pytest.mark.parametrize("wrong", ["PER", "E-PER", "b-PER", "B_PER"])
def test_a_label_that_does_not_go_with_the_others_is_an_error(wrong):
    with pytest.raises(DataError, match=f"label names: '{wrong}' does not go with entity labels"):
        Counts.of([*NAMES, wrong])
    with pytest.raises(DataError, match=wrong):
        entities(["B-PER", wrong], "strict")
