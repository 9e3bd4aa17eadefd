"""Which mesh has room for a model: what each rank would hold of it, before any memory is taken."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from math import prod

import torch

from mpitrain.config import Config
from mpitrain.model.bert import BertStage, num_blocks
from mpitrain.model.card import ModelCard
from mpitrain.model.tensor_parallel import Alone
from mpitrain.pipeline.schedule import Instruction, Kind, Schedule

ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2}
GRADIENT, MOMENTS, MASTER = 4, 8, 4  # bytes of a parameter
PROGRAM = 1 << 29  # bytes of a rank before it has a model: Python, torch, MPI
UNEVEN = 4 / 3  # the largest micro-batch by their mean, at worst (`batches.cut_evenly`)


@dataclass(frozen=True)
class Room:
    """What a job runs on.

    Attributes:
        num_bytes: of memory that each rank may use.
        nodes: number of each rank's node.
        on_host: it is not a GPU's.
    """

    num_bytes: int
    nodes: Sequence[int]
    on_host: bool = True

    def holds_groups(self, size: int) -> bool:
        """Whether so many ranks in a row are always on one node."""
        groups = (self.nodes[start : start + size] for start in range(0, len(self.nodes), size))
        return all(len(set(group)) == 1 for group in groups)


class _First(Alone):
    """The first rank of a tensor group, which holds the most; computes nothing."""

    def __init__(self, size: int) -> None:
        self.size = size


@cache
def block_sizes(card: ModelCard, num_labels: int, tensor: int = 1) -> list[int]:
    """Parameters of each block on the rank that has the most of them."""
    sizes = [0] * num_blocks(card)
    with torch.device("meta"):
        stage = BertStage(card, num_labels, [(0, len(sizes))], group=_First(tensor))
    for name, parameter in stage.named_parameters():
        block = 0 if name.startswith("bert.embeddings.") else len(sizes) - 1
        if name.startswith("bert.encoder.layer."):
            block = 1 + int(name.split(".")[3])
        sizes[block] += prod(parameter.shape)
    return sizes


def state_bytes(num_parameters: int, data: int, precision: str, sharing: int = 1) -> int:
    """Weights, of which `sharing` ranks may have one copy, gradients and this rank's part of the optimizer's state."""
    owned = MOMENTS + (MASTER if ITEMSIZE[precision] < MASTER else 0)
    return num_parameters * GRADIENT + num_parameters * owned // data + num_parameters * ITEMSIZE[precision] // sharing


def activation_bytes(card: ModelCard, config: Config, num_tokens: float, length: float, tensor: int) -> float:
    """What one layer keeps of a micro-batch until its backward pass.

    Of each token: inputs, outputs and dropout masks of both sub-layers, ten times the hidden size and twice the
    intermediate one, and for each head its scores, their softmax in fp32 and their mask (after Korthikanti et al. 2022,
    section 4.1, for what is kept here). Ranks that share layers hold the gathered inputs of both sub-layers whole.
    """
    itemsize, hidden = ITEMSIZE[config.train.precision], card.hidden_size
    if config.train.recompute == "block":
        return num_tokens * hidden * itemsize / tensor
    scores = 0.0 if config.train.recompute == "attention" else card.num_attention_heads * length * (4 + 2 * itemsize)
    shared = (8 * hidden + 2 * card.intermediate_size) * itemsize + scores
    return num_tokens * (2 * hidden * itemsize + shared / tensor)


def most_kept(order: Iterable[Instruction]) -> int:
    """Passes through a chunk whose activations a stage keeps at a time, at most."""
    ends = (Kind.BACKWARD, Kind.BACKWARD_WEIGHT)
    return max(accumulate((step.kind is Kind.FORWARD) - (step.kind in ends) for step in order), default=0)


@dataclass(frozen=True)
class Need:
    """Bytes of the fullest rank.

    Attributes:
        least: weights, gradients and optimizer state alone, weights being shared by all replicas.
        expected: all in all, an estimate.
    """

    least: int
    expected: int


def need_of(
    card: ModelCard,
    config: Config,
    num_labels: int,
    stages: Sequence[Sequence[tuple[int, int]]],
    schedule: Schedule,
    data: int,
    tensor: int,
    length: float,
    *,
    copies: bool = True,
) -> Need:
    """What a mesh takes of its fullest rank.

    Args:
        card: the model.
        config: micro-batches, precision, recomputation.
        num_labels: of the head.
        stages: chunks of blocks of each stage.
        schedule: of the stages.
        data: replicas.
        tensor: ranks of a stage.
        length: of a typical sequence in tokens.
        copies: saves copy into this memory, which is that of the host.
    """
    options = config.train
    sizes = block_sizes(card, num_labels, tensor)
    num_tokens = UNEVEN * length * options.batch_size / options.micro_batches
    of_a_layer = activation_bytes(card, config, num_tokens, length, tensor)
    num_mine = -(-options.micro_batches // data)
    least = expected = 0
    for stage, chunks in enumerate(stages):
        kept = most_kept(schedule.order(stage, num_mine)) / len(chunks)
        blocks = [block for first, last in chunks for block in range(first, last)]
        num_parameters = sum(sizes[block] for block in blocks)
        least = max(least, state_bytes(num_parameters, data, options.precision, sharing=data))
        state = state_bytes(num_parameters, data, options.precision)
        if copies and config.checkpoint.asynchronous:
            state += num_parameters * (MASTER + MOMENTS) // data  # a save's copy
        expected = max(expected, PROGRAM + state + round(kept * len(blocks) * of_a_layer))
    return Need(least, expected)


def gib(num_bytes: float) -> str:
    """In words."""
    size = num_bytes / 2**30
    return f"{size:.3g} GiB" if size < 100 else f"{size:,.0f} GiB"
