"""Weights and gradients of a stage in flat buckets, so that they travel in few large messages.

Buckets hold whole parameters, last layers first: in backward order they fill one after the other, and the first
can travel while the next is computed. `parameter.data` and `parameter.grad` are views of a bucket: nothing is
copied. Gradients are fp32 whatever the weights are, so that micro-batches are summed in fp32.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from mpitrain.split import part


@dataclass(frozen=True)
class Place:
    """Where a parameter lies in its bucket: elements [start, stop)."""

    name: str
    parameter: torch.nn.Parameter
    start: int
    stop: int


@dataclass(frozen=True)
class Piece:
    """The part of a parameter in this rank's chunk of a bucket: elements [start, stop) of the flattened parameter."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    weights: torch.Tensor
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
    """Flat weights [n], in the compute dtype once `cast`, and flat gradients [n] in fp32."""

    def __init__(self, named_parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> None:
        """Move the parameters into a bucket of their own."""
        self.places: list[Place] = []
        size = 0
        for name, parameter in named_parameters:
            self.places.append(Place(name, parameter, size, size + parameter.numel()))
            size += parameter.numel()
        self.weights = torch.cat([place.parameter.detach().reshape(-1) for place in self.places])
        self.gradients = torch.zeros(size, dtype=torch.float32, device=self.weights.device)
        self.cast(self.weights.dtype)

    def cast(self, dtype: torch.dtype) -> None:
        """Hold the weights in another dtype."""
        self.weights = self.weights.to(dtype)
        for place in self.places:
            parameter, extent = place.parameter, slice(place.start, place.stop)
            parameter.grad = None
            parameter.data = self.weights[extent].view(parameter.shape)
            parameter.grad_dtype = torch.float32
            parameter.grad = self.gradients[extent].view(parameter.shape)

    def chunk(self, index: int, count: int) -> tuple[int, int]:
        """Bounds of the chunk that rank `index` of `count` owns after a reduce-scatter."""
        return part(index, len(self.weights), count)

    def pieces(self, index: int, count: int) -> list[Piece]:
        """The parameters' parts inside that chunk."""
        first, last = self.chunk(index, count)
        found = []
        for place in self.places:
            start, stop = max(first, place.start), min(last, place.stop)
            if start < stop:
                views = (self.weights[start:stop], self.gradients[start:stop])
                shape = tuple(place.parameter.shape)
                found.append(Piece(place.name, shape, start - place.start, stop - place.start, *views))
        return found


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
