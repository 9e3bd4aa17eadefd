"""Text to shards in parallel: the same files for any number of ranks, complete or not there at all.

Work is cut into blocks of sentences whose size depends on the text alone; a rank takes every size-th block.
Everything is written into a directory aside, `dataset.json` last, and the directory is renamed.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from mpitrain.dataset.cache import cache_directory, commit, fingerprint, holds
from mpitrain.dataset.census import Census, SplitSummary, label_names
from mpitrain.dataset.conll import FileIndex, index_file, read_sentences
from mpitrain.dataset.recipe import SPLITS, Recipe, Split
from mpitrain.dataset.shards import (
    IGNORED,
    DatasetInfo,
    ShardEntry,
    Source,
    open_dataset,
    write_shard,
)
from mpitrain.dataset.tokenize import encode_sentences, is_lowercase, tokenizer_hash, train_tokenizer
from mpitrain.errors import UsageError
from mpitrain.files import file_hash
from mpitrain.runtime.agree import Comm, collect, share, share_array, together

MIN_BLOCK = 2048  # sentences; smaller files would cost more to open than to read
MAX_BLOCKS = 512  # per split; a reader maps them all and has about 1,000 file descriptors


def cached(
    comm: Comm,
    recipe: Recipe,
    *,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    lowercase: bool,
    max_length: int,
    progress: Callable[[str], None],
) -> Path:
    """Prepare into the cache, or find it there (collective). Arguments and errors: see `prepare`."""
    return _Preparation(comm, recipe, tokenizer, vocab_size, lowercase, max_length, progress).run(None)


def prepare(
    comm: Comm,
    recipe: Recipe,
    out: Path,
    *,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    lowercase: bool,
    max_length: int,
    progress: Callable[[str], None],
) -> DatasetInfo:
    """Turn a recipe's text into a directory of shards (collective).

    Args:
        out: a directory that is not there yet, is empty, or holds this very dataset (which is then used).
        tokenizer: if None, one of `vocab_size` pieces is trained on the train split, else `vocab_size` and
            `lowercase` are not used.
        max_length: longest sequence in tokens, [CLS] and [SEP] included.
        progress: told in words how far it is, on rank 0.

    Raises:
        UsageError: `out` holds something else or cannot be written.
        DataError: the text is wrong; on all ranks, with file and line.
    """
    place = _Preparation(comm, recipe, tokenizer, vocab_size, lowercase, max_length, progress).run(out)
    document = None
    with together(comm, f"opening {place}"):
        if comm.rank == 0:
            document = open_dataset(place).model_dump(mode="json")
    return DatasetInfo.model_validate(share(comm, document))


def block_size(num_sentences: int) -> int:
    """Sentences per shard: of the text alone, never of the number of ranks."""
    return max(MIN_BLOCK, -(-num_sentences // MAX_BLOCKS))


@dataclass
class _Preparation:
    comm: Comm
    recipe: Recipe
    tokenizer: Tokenizer | None
    vocab_size: int
    lowercase: bool
    max_length: int
    progress: Callable[[str], None]

    def run(self, out: Path | None) -> Path:
        """Prepare into `out`, or into the cache (collective)."""
        sources, mark, out = self._identify(out)
        if share(self.comm, self._is_there(out, mark)):
            return out
        indices = self._index()
        censuses = self._survey(indices)
        labels: list[str] = []
        with together(self.comm, "settling the labels"):
            labels = label_names(self.recipe, censuses)
        tokenizer = self._tokenizer(indices)
        aside = self._make_directory(out)
        try:
            shards = self._encode(indices, labels, tokenizer, aside)
            with together(self.comm, f"writing {out}"):
                if self.comm.rank == 0:
                    info = DatasetInfo(
                        name=self.recipe.name,
                        fingerprint=mark,
                        label_names=labels,
                        scheme="none" if self.recipe.scheme == "none" else "iob2",
                        tokenizer_hash=tokenizer_hash(tokenizer),
                        vocab_size=tokenizer.get_vocab_size(),
                        max_length=self.max_length,
                        lowercase=is_lowercase(tokenizer),
                        splits={split: [entry for entry, _ in parts] for split, parts in shards.items()},
                        summary={split: _summary(indices[split], censuses[split], shards[split]) for split in indices},
                        source=sources,
                        license=self.recipe.license,
                        citation=self.recipe.citation,
                    )
                    commit(aside, out, tokenizer, info)
        finally:  # after a failure, or where another run was faster
            if self.comm.rank == 0:
                shutil.rmtree(aside, ignore_errors=True)
        return out

    def _say(self, text: str) -> None:
        if self.comm.rank == 0:
            self.progress(text)

    def _identify(self, out: Path | None) -> tuple[dict[Split, Source], str, Path]:
        """Which dataset this is, by the hashes of its texts, and where it belongs."""
        found: Any = None
        with together(self.comm, "reading the texts"):
            if self.comm.rank == 0:
                sources = {split: _source(path) for split, path in self.recipe.files.items()}
                settings = f"WordPiece vocab_size={self.vocab_size} lowercase={self.lowercase}"
                settings = tokenizer_hash(self.tokenizer) if self.tokenizer else settings
                mark = fingerprint(self.recipe, sources, settings, self.max_length)
                place = (out or cache_directory() / f"{self.recipe.name}-{mark[:12]}").absolute()
                found = [{split: source.model_dump() for split, source in sources.items()}, mark, str(place)]
        documents, mark, place = share(self.comm, found)
        return {split: Source(**document) for split, document in documents.items()}, mark, Path(place)

    def _is_there(self, out: Path, mark: str) -> bool:
        """On rank 0: whether `out` is this dataset already."""
        there = False
        with together(self.comm, f"looking at {out}"):
            if self.comm.rank == 0:
                there = holds(out, mark)
        return there

    def _index(self) -> dict[Split, FileIndex]:
        indices: dict[Split, FileIndex] = {}
        for split in SPLITS:
            if split not in self.recipe.files:
                continue
            path = self.recipe.files[split]
            found: FileIndex | None = None
            with together(self.comm, f"reading {path}"):
                if self.comm.rank == 0:
                    found = index_file(path, self.recipe)
            head = share(
                self.comm, [found.num_bytes, found.separator, found.num_columns, found.dropped] if found else None
            )
            offsets = share_array(self.comm, found.offsets if found else None)
            lines = share_array(self.comm, found.lines if found else None)
            indices[split] = FileIndex(offsets, lines, *head)
            self._say(f"{path.name}: {len(offsets):,} sentences")
        return indices

    def _blocks(self, index: FileIndex) -> Iterator[tuple[int, int, int]]:
        """Number, first and last sentence of the blocks of this rank."""
        size = block_size(len(index.offsets))
        for number in range(self.comm.rank, -(-len(index.offsets) // size), self.comm.size):
            yield number, number * size, min((number + 1) * size, len(index.offsets))

    def _survey(self, indices: dict[Split, FileIndex]) -> dict[Split, Census]:
        censuses: dict[Split, Census] = {}
        for split, index in indices.items():
            mine = Census()
            with together(self.comm, f"reading {self.recipe.files[split]}"):
                for _, start, stop in self._blocks(index):
                    mine.add(read_sentences(self.recipe.files[split], self.recipe, index, start, stop))
            censuses[split] = Census.merged(Census(**document) for document in collect(self.comm, asdict(mine)))
        return censuses

    def _tokenizer(self, indices: dict[Split, FileIndex]) -> Tokenizer:
        text = None
        with together(self.comm, "training the tokenizer"):
            if self.comm.rank == 0:
                if self.tokenizer is None:
                    self._say(f"training a WordPiece tokenizer of up to {self.vocab_size:,} pieces")
                text = (self.tokenizer or self._train_tokenizer(indices)).to_str()
        return Tokenizer.from_str(share(self.comm, text))

    def _train_tokenizer(self, indices: dict[Split, FileIndex]) -> Tokenizer:
        if "train" not in indices:
            raise UsageError(
                f"{self.recipe.name} has no train split to train a tokenizer on; give one: --tokenizer.path"
            )
        path, index = self.recipe.files["train"], indices["train"]
        num_sentences, size = len(index.offsets), MIN_BLOCK
        blocks = (
            read_sentences(path, self.recipe, index, start, min(start + size, num_sentences))
            for start in range(0, num_sentences, size)
        )
        words = (word for block in blocks for sentence in block for word in sentence.words)
        return train_tokenizer(words, self.vocab_size, self.lowercase)

    def _make_directory(self, out: Path) -> Path:
        """A new directory beside `out`, seen by every rank."""
        aside = Path(share(self.comm, str(out.parent / f".{out.name}.{os.getpid()}-{secrets.token_hex(6)}.tmp")))
        with together(self.comm, f"making {aside}"):
            if self.comm.rank == 0:
                try:
                    aside.mkdir(parents=True)
                except OSError as error:
                    advice = "choose another directory; MPITRAIN_CACHE is that of the cache"
                    raise UsageError(f"{out.parent}: cannot be written: {error.strerror}; {advice}") from None
        with together(self.comm, f"looking for {aside}"):
            if not aside.is_dir():
                raise UsageError(f"{out.parent}: not seen by rank {self.comm.rank}; choose a shared file system")
        return aside

    def _encode(
        self, indices: dict[Split, FileIndex], labels: list[str], tokenizer: Tokenizer, aside: Path
    ) -> dict[Split, list[tuple[ShardEntry, dict[str, int]]]]:
        numbers = {label: number for number, label in enumerate(labels)}
        shards: dict[Split, list[tuple[ShardEntry, dict[str, int]]]] = {}
        for split, index in indices.items():
            self._say(f"writing {split}")
            mine = []
            with together(self.comm, f"writing {split} shards"):
                for block, start, stop in self._blocks(index):
                    sentences = read_sentences(self.recipe.files[split], self.recipe, index, start, stop)
                    encoded = encode_sentences(tokenizer, [found.words for found in sentences], self.max_length)
                    ids = np.full(len(encoded.tokens), IGNORED, np.int16)
                    ids[encoded.word_starts == 1] = [numbers[tag] for found in sentences for tag in found.tags]
                    path = aside / f"{split}-{block:05d}.h5"
                    entry = write_shard(path, encoded, ids, start, tokenizer.get_vocab_size())
                    mine.append([block, entry.model_dump(), encoded.counts])
            everyone = sorted(part for parts in collect(self.comm, mine) for part in parts)
            shards[split] = [(ShardEntry(**entry), counts) for _, entry, counts in everyone]
        return shards


def _source(path: Path) -> Source:
    return Source(file=path.name, bytes=path.stat().st_size, sha256=file_hash(path))


def _summary(index: FileIndex, census: Census, shards: list[tuple[ShardEntry, dict[str, int]]]) -> SplitSummary:
    pieces = sum(entry.tokens - 2 * entry.sequences for entry, _ in shards)  # [CLS] and [SEP] are no pieces of words
    return census.summary(pieces, [index.dropped, *(counts for _, counts in shards)])
