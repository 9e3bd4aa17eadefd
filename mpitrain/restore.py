"""A trained model out of a checkpoint, on any mesh, for the commands that only use it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mpitrain.checkpoint.load import fill, find_checkpoint, verify
from mpitrain.checkpoint.manifest import Manifest
from mpitrain.comm.buckets import StateSlice
from mpitrain.config import Config
from mpitrain.errors import CheckpointError
from mpitrain.model.bert import BertStage, load_weights, parameter_shapes
from mpitrain.observe.console import Console
from mpitrain.pipeline.executor import Executor
from mpitrain.place import DTYPES, Place, find_place
from mpitrain.problem import Problem
from mpitrain.runtime.agree import Comm, share, together


@dataclass(frozen=True)
class Trained:
    """A verified checkpoint.

    Attributes:
        described: its config.json.
    """

    directory: Path
    manifest: Manifest
    problem: Problem
    described: dict[str, Any]


def open_checkpoint(comm: Comm, place: Path, console: Console) -> Trained:
    """Find, verify and understand a checkpoint (collective).

    Raises:
        CheckpointError: there is none, or it is damaged; on all ranks.
    """
    found = None
    with together(comm, "looking for --checkpoint"):
        if comm.rank == 0:
            found = str(find_checkpoint(place))
    directory = Path(share(comm, found))
    manifest = verify(comm, directory)
    console.say("loaded", f"{directory} ({len(manifest.tensors)} tensors, {len(manifest.files)} files verified)")
    texts = None
    with together(comm, f"reading {directory}"):
        if comm.rank == 0:
            texts = [(directory / name).read_text(encoding="utf-8") for name in ("config.json", "tokenizer.json")]
    shared = share(comm, texts)
    trained = None
    with together(comm, f"understanding {directory}"):
        try:
            described = json.loads(shared[0])
            trained = Trained(directory, manifest, Problem.from_documents(described["problem"], shared[1]), described)
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{directory}/config.json: cannot be used: {error!r}") from None
    assert trained is not None
    return trained


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
    """This rank's stage with its trained weights, ready to infer (collective)."""
    problem = trained.problem
    place = find_place(comm, config, problem, console, pipe=1)
    stage = BertStage(problem.card, len(problem.label_names), *place.blocks)
    names = [name for name, _ in stage.named_parameters()]
    load_weights(stage, restore_weights(place.mesh.world, trained, names))
    stage.to(place.transport.device, DTYPES[config.train.precision])
    return place, Executor(stage, place.mesh, place.transport, problem.card.hidden_size)
