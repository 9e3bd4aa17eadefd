"""What a run is told: one typed tree, filled from TOML, then the environment, then flags; all mistakes at once."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from mpitrain.errors import UsageError
from mpitrain.files import parse_toml
from mpitrain.sections import Checkpoint, Comm, Log, Mesh, Pipeline, Runtime, Tokenizer, Train

# Variables of the program that are not fields of the configuration.
OTHER_VARIABLES = {"MPITRAIN_CACHE", "MPITRAIN_CORPORA", "MPITRAIN_FAILPOINT"}


def _named(value: Any) -> Any:
    if value == "":  # a variable of a script that was never set
        raise ValueError("a directory would work")
    return value


class Config(BaseSettings):
    """A whole run. Defaults train bert-mini on the bundled sample."""

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        env_prefix="MPITRAIN_",
        env_nested_delimiter="__",
        cli_avoid_json=True,
        cli_hide_none_type=True,
        cli_exit_on_error=False,
        protected_namespaces=(),
    )
    sources: ClassVar[tuple[Sequence[str] | None, dict[str, Any]]] = (None, {})

    model: str = "bert-mini"
    """model card by name or path, or a Hugging Face directory with weights and tokenizer"""
    data: str = "sample"
    """dataset recipe by name or path, a folder or file of tagged text, or a folder of prepared shards"""
    out: Annotated[Path | None, BeforeValidator(_named)] = None
    """run directory; runs/<model>-<data>-<n> if not given (bench writes nothing then)"""
    resume: str = "auto"
    """auto: from the newest checkpoint in the run directory, if any; none; or a run or checkpoint directory"""
    trace: Annotated[int, Field(ge=0)] = 0
    """record so many steps of each rank, after the first two of a start, in trace/trace.json of the run directory"""
    machine: Path | None = None
    """figures of a machine: plan takes them instead of measuring, a run is compared with what they foretell of it"""
    mesh: Mesh = Mesh()
    pipeline: Pipeline = Pipeline()
    train: Train = Train()
    tokenizer: Tokenizer = Tokenizer()
    checkpoint: Checkpoint = Checkpoint()
    comm: Comm = Comm()
    runtime: Runtime = Runtime()
    log: Log = Log()

    @model_validator(mode="after")
    def _reproducible_sums_by_a_tree(self) -> Self:
        if self.train.reproducible and (self.comm.algorithm != "auto" or self.comm.wire_dtype == "bf16"):
            raise ValueError(
                "--train.reproducible sums in fp32, by a tree; leave --comm.algorithm and --comm.wire_dtype at auto"
            )
        if self.train.reproducible and self.pipeline.schedule not in ("1f1b", "gpipe"):
            raise ValueError(
                "--train.reproducible needs stages of one chunk and whole backward passes; "
                "take --pipeline.schedule 1f1b or gpipe"
            )
        return self

    @model_validator(mode="after")
    def _residuals_have_one_scale(self) -> Self:
        if self.comm.error_feedback and self.train.precision == "fp16":
            raise ValueError(
                "--comm.error_feedback keeps gradients of earlier steps, whose scale --train.precision fp16 changes; "
                "take --train.precision bf16 or fp32"
            )
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, then environment, then the TOML file: the first to name a field wins."""
        flags, table = cls.sources
        if flags is None:
            return (init_settings,)
        command_line: CliSettingsSource[Any] = CliSettingsSource(
            settings_cls, cli_parse_args=list(flags), cli_prog_name="mpitrain"
        )
        return (command_line, env_settings, InitSettingsSource(settings_cls, table))


def load(flags: Sequence[str], file: Path | None = None) -> Config:
    """The configuration of this process.

    Raises:
        UsageError: every unknown or invalid field, each with what was found and what would work.
    """
    table = _read_toml(file) if file else {}
    unknown = sorted(
        name
        for name in os.environ
        if name.startswith("MPITRAIN_") and name not in OTHER_VARIABLES and not _is_field(name)
    )
    Config.sources = (flags, table)
    try:
        config = Config()
    except SettingsError as error:
        raise UsageError(f"{error}; `python -m mpitrain --help` lists the flags") from None
    except ValidationError as error:
        raise UsageError(_all_mistakes(error, file, unknown)) from None
    finally:
        Config.sources = (None, {})
    if unknown:
        raise UsageError(f"environment: no configuration field belongs to {', '.join(unknown)}")
    return config


def _is_field(variable: str) -> bool:
    path = variable.removeprefix("MPITRAIN_").lower().split("__")
    fields: dict[str, Any] = Config.model_fields
    for part in path[:-1]:
        kind = fields[part].annotation if part in fields else None
        fields = kind.model_fields if isinstance(kind, type) and issubclass(kind, BaseModel) else {}
    return path[-1] in {field.alias or name for name, field in fields.items()}


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        return parse_toml(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config {file}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {file}: is not TOML: {error}") from None


def _all_mistakes(error: ValidationError, file: Path | None, unknown: list[str]) -> str:
    known = {name.removeprefix("MPITRAIN_").lower() for name in unknown}  # pydantic finds some of these too
    mistakes = [mistake for mistake in error.errors() if "__".join(map(str, mistake["loc"])) not in known]
    lines = [describe(mistake, prefix="--") for mistake in mistakes]
    lines += [f"{name}: no such field (environment variable)" for name in unknown]
    origin = f" (flags, MPITRAIN_ variables{f', {file}' if file else ''})"
    return "\n  ".join([f"configuration{origin}: {len(lines)} mistake(s)", *lines])


def describe(mistake: Any, prefix: str = "") -> str:
    """One of pydantic's findings in a line: field, what is wrong, what was found."""
    field = ".".join(str(part) for part in mistake["loc"] if not str(part).startswith("function-")) or "table"
    if mistake["type"] == "value_error" and isinstance(mistake["input"], dict):  # of several fields, which it names
        text = str(mistake["msg"]).removeprefix("Value error, ")
        return f"{prefix}{field}: {text}" if mistake["loc"] and not text.startswith(prefix or " ") else text
    if mistake["type"] == "extra_forbidden":
        return f"{prefix}{field}: no such field; found {mistake['input']!r}"
    told = f"{prefix}{field}: {mistake['msg'][:1].lower()}{mistake['msg'][1:]}"
    return told if mistake["type"] == "missing" else f"{told}; found {mistake['input']!r}"


def flags_of(words: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Each flag with its value, which is a word of its own or stands behind an equals sign."""
    rest = iter(words)
    for word in rest:
        yield (word,) if "=" in word else (word, next(rest))


def flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A table of tables by dotted names."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def help_text() -> str:
    """Every field with its flag, meaning and default."""
    source: CliSettingsSource[Any] = CliSettingsSource(Config, cli_parse_args=False, cli_prog_name="mpitrain")
    text: str = source.root_parser.format_help()
    return text[text.index("options:") :].replace("options:", "configuration fields:", 1)
