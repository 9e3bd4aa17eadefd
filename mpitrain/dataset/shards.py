"""Prepared sequences in HDF5: flat contiguous arrays, checked against `dataset.json` before the first use.

Serial h5py without locks (parallel file systems often refuse them): files are immutable once `dataset.json` is there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import h5py
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mpitrain.dataset.census import SplitSummary
from mpitrain.dataset.recipe import Split
from mpitrain.dataset.tokenize import Encoded
from mpitrain.errors import DataError
from mpitrain.files import FileName, Sink, file_hash, is_sealed, sync
from mpitrain.hdf5 import map_arrays
from mpitrain.runtime.agree import Comm, require_same, together

IGNORED = -100  # label of [CLS], [SEP] and of all pieces of a word but the first
INDEX_FILE = "dataset.json"
# Kinds of dtype that each dataset may have, and the entry of dataset.json that says how long it is.
DATASETS: dict[str, tuple[tuple[str, ...], str]] = {
    "tokens": (("<u2", "<i4"), "tokens"),
    "labels": (("<i2",), "tokens"),
    "word_starts": (("|u1",), "tokens"),
    "offsets": (("<i8",), "offsets"),
    "words": (("<i4",), "sequences"),
    "sentences": (("<i8",), "sequences"),
}
Count = Annotated[int, Field(ge=0)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class ShardEntry(BaseModel):
    """What `dataset.json` says of one file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: FileName
    sequences: Count
    sentences: Count
    tokens: Count
    words: Count
    sha256: Sha256


class Source(BaseModel):
    """The text that a split was made from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str
    bytes: Count
    sha256: Sha256


class DatasetInfo(BaseModel):
    """The contents of `dataset.json`: written last, so its presence says that the dataset is whole.

    Attributes:
        seal: sha256 of the text with this field empty (`files.seal`).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    seal: str = ""
    version: Literal[2] = 2
    name: str
    fingerprint: Sha256
    label_names: Annotated[list[str], Field(min_length=1, max_length=32767)]
    scheme: Literal["iob2", "none"]
    tokenizer_hash: Sha256
    vocab_size: Annotated[int, Field(ge=1)]
    max_length: Annotated[int, Field(ge=3)]
    lowercase: bool
    splits: dict[Split, list[ShardEntry]]
    summary: dict[Split, SplitSummary]
    source: dict[Split, Source]
    license: str
    citation: str

    @property
    def content_hash(self) -> str:
        """sha256 over all shards: the same for the same text, wherever it came from."""
        shards = sorted((split, [entry.sha256 for entry in entries]) for split, entries in self.splits.items())
        return hashlib.sha256(json.dumps(shards).encode()).hexdigest()


def is_dataset(path: Path) -> bool:
    """Whether the path is a directory of prepared shards."""
    return (path / INDEX_FILE).is_file()


def open_dataset(directory: Path) -> DatasetInfo:
    """Read and check `dataset.json`; the shards themselves are not opened.

    Raises:
        DataError: it is missing, or says what it may not say.
    """
    place = directory / INDEX_FILE
    try:
        raw = place.read_bytes()
        info = DatasetInfo.model_validate_json(raw)
    except OSError as error:
        raise DataError(f"{place}: {error.strerror}; a directory without it is not (or not yet) a dataset") from None
    except ValidationError as error:
        mistakes = [f"  {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise DataError(
            "\n".join([f"{place}: damaged or of another version; delete {directory} and prepare again:", *mistakes])
        ) from None
    if not is_sealed(raw):
        raise DataError(
            f"{place}: damaged: its text is not the one whose sha256 is in it; delete {directory} and prepare again"
        )
    return info


