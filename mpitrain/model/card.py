"""A model card: the shape of a BERT in a dozen numbers, under Hugging Face's names."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mpitrain import shelf
from mpitrain.errors import DataError, MpitrainError, UsageError
from mpitrain.files import parse_toml

MANY = 1 << 24  # more of anything than any BERT has: what says so is damaged, and would be tried all the same


class ModelCard(BaseModel):
    """Devlin et al. 2019, section 3, names the sizes; all of them count elements, probabilities are in [0, 1)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    vocab_size: int = Field(30522, gt=0, le=MANY, strict=True)
    hidden_size: int = Field(gt=0, le=MANY, strict=True)
    num_hidden_layers: int = Field(gt=0, le=1024, strict=True)
    num_attention_heads: int = Field(gt=0, le=MANY, strict=True)
    intermediate_size: int = Field(gt=0, le=MANY, strict=True)
    hidden_act: Literal["gelu", "gelu_new", "relu"] = "gelu"  # exact (erf), tanh approximation, rectifier
    max_position_embeddings: int = Field(512, gt=0, le=MANY, strict=True)
    type_vocab_size: int = Field(2, gt=0, le=MANY, strict=True)
    hidden_dropout_prob: float = Field(0.1, ge=0.0, lt=1.0)
    attention_probs_dropout_prob: float = Field(0.1, ge=0.0, lt=1.0)
    classifier_dropout: float | None = Field(None, ge=0.0, lt=1.0)  # None: hidden_dropout_prob
    layer_norm_eps: float = Field(1e-12, gt=0.0)
    initializer_range: float = Field(0.02, gt=0.0)
    do_lower_case: bool = True  # of the tokenizer, not of the network

    @model_validator(mode="after")
    def _heads_divide_hidden(self) -> Self:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads = {self.num_attention_heads} does not divide hidden_size = {self.hidden_size}"
            )
        return self


def card_of(values: Mapping[str, Any], where: str, error: type[MpitrainError] = UsageError) -> ModelCard:
    """Build a card from a file's fields.

    Raises:
        MpitrainError: of the kind `error`; one message lists every mistake as `where: field: what, found`.
    """
    try:
        return ModelCard(**values)
    except ValidationError as failure:
        raise error("\n".join(_mistake(where, found) for found in failure.errors())) from None


def _mistake(where: str, found: Any) -> str:
    field = ".".join(map(str, found["loc"]))
    if found["type"] == "extra_forbidden":
        return f"{where}: {field}: no field of a model card; the fields are {', '.join(ModelCard.model_fields)}"
    if found["type"] == "missing":
        return f"{where}: {field}: is missing"
    text = found["msg"].removeprefix("Value error, ")
    return f"{where}: {field}: {text}, found {found['input']!r}" if field else f"{where}: {text}"


def load_card(name_or_path: str | Path) -> ModelCard:
    """The card of a shelf name such as `bert-mini`, or of a TOML file.

    Raises:
        UsageError: no such card, no TOML, or wrong fields (all of them are listed).
    """
    path = shelf.find("models", str(name_or_path))
    try:
        return card_of(parse_toml(path.read_text(encoding="utf-8")), str(path))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as failure:
        raise UsageError(f"{path}: a model card is a TOML file, but reading it met: {failure}") from None


def resolve_model(name_or_path: str | Path) -> ModelCard | Path:
    """What `--model` means: a card (random weights), or the path of a Hugging Face directory (its weights).

    Nothing is downloaded; for a name that is neither here nor on the shelf the error holds the command that would.

    Raises:
        UsageError: no such card or directory, or a wrong card.
        DataError: a directory without config.json.
    """
    name = str(name_or_path)
    try:
        path = shelf.find("models", name)
    except UsageError as failure:
        if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
            raise
        target = f"./{name.rpartition('/')[2]}"
        raise UsageError(
            f"{failure}\nIf {name!r} is a model of the Hugging Face hub, fetch it where there is a network:\n"
            f"    hf download {name} --local-dir {target}\nand train with --model {target}"
        ) from None
    if not path.is_dir():
        return load_card(path)
    if not (path / "config.json").is_file():
        raise DataError(f"{path}: found no config.json; a pretrained directory holds config.json and model.safetensors")
    return path
