"""Bound: nothing but the matrix products of the linear layers of a step, the fewest that a step can do.

    mpirun -np 2 python tests/benchmarks/peers/products.py --model minilm-l6 --batch 64

Every layer has weights of its own, all ranks compute at once, sentences are packed without padding, torch's kernels
write into memory that is there. No attention, no dropout, no update, no exchange: these have what a step takes longer,
whatever program computes it with the same kernels. Turns are as in ddp_gloo.py.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from mpi4py import MPI

from mpitrain.model.card import load_card

WARM_UP = 2
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Layer:
    """A linear layer, where its gradients go, and its three products."""

    def __init__(self, size_in: int, size_out: int, dtype: torch.dtype) -> None:
        self.weight = (torch.randn(size_out, size_in) * size_in**-0.5).to(dtype)
        self.gradient = torch.empty_like(self.weight)

    def run(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Forward to y [num_tokens, size_out], then back as if y were its own gradient, into x and the weight's."""
        torch.mm(x, self.weight.t(), out=y)
        torch.mm(y.t(), x, out=self.gradient)
        torch.mm(y, self.weight, out=x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="minilm-l6")
    parser.add_argument("--batch", type=int, default=64, help="sentences of all ranks together")
    parser.add_argument("--precision", choices=DTYPES, default="bf16")
    parser.add_argument("--lengths", type=Path, default=Path(__file__).parent.parent / "lengths.txt")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--steps", type=int, default=1)
    options = parser.parse_args()
    comm = MPI.COMM_WORLD
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // comm.size))
    card, dtype = load_card(options.model), DTYPES[options.precision]
    hidden, wide = card.hidden_size, card.intermediate_size
    shapes = [*[(hidden, hidden)] * 4, (hidden, wide), (wide, hidden)] * card.num_hidden_layers
    layers = [Layer(*shape, dtype) for shape in shapes]
    lengths = np.repeat(*np.loadtxt(options.lengths, np.int64, unpack=True))
    generator = np.random.default_rng(0)

    def step() -> int:
        whole = generator.choice(lengths, options.batch)
        share = int(whole.sum()) // comm.size
        buffers = {size: torch.full((share, size), 1e-3).to(dtype) for size in (hidden, wide)}
        other = torch.full((share, hidden), 1e-3).to(dtype)
        for layer, (size_in, size_out) in zip(layers, shapes, strict=True):
            layer.run(buffers[size_in], other if size_in == size_out else buffers[size_out])
        return int(whole.sum())

    for _ in range(WARM_UP):
        step()
    for _ in range(options.repeats):
        if comm.rank == 0 and not sys.stdin.readline():
            raise SystemExit("standard input ended before the last turn")
        comm.Barrier()
        began = time.perf_counter()
        tokens = sum(step() for _ in range(options.steps))
        comm.Barrier()
        if comm.rank == 0:
            print(json.dumps({"tokens": tokens, "seconds": time.perf_counter() - began}), flush=True)


if __name__ == "__main__":
    main()