def write_shard(
    path: Path, encoded: Encoded, labels: NDArray[np.int16], first_sentence: int, vocab_size: int
) -> ShardEntry:
    """Write one file; the same arrays give the same bytes.

    Args:
        labels: int16 [num_tokens], -100 where there is none.
        first_sentence: number, within the split, of the sentence that `encoded` calls 0.
    """
    arrays = {
        "tokens": encoded.tokens.astype("<u2" if vocab_size <= 65535 else "<i4"),
        "labels": labels.astype("<i2"),
        "word_starts": encoded.word_starts,
        "offsets": encoded.offsets.astype("<i8"),
        "words": encoded.words.astype("<i4"),
        "sentences": (encoded.sentences + first_sentence).astype("<i8"),
    }
    write_arrays(path, arrays)
    return ShardEntry(
        file=path.name,
        sequences=len(encoded.words),
        sentences=len(np.unique(encoded.sentences)),
        tokens=len(encoded.tokens),
        words=int(encoded.words.sum()),
        sha256=file_hash(path),
    )


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write them into a new file, as `hdf5.map_arrays` reads them, durably."""
    with Sink(path, "w+") as sink:
        with h5py.File(sink, "w") as file:
            for name, array in arrays.items():
                file.create_dataset(name, data=array, track_times=False)  # a time would make each run's bytes differ
        sink.check()
    sync(path)


def verify_dataset(comm: Comm, directory: Path, info: DatasetInfo) -> None:
    """Check that all ranks see the same dataset, and every shard of it once, shared out over the ranks (collective).

    Raises:
        DataError: on all ranks; names the file, the dataset and the row.
    """
    require_same(comm, f"data in {directory}", {f"sha256 of {INDEX_FILE}": info.seal}, DataError)
    entries = [entry for shards in info.splits.values() for entry in shards]
    with together(comm, f"checking the shards of {directory}"):
        for entry in entries[comm.rank :: comm.size]:
            verify_shard(directory / entry.file, entry, len(info.label_names), info.vocab_size)


def verify_shard(path: Path, entry: ShardEntry, num_labels: int, vocab_size: int) -> None:
    """Check one file before its arrays are used.

    Raises:
        DataError: another hash than that of `dataset.json`, or arrays that cannot be right.
    """
    if path.is_symlink() or not path.is_file():  # as in `hdf5.map_arrays`, before it is hashed
        raise DataError(f"{path}: missing, or not a plain file; prepare the dataset again")
    found = file_hash(path)
    if found != entry.sha256:
        raise DataError(f"{path}: damaged: its sha256 is {found}, dataset.json says {entry.sha256}; prepare again")
    arrays = map_shard(path)
    lengths = {"tokens": entry.tokens, "sequences": entry.sequences, "offsets": entry.sequences + 1}
    for name, (_, length) in DATASETS.items():
        if len(arrays[name]) != lengths[length]:
            raise DataError(f"{path}: {name}: has {len(arrays[name])} rows, dataset.json says {lengths[length]}")
    steps = np.diff(arrays["offsets"])
    _refuse(path, "offsets", np.concatenate([arrays["offsets"][:1] != 0, steps <= 0]), "does not grow from 0")
    if arrays["offsets"][-1] != entry.tokens:
        raise DataError(f"{path}: offsets: the last is {arrays['offsets'][-1]}, there are {entry.tokens} tokens")
    labels = arrays["labels"]
    _refuse(path, "tokens", (arrays["tokens"] >= vocab_size) | (arrays["tokens"] < 0), f"no token of {vocab_size}")
    _refuse(path, "labels", (labels >= num_labels) | ((labels < 0) & (labels != IGNORED)), f"no label of {num_labels}")
    starts = np.add.reduceat(arrays["word_starts"], arrays["offsets"][:-1], dtype=np.int64) if len(steps) else steps
    _refuse(path, "words", starts != arrays["words"], "differs from the word starts of its sequence")
    _refuse(path, "labels", (labels != IGNORED) != (arrays["word_starts"] == 1), "label and word start disagree")


def _refuse(path: Path, name: str, wrong: NDArray[np.bool_], why: str) -> None:
    if wrong.any():
        raise DataError(f"{path}: {name}: row {int(wrong.argmax())}: {why}")


def map_shard(path: Path) -> dict[str, NDArray[Any]]:
    """All arrays of a shard as read-only views; ranks of a node share their memory.

    Raises:
        DataError: names the file and the dataset that is missing or of another kind.
    """
    return map_arrays(path, {name: dtypes for name, (dtypes, _) in DATASETS.items()}, DataError)


def read_index(path: Path) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Tokens, words and sentence number of each sequence of a shard, int64 [num_sequences] each."""
    arrays = map_shard(path)
    return np.diff(arrays["offsets"]), arrays["words"].astype(np.int64), arrays["sentences"].astype(np.int64)
