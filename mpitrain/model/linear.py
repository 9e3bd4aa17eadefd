"""The three products of a linear layer, by the faster of torch's two libraries.

In fp32 torch asks MKL, which takes its AVX2 path on processors that are not Intel's; oneDNN takes AVX-512 wherever it
is there, and is twice as fast (measured on AMD Zen 5: 100 against 210 GFLOP/s on one thread). The choice hangs on the
processor's maker alone, never on a timing, so that a resumed run computes the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
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


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """X [m, k] times weight [n, k] transposed, plus bias [n]."""
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], ""))


class _OneDnnLinear(torch.autograd.Function):
    """F.linear by oneDNN; the backward pass is two more products of the same kind."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        inputs = _product(gradient, weight.t()) if ctx.needs_input_grad[0] else None
        return inputs, _product(gradient.t(), x.t()), gradient.sum(0)


_onednn_linear = cast("Callable[[Tensor, Tensor, Tensor], Tensor]", _OneDnnLinear.apply)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """X [m, k], weight [n, k], bias [n], of one floating dtype, to [m, n]."""
    if x.dtype == torch.float32 and x.device.type == "cpu" and len(x) and prefers_onednn():
        return _onednn_linear(x, weight, bias)
    return F.linear(x, weight, bias)
