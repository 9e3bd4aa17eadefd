"""Where prepared datasets live: each under the fingerprint of what it was made from, whole or not there at all."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from tokenizers import Tokenizer

from mpitrain.dataset.recipe import Recipe, Split
from mpitrain.dataset.shards import INDEX_FILE, DatasetInfo, Source, open_dataset
from mpitrain.errors import UsageError
from mpitrain.files import seal, sync


def cache_directory() -> Path:
    """Where prepared datasets are kept: MPITRAIN_CACHE, else XDG_CACHE_HOME/mpitrain, else ~/.cache/mpitrain."""
    if own := os.environ.get("MPITRAIN_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mpitrain"


def fingerprint(recipe: Recipe, sources: dict[Split, Source], tokenizer: str, max_length: int) -> str:
    """sha256 of all that decides what the shards hold.

    Args:
        tokenizer: hash of the tokenizer, or the settings that one is trained with.
    """
    fields = recipe.model_dump(mode="json", exclude={"files", "description", "homepage", "fetch"})
    texts = {split: source.sha256 for split, source in sources.items()}
    parts = {"format": 2, "recipe": fields, "texts": texts, "tokenizer": tokenizer, "max_length": max_length}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def holds(out: Path, mark: str) -> bool:
    """Whether `out` is the dataset of that fingerprint; False if it is free to be made."""
    if (out / INDEX_FILE).is_file():
        info = open_dataset(out)
        if info.fingerprint == mark:
            return True
        raise UsageError(
            f"{out}: holds another dataset ({info.name}, {info.fingerprint[:12]}); choose another directory"
        )
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"{out}: exists and is not a prepared dataset; choose a directory that is empty or not there")
    return False


def commit(aside: Path, out: Path, tokenizer: Tokenizer, info: DatasetInfo) -> None:
    """Make the dataset appear under its name, whole; harmless if another run was faster."""
    tokenizer.save(str(aside / "tokenizer.json"))
    (aside / INDEX_FILE).write_text(seal(info.model_dump_json(indent=1) + "\n"), encoding="utf-8")
    for name in ("tokenizer.json", INDEX_FILE, "."):
        sync(aside / name)
    try:
        aside.rename(out)
    except OSError as error:
        if not holds(out, info.fingerprint):
            raise UsageError(f"{out}: cannot be made: {error.strerror}") from None
    sync(out.parent)
