"""AdamW on shards: each rank updates, in fp32, only the chunk of every bucket that it owns on the data axis.

This is stage 1 of ZeRO (Rajbhandari et al., "ZeRO: memory optimizations toward training trillion parameter models",
2020, section 5.1): gradients are reduce-scattered, the owner updates its chunk of master weights and moments, the new
weights are gathered. One rank owns everything and runs the same code.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mpitrain.comm.buckets import Bucket, StateSlice
from mpitrain.config import Train

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
    """Loshchilov and Hutter, "Decoupled weight decay regularization" (2019), algorithm 2, by torch, on owned pieces."""

    def __init__(self, buckets: list[Bucket], index: int, count: int, options: Train, dtype: torch.dtype) -> None:
        """Own chunk `index` of `count` of every bucket of fp32 weights, which are cast to `dtype` here."""
        # fp32 weights are their own masters; others are cast from masters, which keep what a cast would lose.
        self._masters = [piece.weights for bucket in buckets for piece in bucket.pieces(index, count)]
        if dtype != torch.float32:
            self._masters = [master.clone() for master in self._masters]
            for bucket in buckets:
                bucket.cast(dtype)
        self._pieces = [piece for bucket in buckets for piece in bucket.pieces(index, count)]
        decayed = [m for m, piece in zip(self._masters, self._pieces, strict=True) if decays(piece.name)]
        others = [m for m, piece in zip(self._masters, self._pieces, strict=True) if not decays(piece.name)]
        groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self._adamw = None
        if self._pieces:
            betas = (options.adam_beta1, options.adam_beta2)
            groups = [group for group in groups if group["params"]]
            self._adamw = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=options.adam_epsilon, fused=True)
            self._reset()
        for piece, master in zip(self._pieces, self._masters, strict=True):
            master.grad = piece.gradients

    def _reset(self) -> None:
        assert self._adamw is not None
        for master in self._masters:
            moments = {kind: torch.zeros_like(master) for kind in KINDS[1:]}
            step = torch.zeros((), dtype=torch.float32, device=master.device)
            self._adamw.state[master] = {"step": step, **moments}

    def squared_norm(self) -> float:
        """Sum of squares of the owned gradients; summed over all ranks each parameter counts once."""
        norms = torch._foreach_norm([piece.gradients for piece in self._pieces])
        return float(torch.stack(norms).double().square().sum()) if norms else 0.0

    def step(self, learning_rate: float, gradient_factor: float) -> None:
        """Update the owned chunk with gradients times `gradient_factor`; `publish` has yet to spread the result."""
        if self._adamw is None:
            return
        if gradient_factor != 1.0:
            torch._foreach_mul_([piece.gradients for piece in self._pieces], gradient_factor)
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        self._adamw.step()
        self.publish()

    def publish(self) -> None:
        """Cast the masters into the owned chunk of the weights."""
        for piece, master in zip(self._pieces, self._masters, strict=True):
            if master.dtype != piece.weights.dtype:
                piece.weights.copy_(master)

    def set_num_updates(self, num_updates: int) -> None:
        """Continue as after `num_updates` updates."""
        if self._adamw is not None:
            for master in self._masters:
                self._adamw.state[master]["step"].fill_(num_updates)

    def slices(self) -> Iterator[StateSlice]:
        """Everything a checkpoint must hold of this rank: masters and moments, as live views."""
        for piece, master in zip(self._pieces, self._masters, strict=True):
            moments = self._adamw.state[master] if self._adamw else {}
            for kind in KINDS:
                values = master if kind == "weight" else moments[kind]
                yield StateSlice(kind, piece.name, piece.shape, piece.start, piece.stop, values)
