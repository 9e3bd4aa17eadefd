"""Dropout whose random numbers hang on what is computed, never on who computes it.

torch's own dropout takes from one generator per process, so its masks depend on which layers and micro-batches a
rank happens to hold. Here each mask has a key (seed, step, micro-batch, site), and a run on another mesh drops the
same elements. The mask compares 16-bit integers with a threshold: four of them come from one 64-bit draw, which
makes it several times as fast as a float draw per element on a CPU, and the same for every compute dtype.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

LEVELS = 1 << 16  # a probability is rounded to a multiple of 1 / LEVELS
DRAWN = 4  # numbers for elements that a generator draws at a time


class Region(NamedTuple):
    """Which elements of a flat whole of `total` somebody has: `parts`, each a start and a number of elements."""

    total: int
    parts: Sequence[tuple[int, int]]


class KeyedDropout:
    """The dropout of one micro-batch in one step (Srivastava et al. 2014, with the scale applied in training).

    `micro_batch` is its number in the whole batch of the step, the same whichever replica computes it.
    """

    def __init__(self, seed: int, step: int, micro_batch: int) -> None:
        self.key = (seed, step, micro_batch)

    def __call__(self, x: Tensor, probability: float, site: int, region: Region | None = None) -> Tensor:
        """Zero elements of `x` with the probability given, scale the rest to keep the mean; arguments as of `mask`."""
        found = self.mask(x, probability, site, region)
        if found is None:
            return x
        keep, scale = found
        return (x * keep).mul_(scale)  # scaled apart: bf16 would round the scale itself

    def add(self, x: Tensor, probability: float, site: int, residual: Tensor, region: Region | None = None) -> Tensor:
        """Drop elements of `x` and add `residual`, of the same shape and dtype; rounded once."""
        found = self.mask(x, probability, site, region)
        return residual + x if found is None else _add_kept(x, residual, *found)

    def mask(
        self, x: Tensor, probability: float, site: int, region: Region | None = None
    ) -> tuple[Tensor, float] | None:
        """1 where an element of `x` is kept and 0 elsewhere, with its shape and dtype, and the scale of what is kept.

        Args:
            x: any shape, floating.
            probability: of dropping an element, in [0, 1); None is returned if it is 0.
            site: number of the place in the network, unique in the whole model.
            region: which elements of a whole `x` holds, where others hold the rest; the whole has one mask.
        """
        dropped = min(round(probability * LEVELS), LEVELS - 1)
        if dropped == 0:
            return None
        keep = torch.empty_like(x, memory_format=torch.contiguous_format, requires_grad=False)
        # Written straight into the dtype of x: a bool mask costs ten times as much in the products with it.
        bits = self._bits(x.device, site, region or Region(x.numel(), [(0, x.numel())]))
        torch.ge(bits.view(x.shape), dropped - LEVELS // 2, out=keep)
        return keep, LEVELS / (LEVELS - dropped)

    def _bits(self, device: torch.device, site: int, region: Region) -> Tensor:
        """Uniform int16 numbers, [elements of the region]."""
        digest = blake2b(struct.pack("<4q", *self.key, site), digest_size=8).digest()
        seed = int.from_bytes(digest, "little")
        if device.type == "cpu":  # twice as fast as torch's
            found = [_draw(seed, start, count) for start, count in region.parts]
        else:  # which numbers come depends on how many are asked for
            generator, size = torch.Generator(device).manual_seed(seed), region.total // DRAWN + 1
            draws = torch.empty(size, dtype=torch.int64, device=device).random_(-(2**63), None, generator=generator)
            found = [draws.view(torch.int16)[start : start + count] for start, count in region.parts]
        return found[0] if len(found) == 1 else torch.cat([*found, torch.empty(0, dtype=torch.int16, device=device)])


def _draw(seed: int, start: int, count: int) -> Tensor:
    """Numbers [start, start + count) of an endless row of int16; a PCG (O'Neill 2014) jumps to any place in it."""
    skipped, generator = start % DRAWN, np.random.PCG64DXSM(seed)
    draws = generator.advance(start // DRAWN).random_raw((skipped + count) // DRAWN + 1)
    return torch.from_numpy(draws.view(np.int16))[skipped : skipped + count]


class _AddKept(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, keep: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(keep)
        ctx.scale = scale
        return torch.addcmul(residual, x, keep, value=scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (keep,) = ctx.saved_tensors
        return (gradient * keep).mul_(ctx.scale), gradient, None, None


_add_kept = cast("Callable[[Tensor, Tensor, Tensor, float], Tensor]", _AddKept.apply)
