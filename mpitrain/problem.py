"""What is to be learned by what: `--model` and `--data` resolved, shards prepared where there are none yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from mpitrain.config import Config
from mpitrain.dataset.prepare import cached, prepare
from mpitrain.dataset.recipe import load_recipe, recipe_of_files
from mpitrain.dataset.shards import DatasetInfo, is_dataset, open_dataset, verify_dataset
from mpitrain.dataset.tokenize import load_tokenizer, tokenizer_hash
from mpitrain.errors import DataError
from mpitrain.metrics import Counts
from mpitrain.model.card import ModelCard, resolve_model
from mpitrain.model.pretrained import Pretrained, read_pretrained
from mpitrain.observe.console import Console
from mpitrain.runtime.agree import Comm, attempt, require_same, share


@dataclass(frozen=True)
class Problem:
    """What is to be learned, and the shape of what learns it."""

    card: ModelCard
    label_names: list[str]
    tokenizer: Tokenizer
    directory: Path | None = None
    info: DatasetInfo | None = None
    pretrained: Pretrained | None = None

    @property
    def mean_length(self) -> float:
        """Tokens of a sequence of the train split; 0 without one."""
        entries = self.info.splits.get("train", []) if self.info is not None else []
        return sum(entry.tokens for entry in entries) / max(1, sum(entry.sequences for entry in entries))

    @cached_property
    def tokenizer_json(self) -> str:
        """The tokenizer as text."""
        return str(self.tokenizer.to_str())

    def describe(self) -> dict[str, Any]:
        """All that a checkpoint needs to be used without its data."""
        return {"model": self.card.model_dump(), "labels": self.label_names}

    @classmethod
    def from_documents(cls, described: dict[str, Any], tokenizer_text: str) -> Problem:
        """The inverse of `describe` and `tokenizer_json`."""
        return cls(ModelCard(**described["model"]), described["labels"], Tokenizer.from_str(tokenizer_text))


def find_problem(comm: Comm, config: Config, console: Console) -> Problem:
    """Resolve `--model` and `--data`, preparing shards where there are none yet (collective).

    Raises:
        MpitrainError: on all ranks, with the first cause.
    """
    model = attempt(comm, "resolving --model", lambda: resolve_model(config.model))
    directory = prepare_data(comm, config, model, console)
    problem, info = attempt(comm, "opening model and data", lambda: _open(config, model, directory))
    require_same(comm, f"--model {config.model}", {name: str(value) for name, value in problem.card}, DataError)
    verify_dataset(comm, directory, info)
    return problem


def own_tokenizer(config: Config, model: ModelCard | Path) -> Tokenizer | None:
    """The tokenizer that the model or the configuration brings, or None if one is to be trained."""
    if config.tokenizer.path is not None:
        return load_tokenizer(config.tokenizer.path)
    return load_tokenizer(model) if isinstance(model, Path) else None


def prepare_data(comm: Comm, config: Config, model: ModelCard | Path, console: Console) -> Path:
    """The directory of prepared shards that `--data` means (collective)."""
    if share(comm, is_dataset(Path(config.data))):
        return Path(config.data)
    recipe, settings = attempt(
        comm, "resolving --data", lambda: (load_recipe(config.data), how_to_prepare(config, model, console))
    )
    return cached(comm, recipe, **settings)


def how_to_prepare(config: Config, model: ModelCard | Path, console: Console) -> dict[str, Any]:
    """What the model fixes of the shards: arguments of `prepare` and `cached`."""
    card = read_card(model)
    return {
        "tokenizer": own_tokenizer(config, model),
        "vocab_size": config.tokenizer.vocab_size,
        "lowercase": card.do_lower_case,
        "max_length": card.max_position_embeddings,
        "progress": lambda text: console.say("prepare", text),
    }


def prepare_files(comm: Comm, config: Config, files: Sequence[str], console: Console) -> Path:
    """`mpitrain prepare`: tagged text, or `--data`, into shards in `--out` or in the cache (collective)."""
    recipe, settings = attempt(
        comm,
        "resolving --model and --data",
        lambda: (
            recipe_of_files(files) if files else load_recipe(config.data),
            how_to_prepare(config, resolve_model(config.model), console),
        ),
    )
    if config.out is None:
        return cached(comm, recipe, **settings)
    prepare(comm, recipe, config.out, **settings)
    return config.out


def find_data(
    comm: Comm, config: Config, trained: dict[str, str], problem: Problem, console: Console
) -> tuple[Path, DatasetInfo]:
    """Shards to score a trained model on: of `--data` if given, else of what it was trained on (collective).

    Args:
        trained: the `data` and `shards` of the run, from its config.json.

    Raises:
        MpitrainError: there are none, or they go with another tokenizer or other labels.
    """
    wanted = config.data if "data" in config.model_fields_set else trained["data"]
    directory = Path(wanted if wanted != trained["data"] else trained["shards"])
    if not share(comm, is_dataset(directory)):
        recipe = attempt(comm, "resolving --data", lambda: load_recipe(wanted))
        # The model's labels, in its order, whatever subset of them this text has.
        recipe = recipe.model_copy(update={"labels": problem.label_names})
        card = problem.card
        directory = cached(
            comm,
            recipe,
            tokenizer=problem.tokenizer,
            vocab_size=card.vocab_size,
            lowercase=card.do_lower_case,
            max_length=card.max_position_embeddings,
            progress=lambda text: console.say("prepare", text),
        )
    info = attempt(comm, f"opening {directory}", lambda: _open_fitting(directory, problem))
    verify_dataset(comm, directory, info)
    return directory, info


def _open_fitting(directory: Path, problem: Problem) -> DatasetInfo:
    info = open_dataset(directory)
    if info.label_names != problem.label_names or info.tokenizer_hash != tokenizer_hash(problem.tokenizer):
        raise DataError(
            f"{directory}: was prepared for another model: its labels are {', '.join(info.label_names)}, the "
            f"model's are {', '.join(problem.label_names)}, or the tokenizers differ; give the text as --data"
        )
    return info


def read_card(model: ModelCard | Path) -> ModelCard:
    """The card of a shelf model or of a Hugging Face directory."""
    return read_pretrained(model).card if isinstance(model, Path) else model


def _open(config: Config, model: ModelCard | Path, directory: Path) -> tuple[Problem, DatasetInfo]:
    info = open_dataset(directory)
    Counts.of(info.label_names)  # labels that could not be scored are refused before anything is trained
    if info.label_names == ["O"]:
        raise DataError(f"{directory}: every word is tagged O, so there is nothing to learn; is the tag column right?")
    tokenizer = load_tokenizer(directory)
    if tokenizer_hash(tokenizer) != info.tokenizer_hash:
        raise DataError(f"{directory}: tokenizer.json: damaged; delete the directory and prepare again")
    brought = own_tokenizer(config, model)
    if brought is not None and tokenizer_hash(brought) != info.tokenizer_hash:
        raise DataError(
            f"{directory}: was prepared with another tokenizer than that of {config.tokenizer.path or config.model}; "
            f"prepare the text again with the same --model"
        )
    pretrained = read_pretrained(model, info.label_names) if isinstance(model, Path) else None
    card = pretrained.card if pretrained else read_card(model).model_copy(update={"vocab_size": info.vocab_size})
    if info.vocab_size > card.vocab_size:
        raise DataError(
            f"{directory}: has {info.vocab_size:,} word pieces, {config.model} has embeddings for {card.vocab_size:,}; "
            "prepare the text with the model's own tokenizer"
        )
    if info.max_length > card.max_position_embeddings:
        raise DataError(
            f"{directory}: holds sequences of up to {info.max_length} tokens, but {config.model} has "
            f"{card.max_position_embeddings} positions; prepare the text again with the same --model"
        )
    if config.train.dropout is not None:
        names = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
        card = card.model_copy(update=dict.fromkeys(names, config.train.dropout))
    return Problem(card, info.label_names, tokenizer, directory, info, pretrained), info
