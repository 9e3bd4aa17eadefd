"""The three products of a linear layer, or of several at once, by the faster of torch's two libraries.

In fp32 torch asks MKL, which takes its AVX2 path on processors that are not Intel's; oneDNN takes AVX-512 wherever it
is there, and is up to twice as fast (measured on AMD Zen 5: 100 against 210 GFLOP/s on one thread). A process takes one
of them (`use`): that which suits the processor's maker, unless a short check at start finds the other much faster. A
mere race would give other bits from run to run; who resumes a run takes its library, whatever the check finds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - its customary name

Library = Literal["onednn", "torch"]
LIBRARIES: tuple[Library, Library] = ("onednn", "torch")
NAMES = {"onednn": "oneDNN", "torch": "torch's choice of library"}
SIZES = (256, 512, 1024)  # of the products that are timed: rows, inputs, outputs
ROUNDS = 8
_library: Library = "torch"  # of this process
_postponed: list[Callable[[], None]] | None = None  # a matter of the process too: a GPU's backward has its own thread


def use(library: Library) -> None:
    """Compute products of fp32 on the CPU by oneDNN's own operator, or by whatever torch takes."""
    global _library  # as with torch.set_num_threads: a matter of the process, not of a layer
    _library = library


def in_use() -> Library:
    """What `use` has set; torch before."""
    return _library


def has_onednn() -> bool:
    """Whether oneDNN's operator can be called at all."""
    return hasattr(torch.ops.mkldnn, "_linear_pointwise")


def suits_maker() -> Library:
    """What to expect of this CPU without a look at its speed."""
    try:
        maker = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("vendor_id"))
    except (OSError, StopIteration):
        return "torch"
    has_avx512 = "AVX512" in torch.backends.cpu.get_cpu_capability()
    return "onednn" if has_onednn() and has_avx512 and "GenuineIntel" not in maker else "torch"


def time_libraries() -> dict[Library, float]:
    """Processor seconds of a fp32 product by each library, the best of some that take turns; some 30 ms in all.

    Not seconds on the wall: other ranks may be on the same cores.
    """
    before = in_use()
    rows, inputs, outputs = SIZES
    x, weight, bias = torch.ones(rows, inputs), torch.ones(outputs, inputs), torch.ones(outputs)
    best: dict[Library, float] = dict.fromkeys(LIBRARIES, float("inf"))
    for number in range(1 + ROUNDS):
        for library in LIBRARIES:
            use(library)
            began = time.process_time()
            product(x, weight, bias)
            if number:  # the first time, oneDNN compiles
                best[library] = min(best[library], time.process_time() - began)
    use(before)
    return best


@contextmanager
def postponed(work: list[Callable[[], None]]) -> Iterator[None]:
    """Put off the products for gradients of weights that come up in a backward pass: to be had by calling `work`."""
    global _postponed
    before, _postponed = _postponed, work
    try:
        yield
    finally:
        _postponed = before


def rounds(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's float32_matmul_precision, as it is set, changes products by the library in use."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(256, 256, generator=generator).to(device, dtype) for _ in range(2))
    asked = torch.get_float32_matmul_precision()
    rounded = product(x, weight)
    torch.set_float32_matmul_precision("highest")
    exact = product(x, weight)
    torch.set_float32_matmul_precision(asked)
    return not torch.equal(rounded, exact)


class _Linear(torch.autograd.Function):
    """Several linear layers with one input as one; the backward pass is two more products of the same kind.

    Parameters are the weights, then as many biases, or none.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, num_weights: int, *parameters: Tensor) -> Tensor:
        weight, biases = _stack(parameters[:num_weights]), parameters[num_weights:]
        ctx.num_weights, ctx.parameters = num_weights, parameters
        ctx.save_for_backward(x, weight)
        return product(x, weight, _stack(biases) if biases else None)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        parameters: tuple[Tensor, ...] = ctx.parameters
        sizes = [len(each) for each in parameters[: ctx.num_weights]]

        def for_parameters() -> list[Tensor]:
            weights = torch.split(product(gradient.t(), x.t()), sizes)
            biases = torch.split(gradient.sum(0), sizes) if len(parameters) > len(sizes) else ()
            return [*weights, *biases]

        inputs = product(gradient, weight.t()) if ctx.needs_input_grad[0] else None
        if _postponed is None:
            return inputs, None, *for_parameters()
        _postponed.append(lambda: torch.autograd.backward(parameters, for_parameters()))
        return inputs, None, *[None for _ in parameters]


_linear = cast("Callable[..., Tensor]", _Linear.apply)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """X [m, k] times weight [n, k] transposed, plus bias [n]."""
    return _by_onednn(x, weight, bias) if _takes_onednn(x) else F.linear(x, weight, bias)


def _takes_onednn(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() > 0 and _library == "onednn"


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none", kind: str = "") -> Tensor:
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], kind))


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


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """X [m, k], weight [n, k], bias [n] if any, of one floating dtype, to [m, n]."""
    return _linear(x, 1, weight) if bias is None else _linear(x, 1, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, approximate: str) -> Tensor:
    """GELU of `linear`, `approximate` being torch's "none" or "tanh"; one kernel where gradients are not wanted."""
    if _fuses(x) and not torch.is_grad_enabled():
        return _by_onednn(x, weight, bias, "gelu", approximate)
    return F.gelu(linear(x, weight, bias), approximate=approximate)


def _fuses(x: Tensor) -> bool:
    """In bf16 torch's own products are oneDNN's, on any CPU that has them."""
    if x.dtype == torch.bfloat16 and x.device.type == "cpu" and x.numel() > 0:
        return has_onednn() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return _takes_onednn(x)


def stacked_linear(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """`linear` for several layers at once: one product with all weights reads `x` once.

    Args:
        x: [m, k].
        weights: [n_i, k] each; copied by each call unless they are adjacent in memory, as in buckets.
        biases: [n_i] each.

    Returns:
        [m, sum of n_i], the layers' results side by side.
    """
    return _linear(x, len(weights), *weights, *biases)
