"""What a run is told: one typed tree, filled from TOML, then the environment, then flags; all mistakes at once."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from mpitrain.errors import UsageError

# Variables of the program that are not fields of the configuration.
OTHER_VARIABLES = {"MPITRAIN_CACHE", "MPITRAIN_CORPORA"}


def _numbers(value: Any) -> Any:
    """`3,3,4,2` on a command line or in a variable is a list of numbers."""
    return value.strip("[]").split(",") if isinstance(value, str) else value


class Section(BaseModel):
    """A part of the configuration; the text under a field is its help."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True)


class Mesh(Section):
    """How the ranks are arranged; what is not given is chosen and printed."""

    data: PositiveInt | None = None
    """replicas of the model, each trained on its share of every batch"""
    pipe: PositiveInt | None = None
    """stages that a replica's layers are spread over"""
    tensor: Literal[1] | None = None
    """ranks that share each layer (only 1 in this version)"""


class Pipeline(Section):
    """How a replica's stages work together."""

    schedule: Literal["1f1b", "gpipe"] = "1f1b"
    """order of forward and backward passes; 1f1b holds fewer activations"""
    layers: Annotated[tuple[int, ...] | None, BeforeValidator(_numbers)] = None
    """encoder layers per stage by hand, such as 3,3,4,2; by estimated cost if not given"""


class Train(Section):
    """The recipe of optimisation."""

    batch_size: PositiveInt = 32
    """sequences in the global batch of one step"""
    micro_batches: PositiveInt = 8
    """parts of equal cost that the global batch is cut into, whatever the mesh"""
    epochs: PositiveInt = 3
    """times that every sequence is trained on"""
    max_steps: PositiveInt | None = None
    """stop after this many steps, even in the middle of an epoch"""
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """peak learning rate; if not given 5e-5 for pretrained weights, 1e-3 from scratch"""
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """share of the steps in which the learning rate rises linearly; then it falls linearly to 0"""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """AdamW's decay, not applied to biases and LayerNorm"""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """decay of AdamW's first moment"""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """decay of AdamW's second moment"""
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """added to AdamW's denominator"""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """gradients are scaled down to this global norm"""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """dropout everywhere in the model; the model card's if not given"""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """dtype of weights and activations in the passes; master weights are always fp32"""
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """of fp32 products: high and medium round their factors to TF32 or bf16 where the hardware gains by it"""
    linear: Literal["auto", "torch", "onednn"] = "auto"
    """library of fp32 products on a CPU: the one torch takes, or oneDNN; auto is the faster one in a check at start"""
    recompute: Literal["none", "attention", "block"] = "none"
    """what the backward pass computes again instead of keeping it: scores and probabilities of attention, or all but
    the input of each layer; less memory, more time"""
    reproducible: bool = False
    """the same bits on any data x pipe mesh of powers of two, with the same threads per rank: gradients are summed in
    fp32 by a tree, in place of --comm.algorithm; slower"""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """of initial weights, order of the data, dropout"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one"""
    threads: PositiveInt | None = None
    """compute threads per rank; else OMP_NUM_THREADS; else an even share of the cores that this rank may use"""
    early_stopping: Annotated[int, Field(ge=0)] = 0
    """stop after this many evaluations without a better dev F1; 0 is off"""
    max_skipped_steps: PositiveInt = 10
    """give up after this many steps in a row whose gradients are not finite"""


class Tokenizer(Section):
    """Word pieces, for models that bring no tokenizer of their own."""

    path: Path | None = None
    """a directory with tokenizer.json or vocab.txt; one is trained on the train split if not given"""
    vocab_size: Annotated[int, Field(ge=64, le=1_000_000)] = 4096
    """word pieces of a tokenizer that is trained here"""


class Checkpoint(Section):
    """What a run can be resumed from."""

    every: PositiveInt = 200
    """steps between checkpoints; there is always one at the end"""
    keep: PositiveInt = 3
    """newest checkpoints that are kept"""
    best: bool = True
    """save and keep the checkpoint with the best dev F1 too"""


class Comm(Section):
    """How gradients travel."""

    algorithm: Literal["auto", "ring", "node", "native"] = "auto"
    """node shares memory between the ranks of a node, with rings between nodes; ring sends messages between all ranks;
    native is MPI_Reduce_scatter and MPI_Allgatherv; auto is node on CPUs where replicas share a node whose /dev/shm
    has room, else ring"""
    wire_dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """dtype of gradients in messages (with node: between nodes); sums are made in fp32; auto is fp32"""
    error_feedback: bool = False
    """with wire_dtype bf16: what rounding loses of a partial sum is sent in the next step; 4 bytes a parameter"""
    bucket_mib: Annotated[float, Field(gt=0, le=1024)] = 8.0
    """MiB of gradients that are reduced together"""
    gpu: Literal["auto", "direct", "staged"] = "auto"
    """how a GPU's memory reaches MPI: direct, or staged through pinned host memory; auto is direct where the MPI
    library says that it takes device memory and a check in a child process agrees"""

    @model_validator(mode="after")
    def _wire_fits(self) -> Self:
        if self.algorithm == "native" and self.wire_dtype == "bf16":
            raise ValueError("--comm.algorithm native sums in fp32 on the wire; take --comm.wire_dtype fp32, or ring")
        if self.error_feedback and self.wire_dtype != "bf16":
            raise ValueError("--comm.error_feedback sends what a bf16 wire loses; take --comm.wire_dtype bf16 as well")
        return self


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
    out: Path | None = None
    """run directory; runs/<model>-<data>-<n> if not given (bench writes nothing then)"""
    resume: str = "auto"
    """auto: from the newest checkpoint in the run directory, if any; none; or a run or checkpoint directory"""
    mesh: Mesh = Mesh()
    pipeline: Pipeline = Pipeline()
    train: Train = Train()
    tokenizer: Tokenizer = Tokenizer()
    checkpoint: Checkpoint = Checkpoint()
    comm: Comm = Comm()

    @model_validator(mode="after")
    def _reproducible_sums_by_a_tree(self) -> Self:
        if self.train.reproducible and (self.comm.algorithm != "auto" or self.comm.wire_dtype == "bf16"):
            raise ValueError(
                "--train.reproducible sums in fp32, by a tree; leave --comm.algorithm and --comm.wire_dtype at auto"
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
    return path[-1] in fields


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
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
        return f"{prefix}{field}: {text}" if mistake["loc"] else text
    if mistake["type"] == "extra_forbidden":
        return f"{prefix}{field}: no such field; found {mistake['input']!r}"
    return f"{prefix}{field}: {mistake['msg'][:1].lower()}{mistake['msg'][1:]}; found {mistake['input']!r}"


def help_text() -> str:
    """Every field with its flag, meaning and default."""
    source: CliSettingsSource[Any] = CliSettingsSource(Config, cli_parse_args=False, cli_prog_name="mpitrain")
    text: str = source.root_parser.format_help()
    return text[text.index("options:") :].replace("options:", "configuration fields:", 1)
