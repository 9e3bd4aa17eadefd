"""Whether torch.compile would pay: the half of an encoder layer behind attention, eager and compiled, in turn.

    python tests/benchmarks/compile_layer.py [--model minilm-l6] [--precision bf16]

What is compiled: both products, GELU, dropout by a mask that is given, residual and LayerNorm, forward and backward.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch.nn import functional as F  # noqa: N812 - its customary name

from mpitrain.model.bert import EncoderLayer
from mpitrain.model.card import load_card
from mpitrain.model.initial import initialize
from mpitrain.place import DTYPES

TOKENS = (1824, 1856, 1888, 1920, 1952)
REPEATS = 15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="minilm-l6")
    parser.add_argument("--precision", choices=DTYPES, default="bf16")
    options = parser.parse_args()
    card, dtype = load_card(options.model), DTYPES[options.precision]
    layer = EncoderLayer(card, 1, False)
    initialize(layer, card, 0)
    layer.to(dtype)
    widen, narrow, norm = layer.intermediate.dense, layer.output.dense, layer.output.LayerNorm

    def half(x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        wide = F.gelu(F.linear(x, widen.weight, widen.bias))
        total = torch.addcmul(x, F.linear(wide, narrow.weight, narrow.bias), keep, value=1.1)
        return F.layer_norm(total, norm.weight.shape, norm.weight, norm.bias, card.layer_norm_eps)

    ways = {"eager": half, "compiled": torch.compile(half, dynamic=True)}
    inputs = [torch.randn(tokens, card.hidden_size).to(dtype).requires_grad_() for tokens in TOKENS]
    masks = [(torch.rand_like(x) > 0.1).to(dtype) for x in inputs]
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(1 + REPEATS):
        for x, keep in zip(inputs, masks, strict=True):
            for name, way in ways.items():
                began = time.perf_counter()
                way(x, keep).sum().backward()
                seconds[name].append(time.perf_counter() - began)
        if number == 0:  # compiled now
            print(*(f"{name}: first round {sum(found):.1f} s" for name, found in seconds.items()), sep="; ")
            seconds = {name: [] for name in ways}
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    print(*(f"{name}: {1e3 * median:.1f} ms" for name, median in medians.items()), sep="; ", end="; ")
    print(f"compiled / eager {medians['compiled'] / medians['eager']:.2f}")


if __name__ == "__main__":
    main()
