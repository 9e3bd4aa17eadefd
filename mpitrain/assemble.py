"""What every command needs before its first batch: data, model, mesh, and this rank's stage of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from mpi4py import MPI
from tokenizers import Tokenizer

from mpitrain.comm.buffers import Transport, cuda_aware
from mpitrain.config import Config
from mpitrain.dataset.prepare import cached, is_dataset, prepare
from mpitrain.dataset.recipe import Recipe, load_recipe, recipe_of_files
from mpitrain.dataset.shards import DatasetInfo, open_dataset, verify_dataset
from mpitrain.dataset.tokenize import load_tokenizer, tokenizer_hash
from mpitrain.errors import DataError, UsageError
from mpitrain.model.bert import BertStage, block_costs, initialize, load_weights, num_blocks
from mpitrain.model.card import ModelCard, resolve_model
from mpitrain.model.pretrained import Pretrained, read_pretrained
from mpitrain.observe.console import Console
from mpitrain.pipeline.balance import by_hand, choose_mesh, split_blocks
from mpitrain.pipeline.executor import Executor
from mpitrain.runtime import mesh as meshes
from mpitrain.runtime.agree import Comm, share, together
from mpitrain.runtime.device import choose_device, place_on_node, share_cores
from mpitrain.runtime.mesh import Mesh

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Problem:
    """What is to be learned, and the shape of what learns it."""

    card: ModelCard
    label_names: list[str]
    tokenizer: Tokenizer
    directory: Path | None = None
    info: DatasetInfo | None = None
    pretrained: Pretrained | None = None

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
    model: ModelCard | Path = Path()
    with together(comm, "resolving --model"):
        model = resolve_model(config.model)
    directory = prepare_data(comm, config, model, console)
    problem = None
    with together(comm, "opening model and data"):
        problem = _open(config, model, directory)
    assert problem is not None and problem.info is not None
    verify_dataset(comm, directory, problem.info)
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
    recipe: Recipe | None = None
    settings: dict[str, Any] = {}
    with together(comm, "resolving --data"):
        recipe = load_recipe(config.data)
        settings = how_to_prepare(config, model, console)
    assert recipe is not None
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
    model: ModelCard | Path = Path()
    recipe: Recipe | None = None
    settings: dict[str, Any] = {}
    with together(comm, "resolving --model and --data"):
        model = resolve_model(config.model)
        recipe = recipe_of_files(files) if files else load_recipe(config.data)
        settings = how_to_prepare(config, model, console)
    assert recipe is not None
    if config.out is None:
        return cached(comm, recipe, **settings)
    prepare(comm, recipe, config.out, **settings)
    return config.out


def find_data(comm: Comm, config: Config, trained: dict[str, Any], problem: Problem, console: Console) -> Path:
    """Shards to score a trained model on: of `--data` if given, else of what it was trained on (collective).

    Args:
        trained: the `data` and `shards` of the run, from its config.json.

    Raises:
        MpitrainError: there are none, or they go with another tokenizer or other labels.
    """
    wanted = config.data if "data" in config.model_fields_set else trained["data"]
    directory = Path(wanted if wanted != trained["data"] else trained["shards"])
    if not share(comm, is_dataset(directory)):
        recipe: Recipe | None = None
        with together(comm, "resolving --data"):
            # The model's labels, in its order, whatever subset of them this text has.
            recipe = load_recipe(wanted).model_copy(update={"labels": problem.label_names})
        assert recipe is not None
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
    with together(comm, f"opening {directory}"):
        info = open_dataset(directory)
        if info.label_names != problem.label_names or info.tokenizer_hash != tokenizer_hash(problem.tokenizer):
            raise DataError(
                f"{directory}: was prepared for another model: its labels are {', '.join(info.label_names)}, the "
                f"model's are {', '.join(problem.label_names)}, or the tokenizers differ; give the text as --data instead"
            )
    return directory


def read_card(model: ModelCard | Path) -> ModelCard:
    """The card of a shelf model or of a Hugging Face directory."""
    return read_pretrained(model).card if isinstance(model, Path) else model


def _open(config: Config, model: ModelCard | Path, directory: Path) -> Problem:
    info = open_dataset(directory)
    tokenizer = load_tokenizer(directory)
    brought = own_tokenizer(config, model)
    if brought is not None and tokenizer_hash(brought) != info.tokenizer_hash:
        raise DataError(
            f"{directory}: was prepared with another tokenizer than that of {config.tokenizer.path or config.model}; "
            f"prepare the text again with the same --model"
        )
    pretrained = read_pretrained(model, info.label_names) if isinstance(model, Path) else None
    card = pretrained.card if pretrained else read_card(model).model_copy(update={"vocab_size": info.vocab_size})
    if info.max_length > card.max_position_embeddings:
        raise DataError(
            f"{directory}: holds sequences of up to {info.max_length} tokens, but {config.model} has "
            f"{card.max_position_embeddings} positions; prepare the text again with the same --model"
        )
    if config.train.dropout is not None:
        names = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
        card = card.model_copy(update=dict.fromkeys(names, config.train.dropout))
    return Problem(card, info.label_names, tokenizer, directory, info, pretrained)


@dataclass(frozen=True)
class Place:
    """Where and how this rank computes."""

    mesh: Mesh
    transport: Transport
    num_threads: int
    stages: list[tuple[int, int]]

    @property
    def blocks(self) -> tuple[int, int]:
        """The blocks [first, last) of this rank's stage."""
        return self.stages[self.mesh.stage]


