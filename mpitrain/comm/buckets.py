"""Weights and gradients of a stage in flat buckets, so that they travel in few large messages.

Buckets hold whole parameters, last layers first: in backward order they fill one after the other, and the first
can travel while the next is computed. Once attached, `parameter.data` and `parameter.grad` are views of flat memory,
which an exchange has chosen: nothing is copied. Gradients are fp32 whatever the weights are, so that micro-batches are
summed in fp32. Each rank owns one part of every bucket: it holds the sum of that part's gradients, and its masters.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from mpitrain.split import UNIT


@dataclass(frozen=True)
class Member:
    """Where a parameter lies in its bucket: elements [start, stop), from a multiple of `split.UNIT` on."""

    name: str
    parameter: torch.nn.Parameter
    start: int
    stop: int


@dataclass(frozen=True)
class Piece:
    """The part of a parameter that this rank owns: elements [start, stop) of the flattened parameter.

    Attributes:
        weights: in the compute dtype, as the model reads them.
        master: in fp32; `weights` itself if that is fp32.
        gradients: fp32, summed over replicas once the bucket is reduced.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    weights: torch.Tensor
    master: torch.Tensor
    gradients: torch.Tensor


@dataclass(frozen=True)
class StateSlice:
    """Elements [start, stop) of a flattened parameter's fp32 master weight or moment, to be saved or filled."""

    kind: str
    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    values: torch.Tensor


class Bucket:
    """Some parameters side by side.

    Attributes:
        size: number of elements, gaps included, which are zero.
        weights, gradients: [size], of the compute dtype and fp32, once attached.
        owned: bounds of this rank's own part.
        reduced: fp32 [stop - start of `owned`], where that part's sum over replicas appears.
        pieces: the parameters' parts inside the own part.
    """

    weights: torch.Tensor
    gradients: torch.Tensor
    reduced: torch.Tensor
    owned: tuple[int, int]

    def __init__(self, named_parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> None:
        """Count; memory is for `attach`."""
        self.members: list[Member] = []
        self.pieces: list[Piece] = []
        self.size = 0
        for name, parameter in named_parameters:
            self.members.append(Member(name, parameter, self.size, self.size + parameter.numel()))
            self.size += -(-parameter.numel() // UNIT) * UNIT

    def attach(
        self, weights: torch.Tensor, gradients: torch.Tensor, owned: tuple[int, int], reduced: torch.Tensor
    ) -> None:
        """Make the parameters views of this memory; of the weights only the own part is written, by its owner."""
        self.weights, self.gradients, self.owned, self.reduced = weights, gradients, owned, reduced
        for member in self.members:
            self._own(member)
            parameter, extent = member.parameter, slice(member.start, member.stop)
            parameter.grad = None
            parameter.data = weights[extent].view(parameter.shape)
            parameter.grad_dtype = torch.float32
            parameter.grad = gradients[extent].view(parameter.shape)

    def _own(self, member: Member) -> None:
        start, stop = max(self.owned[0], member.start), min(self.owned[1], member.stop)
        if start >= stop:
            return
        weights = self.weights[start:stop]
        bounds = (start - member.start, stop - member.start)
        values = member.parameter.detach().reshape(-1)[slice(*bounds)]
        weights.copy_(values)
        # fp32 weights are their own masters; others are cast from masters, which keep what a cast would lose.
        master = weights if weights.dtype == torch.float32 else values.float().clone()
        gradients = self.reduced[start - self.owned[0] : stop - self.owned[0]]
        shape = tuple(member.parameter.shape)
        self.pieces.append(Piece(member.name, shape, *bounds, weights, master, gradients))

    def detach(self) -> None:
        """Let go of the memory, which may be gone from now on: the parameters are empty after this."""
        for member in self.members:
            member.parameter.grad = None
            member.parameter.data = torch.empty(0, dtype=self.weights.dtype, device=self.weights.device)
        self.pieces = []
        del self.weights, self.gradients, self.reduced


def fill_buckets(module: torch.nn.Module, bucket_bytes: int) -> list[Bucket]:
    """All parameters of a module in buckets of about `bucket_bytes` of fp32 gradients, in backward order."""
    buckets: list[Bucket] = []
    waiting: list[tuple[str, torch.nn.Parameter]] = []
    size = 0
    for name, parameter in reversed(list(module.named_parameters())):
        if waiting and size + 4 * parameter.numel() > bucket_bytes:
            buckets.append(Bucket(waiting))
            waiting, size = [], 0
        waiting.append((name, parameter))
        size += 4 * parameter.numel()
    return [*buckets, Bucket(waiting)] if waiting else buckets
