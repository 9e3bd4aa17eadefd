"""Bound: nothing but the matrix products of the linear layers of a step, the fewest that a step can do.

    mpirun -np 2 python tests/benchmarks/peers/products.py --model minilm-l6 --batch 64

Every layer has weights of its own, all ranks compute at once, sentences are packed without padding, torch's kernels
write into memory that is there. No attention, no dropout, no update, no exchange: these have what a step takes longer,
whatever program computes it with the same kernels. Turns are those of `turns.py`.
"""

from __future__ import annotations

import os

import numpy as np
import torch
from mpi4py import MPI
from turns import parser_of, take_turns

from mpitrain.model.card import load_card

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
    options = parser_of(__doc__).parse_args()
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

    take_turns(step, options, comm.rank, comm.Barrier)


if __name__ == "__main__":
    main()
