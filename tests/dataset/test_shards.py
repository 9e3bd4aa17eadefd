"""A shard reads back as written, its bytes depend on its content alone, and damage is named (exam cases 21, 40, 41)."""

import os
from pathlib import Path

import h5py
import numpy as np
import pytest

from mpitrain.dataset.shards import (
    DatasetInfo,
    ShardEntry,
    map_shard,
    open_dataset,
    read_index,
    verify_shard,
    write_shard,
)
from mpitrain.dataset.tokenize import Encoded
from mpitrain.errors import DataError
from mpitrain.files import file_hash

LABELS = np.array([-100, 2, 0, -100, -100, 1, -100, -100], np.int16)


def encoded() -> Encoded:
    return Encoded(
        tokens=np.array([2, 9, 8, 3, 2, 7, 6, 3], np.int32),
        word_starts=np.array([0, 1, 1, 0, 0, 1, 0, 0], np.uint8),
        offsets=np.array([0, 4, 8], np.int64),
        words=np.array([2, 1], np.int32),
        sentences=np.array([0, 1], np.int64),
        counts={},
    )


@pytest.fixture
def shard(tmp_path) -> tuple[Path, ShardEntry]:
    path = tmp_path / "train-00000.h5"
    return path, write_shard(path, encoded(), LABELS, 100, 10)


def rehashed(path: Path, entry: ShardEntry) -> ShardEntry:
    return entry.model_copy(update={"sha256": file_hash(path)})


def test_a_shard_reads_back_as_written(shard):
    path, entry = shard
    verify_shard(path, entry, num_labels=3, vocab_size=10)
    arrays = map_shard(path)
    assert {name: array.dtype.str for name, array in arrays.items()} == {
        "tokens": "<u2", "labels": "<i2", "word_starts": "|u1", "offsets": "<i8", "words": "<i4", "sentences": "<i8"
    }  # fmt: skip
    assert arrays["tokens"].tolist() == encoded().tokens.tolist() and arrays["labels"].tolist() == LABELS.tolist()
    assert [column.tolist() for column in read_index(path)] == [[4, 4], [2, 1], [100, 101]]
    assert (entry.sequences, entry.sentences, entry.tokens, entry.words) == (2, 2, 8, 3)
    with pytest.raises(ValueError, match="read-only"):
        arrays["tokens"][0] = 1


def test_a_large_vocabulary_needs_wider_tokens(tmp_path):
    entry = write_shard(tmp_path / "a.h5", encoded(), LABELS, 0, 70000)
    assert map_shard(tmp_path / "a.h5")["tokens"].dtype == np.int32
    verify_shard(tmp_path / "a.h5", entry, 3, 70000)


def test_bytes_depend_on_the_content_alone(shard, tmp_path):
    path, entry = shard
    with h5py.File(path) as file:  # a stored time would show only from the next second on
        assert {h5py.h5g.get_objinfo(data.id).mtime for data in file.values()} == {0}
    other = write_shard(tmp_path / "other.h5", encoded(), LABELS, 100, 10)
    assert (tmp_path / "other.h5").read_bytes() == path.read_bytes() and other.sha256 == entry.sha256


def test_a_shard_without_sequences_is_fine(tmp_path):
    none = np.empty(0, np.int64)
    empty = Encoded(
        none.astype(np.int32), none.astype(np.uint8), np.zeros(1, np.int64), none.astype(np.int32), none, {}
    )
    entry = write_shard(tmp_path / "a.h5", empty, none.astype(np.int16), 0, 10)
    verify_shard(tmp_path / "a.h5", entry, 3, 10)
    assert len(map_shard(tmp_path / "a.h5")["tokens"]) == 0


@pytest.mark.parametrize("place", [0, 100, -1])
def test_one_flipped_bit_is_found(shard, place):
    path, entry = shard
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"{path.name}: damaged: its sha256 is .* dataset\.json says {entry.sha256}"):
        verify_shard(path, entry, 3, 10)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def zero_superblock(path: Path) -> None:
    path.write_bytes(b"\0" * 96 + path.read_bytes()[96:])


@pytest.mark.parametrize("damage", [truncate, zero_superblock, lambda path: path.write_bytes(b"")])
def test_a_broken_file_with_a_matching_hash_is_an_error_and_no_crash(shard, damage):
    path, entry = shard
    damage(path)
    with pytest.raises(DataError, match=path.name):
        verify_shard(path, rehashed(path, entry), 3, 10)


def replace(name: str, values, **options):
    def edit(file: h5py.File) -> None:
        del file[name]
        file.create_dataset(name, data=values, **options)

    return edit


def link_out(file: h5py.File) -> None:
    del file["tokens"]
    file["tokens"] = h5py.ExternalLink("/etc/hostname", "/tokens")


