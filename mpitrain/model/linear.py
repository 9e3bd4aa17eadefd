"""The three products of a linear layer, or of several at once, by the faster of torch's two libraries.

In fp32 torch asks MKL, which takes its AVX2 path on processors that are not Intel's; oneDNN takes AVX-512 wherever it
is there, and is twice as fast (measured on AMD Zen 5: 100 against 210 GFLOP/s on one thread). The choice hangs on the
processor's maker alone, never on a timing, so that a resumed run computes the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - its customary name


@cache
def prefers_onednn() -> bool:
    """Whether fp32 products on this CPU should go to oneDNN."""
    try:
        maker = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("vendor_id"))
    except (OSError, StopIteration):
        return False
    has_avx512 = "AVX512" in torch.backends.cpu.get_cpu_capability()
    available = hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return available and has_avx512 and "GenuineIntel" not in maker


class _Linear(torch.autograd.Function):
    """Several linear layers with one input as one; the backward pass is two more products of the same kind."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        count = len(parameters) // 2
        weight, bias = _stack(parameters[:count]), _stack(parameters[count:])
        ctx.sizes = [len(each) for each in parameters[:count]]
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        inputs = _product(gradient, weight.t()) if ctx.needs_input_grad[0] else None
        weights, biases = _product(gradient.t(), x.t()), gradient.sum(0)
        return inputs, *torch.split(weights, ctx.sizes), *torch.split(biases, ctx.sizes)


_linear = cast("Callable[..., Tensor]", _Linear.apply)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """X [m, k] times weight [n, k] transposed, plus bias [n]."""
    if _by_onednn(x):
        return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], ""))
    return F.linear(x, weight, bias)


def _by_onednn(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() > 0 and prefers_onednn()


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """One below the other: a view of contiguous matrices that are adjacent in memory, else a copy."""
    first = tensors[0]
    storage, end = first.untyped_storage().data_ptr(), first.data_ptr()
    for tensor in tensors:
        adjacent = tensor.untyped_storage().data_ptr() == storage and tensor.data_ptr() == end
        if not (adjacent and tensor.is_contiguous()):
            return torch.cat(list(tensors))
        end += tensor.nbytes
    # Not first.stride(): a single row counts as contiguous whatever it is.
    return first.as_strided((sum(map(len, tensors)), *first.shape[1:]), (*first.shape[1:], 1))


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """X [m, k], weight [n, k], bias [n], of one floating dtype, to [m, n]."""
    return _linear(x, weight, bias) if _by_onednn(x) else F.linear(x, weight, bias)


def stacked_linear(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """`linear` for several layers at once: one product with all weights reads `x` once.

    Args:
        x: [m, k].
        weights: [n_i, k] each; copied by each call unless they are adjacent in memory, as in buckets.
        biases: [n_i] each.

    Returns:
        [m, sum of n_i], the layers' results side by side.
    """
    return _linear(x, *weights, *biases)
