"""AdamW on shards: each rank updates, in fp32, only the part of every bucket that it owns on the data axis.

This is stage 1 of ZeRO (Rajbhandari et al., "ZeRO: memory optimizations toward training trillion parameter models",
2020, section 5.1): gradients are reduce-scattered, the owner updates its part of master weights and moments, the new
weights are gathered. One rank owns everything and runs the same code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from mpitrain.comm.buckets import Bucket, Piece, StateSlice, square_sum
from mpitrain.sections import Train

KINDS = ("weight", "exp_avg", "exp_avg_sq")


def decays(name: str) -> bool:
    """Whether weight decay applies: not to biases and LayerNorm."""
    return not (name.endswith(".bias") or ".LayerNorm." in name)


def learning_rate_at(step: int, num_steps: int, peak: float, warmup_ratio: float) -> float:
    """Linear rise over the warm-up, then a linear fall that would reach 0 at step `num_steps`; steps count from 0."""
    warmup = int(num_steps * warmup_ratio)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * max(0.0, (num_steps - step) / max(1, num_steps - warmup))


class LossScale:
    """Dynamic loss scale for fp16, 1 for other dtypes (Micikevicius et al., "Mixed precision training", 2018, 3.2)."""

    def __init__(self, precision: str) -> None:
        """Scale only fp16: bf16 and fp32 have the exponents for small gradients."""
        self.dynamic = precision == "fp16"
        self.value = 2.0**16 if self.dynamic else 1.0
        self.good_steps = 0

    def update(self, finite: bool) -> None:
        """Halve after an overflow, double after 2000 steps without one."""
        if not self.dynamic:
            return
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.value = max(1.0, self.value / 2)
        elif self.good_steps % 2000 == 0:
            self.value *= 2


class ShardedAdamW:
    """Loshchilov and Hutter, "Decoupled weight decay regularization" (2019), algorithm 2, by torch, on owned pieces.

    torch's fused kernel is called as such: torch.optim.Optimizer would import the whole compiler, a second per rank.
    """

    def __init__(self, buckets: Sequence[Bucket], options: Train, *, first: bool = True) -> None:
        """Update what this rank owns of buckets that have their memory; `first` of its tensor group, or another."""
        self._counted = [bucket for bucket in buckets if first or not bucket.shared]
        self._owned = [_Owned.of(piece) for bucket in buckets for piece in bucket.pieces]
        self._options = options

    def squared_norm(self) -> float:
        """Sum of squares of the owned gradients; summed over all ranks each parameter counts once."""
        known = [bucket.squares for bucket in self._counted if bucket.squares is not None]
        others = [square_sum(bucket.reduced) for bucket in self._counted if bucket.squares is None]
        return float(sum(known) + sum(others))

    def gradients(self) -> list[torch.Tensor]:
        """What this rank owns of all gradients, fp32, flat."""
        return [owned.piece.gradients for owned in self._owned]

    def step(self, learning_rate: float, gradient_factor: float) -> None:
        """Update what is owned with gradients times `gradient_factor`; to spread the result is the caller's part."""
        for decayed in (True, False):
            group = [owned for owned in self._owned if decays(owned.piece.name) is decayed]
            if group:
                self._update(group, learning_rate, gradient_factor, self._options.weight_decay if decayed else 0.0)
        self.publish()

    def _update(self, group: list[_Owned], learning_rate: float, gradient_factor: float, weight_decay: float) -> None:
        # The kernel divides, and writes back what it has divided: nothing is gained by a 1.
        divisor = torch.tensor(1 / gradient_factor, device=group[0].exp_avg.device) if gradient_factor != 1.0 else None
        torch._foreach_add_([owned.num_updates for owned in group], 1)
        torch._fused_adamw_(
            [owned.piece.master for owned in group],
            [owned.piece.gradients for owned in group],
            [owned.exp_avg for owned in group],
            [owned.exp_avg_sq for owned in group],
            [],
            [owned.num_updates for owned in group],
            lr=learning_rate,
            beta1=self._options.adam_beta1,
            beta2=self._options.adam_beta2,
            weight_decay=weight_decay,
            eps=self._options.adam_epsilon,
            amsgrad=False,
            maximize=False,
            grad_scale=divisor,
        )

    def publish(self) -> None:
        """Cast the masters into the owned part of the weights."""
        for owned in self._owned:
            if owned.piece.master.dtype != owned.piece.weights.dtype:
                owned.piece.weights.copy_(owned.piece.master)

    def set_num_updates(self, num_updates: int) -> None:
        """Continue as after `num_updates` updates."""
        for owned in self._owned:
            owned.num_updates.fill_(num_updates)

    def slices(self, *, once: bool = False) -> Iterator[StateSlice]:
        """Masters and moments, as live views; if each element is wanted `once`, shared ones of one rank only."""
        counted = {member.name for bucket in self._counted for member in bucket.members}
        for owned in self._owned:
            piece = owned.piece
            if once and piece.name not in counted:
                continue
            for kind, values in zip(KINDS, (piece.master, owned.exp_avg, owned.exp_avg_sq), strict=True):
                yield piece.member.slice(kind, piece.start, values)


@dataclass(frozen=True)
class _Owned:
    """A piece with its moments and the updates so far (fp32 scalar, as the kernel wants)."""

    piece: Piece
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    num_updates: torch.Tensor

    @classmethod
    def of(cls, piece: Piece) -> _Owned:
        num_updates = torch.zeros((), device=piece.master.device)
        return cls(piece, torch.zeros_like(piece.master), torch.zeros_like(piece.master), num_updates)