def soft_link(file: h5py.File) -> None:
    del file["words"]
    file["words"] = h5py.SoftLink("/sentences")


def store_outside(file: h5py.File) -> None:
    del file["word_starts"]
    file.create_dataset("word_starts", (8,), "u1", external=[("outside.raw", 0, 8)])


def declare_huge(file: h5py.File) -> None:
    del file["tokens"]
    file.create_dataset("tokens", (1 << 50,), "u2")


TOKENS = encoded().tokens.astype("u2")
STRUCTURE = {
    "dataset missing": (lambda file: file.__delitem__("labels"), "labels: missing"),
    "group": (lambda file: (file.__delitem__("labels"), file.create_group("labels")), "labels: missing"),
    "external link": (link_out, "tokens: missing, or a link"),
    "soft link": (soft_link, "words: missing, or a link"),
    "external storage": (store_outside, "word_starts: expected plain contiguous storage"),
    "filter": (replace("tokens", TOKENS, compression="gzip"), "tokens: expected plain contiguous storage"),
    "declared only": (declare_huge, "tokens: 1125899906842624 rows are declared, none was written"),
    "wrong dtype": (replace("labels", LABELS.astype("f4")), "labels: found float32"),
    "objects": (replace("labels", ["a"] * 8), "labels: found object"),
    "wrong rank": (replace("tokens", TOKENS.reshape(2, 4)), r"tokens: found uint16 of shape \(2, 4\)"),
    "lengths differ": (replace("labels", LABELS[:-1]), "labels: has 7 rows, dataset.json says 8"),
    "label too large": (
        replace("labels", np.where(LABELS == 1, 3, LABELS).astype("i2")),
        "labels: row 5: no label of 3",
    ),
    "label below -100": (replace("labels", np.where(LABELS == 1, -7, LABELS).astype("i2")), "labels: row 5"),
    "label on a later piece": (replace("labels", np.roll(LABELS, 1)), "labels: row 1: label and word start disagree"),
    "token too large": (
        replace("tokens", np.where(TOKENS == 9, 10, TOKENS).astype("u2")),
        "tokens: row 1: no token of 10",
    ),
    "offsets fall": (replace("offsets", np.array([0, 9, 8])), "offsets: row 2: does not grow"),
    "offsets start late": (replace("offsets", np.array([1, 4, 8])), "offsets: row 0"),
    "offsets end early": (replace("offsets", np.array([0, 4, 7])), "offsets: the last is 7"),
    "wrong word count": (replace("words", np.array([1, 2], "i4")), "words: row 0: differs"),
}


@pytest.mark.parametrize("fault", STRUCTURE)
def test_wrong_structure_names_file_dataset_and_row(shard, fault):
    path, entry = shard
    edit, message = STRUCTURE[fault]
    with h5py.File(path, "r+") as file:
        edit(file)
    with pytest.raises(DataError, match=rf"{path.name}: {message}"):
        verify_shard(path, rehashed(path, entry), 3, 10)


def test_a_link_or_a_pipe_in_place_of_a_shard_is_refused_and_does_not_hang(shard, tmp_path):
    path, entry = shard
    (tmp_path / "link.h5").symlink_to(path)
    os.mkfifo(tmp_path / "pipe.h5")
    for name in ("link.h5", "pipe.h5", "nothing.h5"):
        with pytest.raises(DataError, match="missing, or not a plain file"):
            verify_shard(tmp_path / name, entry, 3, 10)


def info(**fields) -> dict:
    entry = {"file": "train-00000.h5", "sequences": 1, "sentences": 1, "tokens": 3, "words": 1, "sha256": "0" * 64}
    return {
        "name": "made", "fingerprint": "0" * 64, "label_names": ["O"], "scheme": "iob2", "tokenizer_hash": "0" * 64,
        "vocab_size": 9, "max_length": 8, "lowercase": True, "splits": {"train": [entry | fields]}, "summary": {},
        "source": {}, "license": "", "citation": "",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["../x.h5", "/etc/passwd", "a/b.h5", "..", ".", "", "a\0b", "a\n", ".hidden"])
def test_a_name_that_leads_out_of_the_directory_is_refused(name):
    with pytest.raises(ValueError, match=r"splits\.train\.0\.file"):
        DatasetInfo.model_validate(info(file=name))


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[" * 100000, b"\xff", b'{"version": 2}', b'{"version": 1, "surprise": 1}']
)
def test_a_damaged_index_is_a_data_error(tmp_path, content):
    (tmp_path / "dataset.json").write_bytes(content)
    with pytest.raises(DataError, match=r"dataset\.json: damaged or of another version"):
        open_dataset(tmp_path)


def test_a_directory_without_an_index_is_no_dataset(tmp_path):
    with pytest.raises(DataError, match="not yet"):
        open_dataset(tmp_path)