def find_place(comm: Comm, config: Config, problem: Problem, console: Console, *, pipe: int | None = None) -> Place:
    """Choose what was left open of the mesh and say what was chosen (collective).

    Args:
        pipe: number of stages if neither axis is given, instead of the rule for training.
    """
    device = choose_device(comm, config.train.device)
    direct = device.type == "cuda" and cuda_aware(comm)
    num_threads, crowded = share_cores(comm, config.train.threads)
    shape, stages = (1, 1), []
    with together(comm, "choosing the mesh"):
        shape = _mesh_shape(comm.size, config, problem.card, pipe)
        meshes.check_shape(comm.size, *shape)
        stages = _split_model(config, problem, shape[1])
    mesh = meshes.build(comm, *shape)
    say_place(comm, console, device, direct, num_threads, crowded)
    console.say("mesh", f"{comm.size} rank(s) = {shape[0]} data x {shape[1]} pipe")
    for number, stage in enumerate(stages if shape[1] > 1 else []):
        console.say("", f"stage {number}: {name_blocks(stage, problem.card)}")
    return Place(mesh, Transport(device, direct, crowded), num_threads, stages)


def say_place(
    comm: Comm, console: Console, device: torch.device, direct: bool, num_threads: int, crowded: bool
) -> None:
    """Print what this job runs on (collective)."""
    library = MPI.Get_library_version().replace("\x00", "").splitlines()[0].split(",")[0].strip()
    per_node = place_on_node(comm)[1]
    where = f"{comm.size} rank(s), {per_node} on this node, {num_threads} thread(s) each"
    where += " (more ranks than cores: waiting ranks sleep)" if crowded else ""
    console.say("ranks", f"{where}; {library}")
    if device.type == "cuda":
        way = "directly (CUDA-aware MPI)" if direct else "staged through pinned host memory"
        console.say("device", f"{torch.cuda.get_device_name(device)}; tensors reach MPI {way}")


def _mesh_shape(num_ranks: int, config: Config, card: ModelCard, pipe: int | None) -> tuple[int, int]:
    data, stages = config.mesh.data, config.mesh.pipe
    if data is None and stages is None:
        if pipe is not None:
            return num_ranks // pipe, pipe
        if config.pipeline.layers is not None:
            return num_ranks // len(config.pipeline.layers), len(config.pipeline.layers)
        return choose_mesh(num_ranks, card.num_hidden_layers, config.train.micro_batches)
    return data or max(1, num_ranks // (stages or 1)), stages or max(1, num_ranks // (data or 1))


def _split_model(config: Config, problem: Problem, num_stages: int) -> list[tuple[int, int]]:
    card = problem.card
    if config.pipeline.layers is None:
        return split_blocks(block_costs(card, len(problem.label_names), mean_length=32.0), num_stages)
    if len(config.pipeline.layers) != num_stages:
        given = ",".join(map(str, config.pipeline.layers))
        raise UsageError(f"--pipeline.layers {given}: {len(config.pipeline.layers)} stages, the mesh has {num_stages}")
    return by_hand(config.pipeline.layers, card.num_hidden_layers)


def name_blocks(stage: tuple[int, int], card: ModelCard) -> str:
    """A stage's blocks in words: "embeddings, layers 0-1"."""
    first, last = stage
    layers = range(max(first, 1) - 1, min(last, num_blocks(card) - 1) - 1)
    words = ["embeddings"] if first == 0 else []
    if layers:
        words.append(f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]}-{layers[-1]}")
    return ", ".join([*words, "classifier"] if last == num_blocks(card) else words)


def build_stage(config: Config, problem: Problem, place: Place) -> tuple[BertStage, Executor]:
    """This rank's blocks with their first weights in fp32, and the executor that runs them."""
    stage = BertStage(problem.card, len(problem.label_names), *place.blocks)
    initialize(stage, problem.card, config.train.seed)
    if problem.pretrained is not None:
        names = [name for name, _ in stage.named_parameters()]
        load_weights(stage, problem.pretrained.weights(names))
    stage.to(place.transport.device)
    return stage, Executor(stage, place.mesh, place.transport, problem.card.hidden_size)
