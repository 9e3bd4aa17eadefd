"""A trained model out of a checkpoint, on any mesh, for the commands that only use it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from mpitrain.checkpoint.load import fill, verify
from mpitrain.checkpoint.manifest import Manifest, committed, find_checkpoint
from mpitrain.comm.buckets import Member, StateSlice
from mpitrain.config import Config
from mpitrain.errors import CheckpointError, on_all_ranks
from mpitrain.files import parse_json
from mpitrain.model.bert import BertStage, parameter_shapes
from mpitrain.observe.console import Console
from mpitrain.pipeline.executor import Executor
from mpitrain.pipeline.schedule import SCHEDULES
from mpitrain.place import DTYPES, Place, find_place, say_stages
from mpitrain.problem import Problem
from mpitrain.runtime.agree import Comm, attempt, attempt_at_root
from mpitrain.runtime.device import choose_device

DOCUMENTS = ("config.json", "tokenizer.json")


@dataclass(frozen=True)
class Trained:
    """A verified checkpoint.

    Attributes:
        trained_on: `data` and `shards` of its config.json.
        numerics: `precision` and `matmul_precision` of its training.
    """

    directory: Path
    manifest: Manifest
    problem: Problem
    trained_on: dict[str, str]
    numerics: dict[str, str]


def open_checkpoint(comm: Comm, place: Path, console: Console) -> Trained:
    """Find, verify and understand a checkpoint (collective).

    Raises:
        CheckpointError: there is none, or it is damaged; on all ranks.
    """
    directory = Path(attempt_at_root(comm, "looking for --checkpoint", lambda: str(find_checkpoint(place))))
    try:
        manifest = verify(comm, directory)
    except CheckpointError as error:  # nothing else is taken instead: a score must be that of what was asked for
        others = [str(path) for path in committed(directory.parent) if path.name != directory.name]
        hint = f"; others, not looked at yet, to be given as --checkpoint: {', '.join(others)}" if others else ""
        raise on_all_ranks(CheckpointError(f"{error}{hint}")) from None
    console.say("loaded", f"{directory} ({len(manifest.tensors)} tensors, {len(manifest.files)} files verified)")
    texts = attempt_at_root(comm, f"reading {directory}", lambda: [_read(directory / name) for name in DOCUMENTS])
    return attempt(comm, f"understanding {directory}", lambda: _understand(directory, manifest, *texts))


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from None


def _understand(directory: Path, manifest: Manifest, config: str, tokenizer: str) -> Trained:
    try:
        described = parse_json(config)
        problem = Problem.from_documents(described["problem"], tokenizer)
        trained_on = {name: described[name] for name in ("data", "shards")}
        train = described["config"]["train"]
        numerics = {name: train[name] for name in ("precision", "matmul_precision")}
        return Trained(directory, manifest, problem, trained_on, numerics)
    except Exception as error:  # of JSON, of pydantic, and of tokenizers, which has no class of its own
        raise CheckpointError(f"{directory}: config.json or tokenizer.json cannot be used: {error!r}") from None


def restore_weights(comm: Comm, trained: Trained, names: list[str]) -> dict[str, torch.Tensor]:
    """Some parameters as they were trained, fp32 in their shapes (collective)."""
    shapes = parameter_shapes(trained.problem.card, len(trained.problem.label_names))
    weights = {name: torch.empty(shapes[name]) for name in names}
    slices = [
        StateSlice("weight", name, shapes[name], 0, values.numel(), values.view(-1)) for name, values in weights.items()
    ]
    fill(comm, trained.directory, trained.manifest, slices)
    return weights


def restore_stage(comm: Comm, config: Config, trained: Trained, console: Console) -> tuple[Place, Executor]:
    """This rank's stage with its trained weights, ready to infer in the precision of training if none is given.

    Collective. fp16, which is for GPUs, becomes fp32 where there are none.
    """
    problem = trained.problem
    numerics = {name: value for name, value in trained.numerics.items() if name not in config.train.model_fields_set}
    if numerics.get("precision") == "fp16" and choose_device(comm, config.train.device).type == "cpu":
        numerics["precision"] = "fp32"
    config = config.model_copy(update={"train": config.train.model_copy(update=numerics)})
    if config.pipeline.schedule not in SCHEDULES:  # a file orders the passes of training, which have no part here
        config = config.model_copy(update={"pipeline": config.pipeline.model_copy(update={"schedule": "1f1b"})})
    place = find_place(comm, config, problem, console, pipe=1)
    say_stages(console, place, problem.card)
    console.say("computes", f"in {config.train.precision}; trained in {trained.numerics['precision']}")
    stage = BertStage(problem.card, len(problem.label_names), place.chunks, group=place.group)
    slices = [
        Member(name, parameter, 0, parameter.numel(), stage.shards[name]).slice(
            "weight", 0, parameter.detach().view(-1)
        )
        for name, parameter in stage.named_parameters()
    ]
    fill(place.mesh.world, trained.directory, trained.manifest, slices)
    stage.to(place.transport.device, DTYPES[config.train.precision])
    return place, Executor(stage, place.mesh, place.transport, place.arrangement.schedule)
