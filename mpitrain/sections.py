"""The sections of a run's configuration: every field with its meaning, its default and what it may be."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, model_validator

MOST_THREADS = 1024  # of a rank; thousands end in a crash of the library of threads
SHORTEST_HANG = 2.0  # ranks are looked at once a second
BALANCES = ("cost", "measured")
SCHEDULES = ("1f1b", "gpipe", "interleaved", "zb-h1", "zb-v")


def _joined(value: Any) -> Any:
    """A list, as a TOML file has it, means what `3,3,4,2` does on a command line."""
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else value


def _balance(value: str) -> str:
    if value not in BALANCES and not re.fullmatch(r"-?\d+(,-?\d+)*", value):
        raise ValueError("should be cost, measured, or layers of each stage such as 3,3,4,2")
    return value


def _schedule(value: str) -> str:
    if value not in SCHEDULES and not value.endswith(".csv"):
        raise ValueError(f"should be one of {', '.join(SCHEDULES)}, or a file that ends with .csv")
    return value


Axis = Annotated[PositiveInt | None, BeforeValidator(lambda value: None if value == "auto" else value)]


def _some_seconds(value: float) -> float:
    if value != 0 and value < SHORTEST_HANG:
        raise ValueError(f"should be 0 or at least {SHORTEST_HANG:g} seconds")
    return value


def seconds_of(text: str) -> float:
    """Seconds, minutes:seconds, hours:minutes:seconds, or days-hours:minutes:seconds, as schedulers write them.

    Raises:
        ValueError: it is none of these.
    """
    found = re.fullmatch(r"(?:(?:(?:(\d+)-)?(\d+):)?(\d+):)?(\d+(?:\.\d+)?)", text)
    if found is None:
        raise ValueError("should be auto, seconds, or [days-]hours:minutes:seconds")
    days, hours, minutes, seconds = (float(number or 0) for number in found.groups())
    return seconds + 60 * (minutes + 60 * (hours + 24 * days))


def _time_limit(value: Any) -> Any:
    if isinstance(value, str):
        return None if value == "auto" else seconds_of(value)
    return value


class Section(BaseModel):
    """A part of the configuration; the text under a field is its help."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True, serialize_by_alias=True)


class Mesh(Section):
    """How the ranks are arranged; what is not given, or auto, is chosen and printed."""

    data: Axis = None
    """replicas of the model, each trained on its share of every batch"""
    pipe: Axis = None
    """stages that a replica's layers are spread over"""
    tensor: Axis = None
    """ranks that share each layer of a stage: its attention heads, columns of the MLP, word pieces"""
    tensor_across_nodes: bool = False
    """let ranks on different nodes share layers, with eight exchanges a layer and micro-batch"""

    @property
    def asked(self) -> dict[str, int]:
        """Ranks along the axes that are given."""
        return {axis: size for axis in ("data", "pipe", "tensor") if (size := getattr(self, axis)) is not None}

    @property
    def flags(self) -> str:
        """The same as they are written on a command line."""
        return " ".join(f"--mesh.{axis} {size}" for axis, size in self.asked.items())


class Pipeline(Section):
    """How a replica's stages work together."""

    schedule: Annotated[str, AfterValidator(_schedule)] = "1f1b"
    """order of forward and backward passes: 1f1b, gpipe, interleaved, zb-h1, zb-v, or a CSV file of one's own (a row a
    stage; cells such as 0F3, 0B3, 0I3, 0W3 as torch.distributed.pipelining has them)"""
    chunks: Annotated[int, Field(ge=2)] = 2
    """parts of the model on each stage, with schedule interleaved"""
    balance: Annotated[str, BeforeValidator(_joined), AfterValidator(_balance)] = "cost"
    """how the model is split over stages: by estimated cost; measured, by the time that blocks take on the ranks' own
    cores; or encoder layers per stage by hand, such as 3,3,4,2 (of several chunks: of each, in the model's order)"""

    @property
    def layers(self) -> tuple[int, ...] | None:
        """Layers of each stage or chunk, if they are given by hand."""
        return None if self.balance in BALANCES else tuple(map(int, self.balance.split(",")))


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
    the input of each layer; less memory, more time; saves little with schedules that cut backward passes in halves"""
    reproducible: bool = False
    """the same bits on any data x pipe mesh of powers of two, with the same threads per rank: gradients are summed in
    fp32 by a tree, in place of --comm.algorithm; slower; not with --mesh.tensor"""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """of initial weights, order of the data, dropout"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one"""
    threads: Annotated[int, Field(ge=1, le=MOST_THREADS)] | None = None
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
    asynchronous: Annotated[bool, Field(alias="async")] = True
    """write from a copy in memory, 12 bytes a parameter over all replicas, while the training goes on"""


class Runtime(Section):
    """What is watched while the job runs."""

    hang_timeout: Annotated[float, Field(allow_inf_nan=False), AfterValidator(_some_seconds)] = 600.0
    """seconds without progress of any rank after which the job is ended, with where each rank is; 0 is never"""
    on_failure: Literal["end", "shrink"] = "end"
    """what becomes of the job when a rank dies: it ends; or it goes on from the last checkpoint with the replicas that
    are left (Open MPI 5 with mpirun --with-ft ulfm)"""
    time_limit: Annotated[float | None, Field(ge=0, allow_inf_nan=False), BeforeValidator(_time_limit)] = None
    """when to have stopped with a checkpoint, in seconds or [days-]hours:minutes:seconds from the start on; 0 is never;
    auto asks the scheduler (Slurm, PBS, LSF, Flux) how long the job may go on"""
    check_every: Annotated[int, Field(ge=0)] = 100
    """steps between checks that replicas hold the same bits, and none changes until the next update; 0 is never"""


class Log(Section):
    """What is said and written down of a run besides its own files."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """what rank 0 says besides results: all; with debug also where each rank is, and every step with its parts"""
    tensorboard: bool = False
    """write event files for TensorBoard, too, in tensorboard/ of the run directory"""


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
