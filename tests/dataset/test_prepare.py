"""Text becomes the same shards on any number of ranks, whole or not at all (exam cases 22 and 23)."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from mpitrain.dataset import cache
from mpitrain.dataset import prepare as module
from mpitrain.dataset.prepare import block_size, cached, prepare
from mpitrain.dataset.recipe import Recipe
from mpitrain.dataset.shards import DatasetInfo, is_dataset, map_shard, open_dataset, verify_dataset
from mpitrain.dataset.tokenize import load_tokenizer, tokenizer_hash, train_tokenizer
from mpitrain.describe import describe
from mpitrain.errors import DataError, UsageError
from mpitrain.runtime.agree import share

SIZES = {"train": 20, "dev": 3, "test": 7}
SETTINGS: dict[str, Any] = {
    "tokenizer": None,
    "vocab_size": 90,
    "lowercase": True,
    "max_length": 8,
    "progress": lambda _: None,
}

pytestmark = pytest.mark.mpi(min_size=1)


@pytest.fixture
def folder(comm, tmp_path, monkeypatch) -> Path:
    """One folder for all ranks; blocks so small that a text has several."""
    monkeypatch.setattr(module, "MIN_BLOCK", 3)
    return Path(share(comm, str(tmp_path)))


def tag(place: int, number: int) -> str:
    return ["O", "B-PER", "I-PER", "B-LOC", "O", "O"][(place + number) % 6]


@pytest.fixture
def recipe(comm, folder) -> Recipe:
    """Sentences of 1 to 11 words, so that some are split at 8 tokens."""
    if comm.rank == 0:
        for split, size in SIZES.items():
            rows = [
                [f"w{number}x{place}\t{tag(place, number)}\n" for place in range(1 + number % 11)]
                for number in range(size)
            ]
            (folder / f"{split}.conll").write_text("\n".join("".join(lines) for lines in rows))
    comm.Barrier()
    return Recipe.model_validate({"name": "made", "files": {split: folder / f"{split}.conll" for split in SIZES}})


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def test_files_are_the_same_for_any_number_of_ranks(comm, folder, recipe):
    info = prepare(comm, recipe, folder / "together", **SETTINGS)
    alone = comm.Split(comm.rank)
    mine = prepare(alone, recipe, folder / f"alone-{comm.rank}", **SETTINGS)
    alone.Free()
    assert mine == info
    assert contents(folder / "together") == contents(folder / f"alone-{comm.rank}")
    assert len(info.splits["train"]) == 7
    verify_dataset(comm, folder / "together", info)


def test_every_word_is_there_once_with_its_tag(comm, folder, recipe):
    info = prepare(comm, recipe, folder / "out", **SETTINGS)
    for split, size in SIZES.items():
        shards = [map_shard(folder / "out" / entry.file) for entry in info.splits[split]]
        labels = np.concatenate([shard["labels"] for shard in shards])
        found = [info.label_names[label] for label in labels[labels != -100]]
        assert found == [tag(place, number) for number in range(size) for place in range(1 + number % 11)]
        sentences = np.concatenate([shard["sentences"] for shard in shards])
        assert np.unique(sentences).tolist() == list(range(size)) and np.all(np.diff(sentences) >= 0)
        summary = info.summary[split]
        assert (summary.sentences, summary.words) == (size, len(found))
        assert summary.normalised["sentences split"] == (np.bincount(sentences) > 1).sum() > 0
    assert info.label_names == ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]


def test_a_complete_dataset_is_used_again_and_another_is_not_overwritten(comm, folder, recipe):
    first = prepare(comm, recipe, folder / "out", **SETTINGS)
    stamp = (folder / "out" / "dataset.json").stat().st_mtime_ns
    comm.Barrier()
    assert prepare(comm, recipe, folder / "out", **SETTINGS) == first
    assert (folder / "out" / "dataset.json").stat().st_mtime_ns == stamp
    with pytest.raises(UsageError, match="holds another dataset"):
        prepare(comm, recipe, folder / "out", **{**SETTINGS, "max_length": 9})


def test_a_directory_with_other_things_is_refused_and_an_empty_one_is_used(comm, folder, recipe):
    with pytest.raises(UsageError, match="is not a prepared dataset"):
        prepare(comm, recipe, folder, **SETTINGS)
    if comm.rank == 0:
        (folder / "empty").mkdir()
    prepare(comm, recipe, folder / "empty", **SETTINGS)
    assert is_dataset(folder / "empty")


@pytest.mark.parametrize(
    ("split", "line", "message"),
    [
        ("train", "odd\tB_PER\n", r"train\.conll:\d+: found 'B_PER'"),
        ("test", "odd\n", r"test\.conll:\d+: found 1 column"),
        ("dev", "odd\tB-ORG\n", r"dev\.conll:\d+: found label 'B-ORG'"),
    ],
)
def test_an_error_in_one_block_is_raised_on_every_rank_and_leaves_nothing(comm, folder, recipe, split, line, message):
    if comm.rank == 0:
        with recipe.files[split].open("a") as file:
            file.write(line)
    comm.Barrier()
    before = sorted(folder.iterdir())
    with pytest.raises(DataError, match=message):
        prepare(comm, recipe, folder / "out", **SETTINGS)
    comm.Barrier()
    assert sorted(folder.iterdir()) == before


def test_a_failure_before_the_end_leaves_nothing(comm, folder, recipe, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    before = sorted(folder.iterdir())
    monkeypatch.setattr(module, "commit", fail)
    with pytest.raises((OSError, Exception), match="disk full"):
        prepare(comm, recipe, folder / "out", **SETTINGS)
    comm.Barrier()
    assert sorted(folder.iterdir()) == before


@pytest.mark.mpi(min_size=2)
def test_two_groups_preparing_one_target_are_harmless(comm, folder, recipe):
    group = comm.Split(comm.rank % 2)
    info = prepare(group, recipe, folder / "out", **SETTINGS)
    comm.Barrier()
    verify_dataset(comm, folder / "out", info)
    assert not [path for path in folder.iterdir() if path.name.endswith(".tmp")]
    group.Free()


def test_the_loser_of_a_race_discards_its_files_and_uses_the_winners(comm, folder, recipe, monkeypatch):
    info = prepare(comm, recipe, folder / "out", **SETTINGS)
    looks = iter([False])  # rank 0 looks before the winner is there, and again after its own rename failed
    look = cache.holds
    monkeypatch.setattr(module, "holds", lambda *place: next(looks, None) if comm.rank == 0 else look(*place))
    stamp = (folder / "out").stat().st_ino
    comm.Barrier()
    assert prepare(comm, recipe, folder / "out", **SETTINGS) == info
    assert (folder / "out").stat().st_ino == stamp
    assert not [path for path in folder.iterdir() if path.name.endswith(".tmp")]


def test_a_tokenizer_that_is_brought_is_used(comm, folder, recipe):
    tokenizer = train_tokenizer(["w1 x2 w3"] * 20, 60, False)
    info = prepare(comm, recipe, folder / "out", **{**SETTINGS, "tokenizer": tokenizer})
    assert info.tokenizer_hash == tokenizer_hash(tokenizer) == tokenizer_hash(load_tokenizer(folder / "out"))
    assert (info.vocab_size, info.lowercase) == (tokenizer.get_vocab_size(), False)


def test_without_a_train_split_a_tokenizer_must_be_brought(comm, folder, recipe):
    only_test = recipe.model_copy(update={"files": {"test": recipe.files["test"]}})
    with pytest.raises(UsageError, match=r"no train split .* --tokenizer\.path"):
        prepare(comm, only_test, folder / "out", **SETTINGS)
    tokenizer = train_tokenizer(["w1 x2 w3"] * 20, 60, False)
    assert list(prepare(comm, only_test, folder / "out", **{**SETTINGS, "tokenizer": tokenizer}).splits) == ["test"]


def test_the_cache_is_keyed_by_text_recipe_and_settings(comm, folder, recipe, monkeypatch):
    monkeypatch.setenv("MPITRAIN_CACHE", str(folder / "cache"))
    place = cached(comm, recipe, **SETTINGS)
    assert place.parent == folder / "cache" and open_dataset(place).name == "made"
    assert cached(comm, recipe, **SETTINGS) == place
    assert cached(comm, recipe, **{**SETTINGS, "max_length": 9}) != place
    assert cached(comm, recipe.model_copy(update={"labels": open_dataset(place).label_names}), **SETTINGS) != place
    comm.Barrier()
    if comm.rank == 0:
        with recipe.files["dev"].open("a") as file:
            file.write("new\tO\n")
    comm.Barrier()
    assert cached(comm, recipe, **SETTINGS) != place


def test_a_cache_that_cannot_be_written_names_the_variable(comm, folder, recipe, monkeypatch):
    monkeypatch.setenv("MPITRAIN_CACHE", str(folder / "train.conll" / "cache"))
    with pytest.raises(UsageError, match=r"cannot be written: .* MPITRAIN_CACHE"):
        cached(comm, recipe, **SETTINGS)


def test_cache_directory_follows_the_environment(comm, monkeypatch):
    monkeypatch.setenv("MPITRAIN_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache.cache_directory() == Path("/a")
    monkeypatch.delenv("MPITRAIN_CACHE")
    assert cache.cache_directory() == Path("/b/mpitrain")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.cache_directory() == Path.home() / ".cache" / "mpitrain"


def test_blocks_depend_on_the_text_alone_and_are_few():
    assert [block_size(number) for number in (1, 5000, 10**8)] == [2048, 2048, 195313]
    assert -(-(10**8) // block_size(10**8)) == 512


def test_a_description_shows_counts_labels_and_oddities(comm, folder, recipe):
    info: DatasetInfo = prepare(comm, recipe, folder / "out", **SETTINGS)
    console = Console(width=160)
    with console.capture() as shown:
        console.print(describe(folder / "out")[0])
    text = shown.get()
    assert all(label in text for label in info.label_names)
    assert "20" in text and f"train: {info.summary['train'].normalised['sentences split']} x sentences split" in text
