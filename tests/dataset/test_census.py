"""Labels of a dataset and what was odd in its text, summed over blocks."""

import json
from dataclasses import asdict

import pytest

from mpitrain.dataset.census import Census, label_names
from mpitrain.dataset.conll import Sentence
from mpitrain.dataset.recipe import Recipe
from mpitrain.errors import DataError


def census(*sentences: str, line: int = 1) -> Census:
    found = Census()
    for text in sentences:
        tags = text.split()
        found.add([Sentence(["w"] * len(tags), tags, list(range(line, line + len(tags))))])
        line += len(tags) + 1
    return found


def recipe(**fields) -> Recipe:
    return Recipe.model_validate({"name": "made", "files": {"train": "a.conll", "dev": "b.conll"}, **fields})


def test_labels_are_o_then_begin_and_inside_of_each_type_by_name():
    assert label_names(recipe(), {"train": census("B-Z I-Z", "O B-A")}) == ["O", "B-A", "I-A", "B-Z", "I-Z"]
    assert label_names(recipe(scheme="none"), {"train": census("X A", "B-A")}) == ["A", "B-A", "X"]


def test_listed_labels_keep_their_order():
    assert label_names(recipe(labels=["B-A", "O"]), {"train": census("O B-A")}) == ["B-A", "O"]


def test_inside_of_a_known_type_may_be_new_in_dev():
    assert label_names(recipe(), {"train": census("B-A"), "dev": census("B-A I-A")}) == ["O", "B-A", "I-A"]


@pytest.mark.parametrize(
    ("fields", "among"), [({}, "the train split"), ({"labels": ["O", "B-A"]}, "the recipe's labels")]
)
def test_an_unseen_label_names_file_line_and_label(fields, among):
    with pytest.raises(DataError, match=rf"b\.conll:12: found label 'B-C', .* {among}: O, B-A"):
        label_names(recipe(**fields), {"train": census("O B-A"), "dev": census("O", "B-C B-D", line=10)})


def test_without_a_train_split_labels_come_from_all_splits():
    assert label_names(recipe(), {"dev": census("B-B"), "test": census("B-A")}) == ["O", "B-A", "I-A", "B-B", "I-B"]


def test_parts_merged_in_any_order_equal_the_whole_through_json():
    parts = [census("O B-A", "I-A", line=30), census("I-B I-B", "B-A I-B O", line=3), Census()]
    whole = census("I-B I-B", "B-A I-B O", line=3)
    whole.add([Sentence(["w", ""], ["O", "B-A"], [30, 31]), Sentence(["w"], ["I-A"], [33])])
    parts[0].empty_words = 1
    for order in (parts, parts[::-1]):
        assert Census.merged(Census(**json.loads(json.dumps(asdict(part)))) for part in order) == whole
    assert (whole.sentences, whole.longest, whole.loose_insides, whole.first_lines["I-B"]) == (4, 3, 3, 3)
