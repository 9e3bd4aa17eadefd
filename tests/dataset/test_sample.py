"""The bundled corpus: reproducible, varied, and with names in dev and test that training never saw."""

from pathlib import Path

import pytest

from mpitrain.dataset.conll import Sentence, index_file, read_sentences
from mpitrain.dataset.recipe import Recipe, load_recipe
from mpitrain.dataset.sample import write_sample


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe("sample")


@pytest.fixture(scope="module")
def corpus(recipe) -> dict[str, list[Sentence]]:
    found = {}
    for split, path in recipe.files.items():
        index = index_file(path, recipe)
        found[split] = read_sentences(path, recipe, index, 0, len(index.offsets))
    return found


def names(sentences: list[Sentence]) -> list[str]:
    found: list[list[str]] = []
    for sentence in sentences:
        for word, tag in zip(sentence.words, sentence.tags, strict=True):
            if tag.startswith("B-"):
                found.append([word])
            elif tag.startswith("I-"):
                found[-1].append(word)
    return [" ".join(words) for words in found]


def test_files_in_the_repository_are_what_the_generator_writes(recipe, tmp_path: Path):
    write_sample(tmp_path)
    for path in recipe.files.values():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_corpus_has_the_promised_size_labels_and_lengths(corpus):
    assert all(len(corpus[split]) >= size for split, size in (("train", 4000), ("dev", 500), ("test", 500)))
    for sentences in corpus.values():
        assert {tag for found in sentences for tag in found.tags} == {
            "O", *(f"{prefix}-{kind}" for prefix in "BI" for kind in ("PER", "ORG", "LOC"))
        }  # fmt: skip
        assert all(3 <= len(found.words) <= 45 for found in sentences)
        assert any(set(found.tags) == {"O"} for found in sentences)


@pytest.mark.parametrize("split", ["dev", "test"])
def test_most_names_of_dev_and_test_are_new_even_without_case(corpus, split):
    known = {name.lower() for name in names(corpus["train"])}
    mentions = [name.lower() for name in names(corpus[split])]
    assert sum(name not in known for name in mentions) > 0.5 * len(mentions)
    assert sum(name not in known for name in set(mentions)) > 0.5 * len(set(mentions))


def test_one_word_is_person_place_and_organisation_by_context(corpus):
    roles = {
        tag for found in corpus["train"] for word, tag in zip(found.words, found.tags, strict=True) if word == "Jordan"
    }
    assert {"B-PER", "B-LOC", "B-ORG"} <= roles


def test_no_sentence_of_dev_or_test_stands_in_train(corpus):
    seen = {tuple(found.words) for found in corpus["train"]}
    assert not any(tuple(found.words) in seen for found in corpus["dev"] + corpus["test"])
