"""A recipe finds its files, or says what to fetch and where to put it."""

from pathlib import Path

import pytest

from mpitrain import shelf
from mpitrain.dataset.recipe import Recipe, load_recipe
from mpitrain.errors import DataError, UsageError


def write_recipe(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text('name = "mine"\n' + text)
    return path


@pytest.mark.parametrize(
    "path", sorted(path for place in shelf.shelves("data") for path in place.glob("*.toml")), ids=lambda path: path.stem
)
def test_every_recipe_on_the_shelf_loads_or_says_what_to_fetch(path, monkeypatch):
    monkeypatch.delenv("MPITRAIN_CORPORA", raising=False)
    try:
        assert set(load_recipe(path.stem).files) == {"train", "dev", "test"}
    except DataError as error:
        assert "Fetch" in str(error) and "https://" in str(error) and "$MPITRAIN_CORPORA/" in str(error)


def test_files_lie_beside_the_recipe_or_below_the_data_variable(tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "b.conll").write_text("x\tO\n")
    (tmp_path / "a.conll").write_text("x\tO\n")
    path = write_recipe(tmp_path, '[files]\ntrain = "a.conll"\ndev = "b.conll"\n')
    monkeypatch.delenv("MPITRAIN_CORPORA", raising=False)
    with pytest.raises(DataError, match=r"found no b\.conll"):
        load_recipe(path)
    monkeypatch.setenv("MPITRAIN_CORPORA", str(elsewhere))
    assert load_recipe(path).files == {"train": tmp_path / "a.conll", "dev": elsewhere / "b.conll"}


def test_a_folder_of_text_is_a_recipe(tmp_path):
    for name in ("train.txt", "valid.txt", "notes.md"):
        (tmp_path / name).write_text("x\tO\n")
    assert load_recipe(tmp_path).files == {"train": tmp_path / "train.txt", "dev": tmp_path / "valid.txt"}


def test_a_folder_with_two_candidates_or_none_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no train"):
        load_recipe(tmp_path)
    for name in ("dev.txt", "valid.txt"):
        (tmp_path / name).write_text("x\tO\n")
    with pytest.raises(DataError, match=r"dev\.txt and valid\.txt"):
        load_recipe(tmp_path)


def test_one_text_file_is_a_train_split_and_conllu_is_known(tmp_path):
    path = tmp_path / "my text.conllu"
    path.write_text("1\tx\t_\tNOUN\n")
    recipe = load_recipe(path)
    assert recipe.files == {"train": path}
    assert (recipe.name, recipe.word_column, recipe.tag_column, recipe.scheme) == ("my-text", 1, 3, "none")


def test_all_mistakes_of_a_recipe_are_named_at_once(tmp_path):
    path = write_recipe(tmp_path, 'separator = "comma"\ncolour = "red"\nword_column = -1\n[files]\ntraining = "a"\n')
    with pytest.raises(DataError) as caught:
        load_recipe(path)
    assert all(
        word in str(caught.value) for word in ("mine.toml", "separator", "colour", "word_column", "files.training")
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"word_column": 2, "tag_column": 2},
        {"labels": ["O", "PER"]},
        {"labels": ["O", "O"]},
        {"comment": " #"},
        {"files": {}},
    ],
)
def test_contradictions_are_refused(fields):
    with pytest.raises(ValueError, match=r"tag_column|labels|comment|files"):
        Recipe.model_validate({"name": "mine", "files": {"train": "a"}, **fields})


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UsageError, match="sample"):
        load_recipe("no-such-data")
