"""A small training problem that any mesh can take, with lengths as unequal as real sentences have."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from communicators import on_hosts

from mpitrain.arrange import Arrangement
from mpitrain.comm.buckets import Bucket, fill_buckets
from mpitrain.comm.buffers import Transport
from mpitrain.comm.choice import choose_exchange
from mpitrain.comm.group import open_group
from mpitrain.dataset.batches import TrainPlan
from mpitrain.dataset.sequences import MemorySplit
from mpitrain.model.bert import BertStage
from mpitrain.model.card import ModelCard
from mpitrain.model.cost import block_costs
from mpitrain.model.initial import initialize
from mpitrain.optim import ShardedAdamW
from mpitrain.pipeline.balance import by_hand, split_blocks
from mpitrain.pipeline.executor import Executor
from mpitrain.pipeline.schedule import SCHEDULES
from mpitrain.runtime import mesh as meshes
from mpitrain.sections import Train
from mpitrain.split import Shard, aligned_part
from mpitrain.step import Stepper

NUM_LABELS = 5


def small_card(**changes: Any) -> ModelCard:
    fields = {
        "vocab_size": 97,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
    }
    return ModelCard(**(fields | changes))


def small_split(num_sequences: int = 61, seed: int = 1) -> MemorySplit:
    """Sequences of 2 to 60 tokens, each token after the first labelled with probability one half."""
    generator = np.random.Generator(np.random.Philox(key=seed))
    lengths = np.minimum(2 + generator.geometric(0.1, num_sequences), 60)
    tokens = generator.integers(5, 97, lengths.sum())
    labels = np.where(generator.random(lengths.sum()) < 0.5, tokens % NUM_LABELS, -100)
    starts = np.cumsum(lengths) - lengths
    labels[starts] = -100
    labels[starts + 1] = 1
    words = np.add.reduceat(labels >= 0, starts)
    fields = {"tokens": tokens, "word_starts": labels >= 0, "labels": labels}
    return MemorySplit(fields, lengths, words, np.arange(num_sequences))


def own(buckets: list[Bucket], index: int, count: int, dtype: torch.dtype = torch.float32) -> list[Bucket]:
    """Give buckets private memory, as rank `index` of `count` would have it, without any other rank."""
    for bucket in buckets:
        gradients, owned = torch.zeros(bucket.size), aligned_part(index, bucket.size, count)
        weights = torch.zeros(bucket.size, dtype=dtype)
        for member in bucket.members:
            weights[member.start : member.stop] = member.parameter.detach().reshape(-1)
        bucket.attach(weights, gradients, owned, gradients[slice(*owned)])
    return buckets


def small_arrangement(
    card: ModelCard,
    data: int,
    pipe: int,
    schedule: str = "1f1b",
    chunks: int = 2,
    layers: tuple[int, ...] | None = None,
) -> Arrangement:
    found, costs = SCHEDULES[schedule](pipe, chunks), block_costs(card, NUM_LABELS, 20.0)
    by_cost = split_blocks(costs, len(found.placement.holders))
    return Arrangement(data, found, by_hand(layers, card.num_hidden_layers) if layers else by_cost)


@dataclass
class Trained:
    why: str  # the exchange is what it is
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    weights: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)
    updated: list[bool] = field(default_factory=list)
    shards: dict[str, Shard] = field(default_factory=dict)


def train_small(
    comm: Any,
    data: int,
    pipe: int,
    num_steps: int,
    *,
    device: str = "cpu",
    direct: bool | None = None,
    card: ModelCard | None = None,
    schedule: str = "1f1b",
    chunks: int = 2,
    layers: tuple[int, ...] | None = None,
    keep_weights: tuple[int, ...] = (),
    spoil: Any = None,
    algorithm: str = "auto",
    wire_dtype: torch.dtype | None = None,
    hosts: str | None = None,
    tensor: int = 1,
    **options: Any,
) -> Trained:
    """Train on a mesh; weights are this rank's own shards, by name, after the steps in `keep_weights`.

    Ranks share memory as far as they do, or as the key `hosts` of HOSTS says.
    """
    card = card or small_card()
    settings = Train(**({"batch_size": 14, "micro_batches": 8, "learning_rate": 3e-3, "max_grad_norm": 0.4} | options))
    mesh = meshes.build(comm, data, pipe, tensor)
    transport = Transport(torch.device(device), direct, patient=True)
    arrangement = small_arrangement(card, data, pipe, schedule, chunks, layers)
    group = open_group(mesh.world, on_hosts(mesh.tensor_axis, hosts), transport)
    stage = BertStage(card, NUM_LABELS, arrangement.stages[mesh.stage], settings.recompute, group)
    initialize(stage, card, settings.seed)
    stage.to(device)
    buckets = fill_buckets(stage, 20_000, stage.tables, stage.stacks, stage.shards, stage.shared)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[settings.precision]
    exchange, why = choose_exchange(
        mesh.world,
        on_hosts(mesh.data_axis, hosts),
        transport,
        buckets,
        dtype,
        algorithm=algorithm,
        wire_dtype=wire_dtype,
        reproducible=settings.reproducible,
    )
    exchange.spread()
    optimizer = ShardedAdamW(buckets, settings, first=mesh.tensor == 0)
    executor = Executor(stage, mesh, transport, arrangement.schedule)
    stepper = Stepper(
        mesh,
        executor,
        exchange,
        optimizer,
        options=settings,
        num_steps=num_steps,
        peak_learning_rate=settings.learning_rate,
    )
    split = small_split()
    plan = TrainPlan(
        split.index.lengths,
        split.index.words,
        batch_size=settings.batch_size,
        micro_batches=settings.micro_batches,
        hidden_size=card.hidden_size,
        seed=settings.seed,
    )
    trained = Trained(why)
    for step in range(num_steps):
        micro_batches = stepper.load(plan.step(step), split)
        if spoil is not None:
            spoil(step, mesh, stage)
        result = stepper.run(plan.step(step), micro_batches)
        trained.losses.append(result.loss)
        trained.grad_norms.append(result.grad_norm)
        trained.updated.append(result.updated)
        if step + 1 in keep_weights:
            trained.weights[step + 1] = {n: p.detach().float().cpu().clone() for n, p in stage.named_parameters()}
            trained.shards = stage.shards
    stepper.close()
    group.close()
    mesh.free()
    return trained
