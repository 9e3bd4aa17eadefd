"""Bounds: torch's kernels of a training step alone, or even nothing but the products of its linear layers.

    mpirun -np 2 python tests/benchmarks/peers/kernels.py --model minilm-l6 --batch 64 [--products]

What is left out is what a step takes longer, whatever program calls these kernels: there is no autograd, no embedding,
no loss, no padding (all sequences have the length whose square is the mean square); nothing is sent, but each rank adds
up as many gradients as it would own and updates that many weights. Heads are put apart, as products of batches want
them, and gradients of weights are cast to fp32, as torch's products have the dtype of what is multiplied. Every layer
has weights and activations of its own; products write into memory that is there. All ranks compute at once. Turns are
those of `turns.py`.
"""

from __future__ import annotations

import math
import os

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - its customary name
from turns import parser_of, take_turns

from mpitrain.comm.node import CHUNK
from mpitrain.model.card import ModelCard, load_card
from mpitrain.model.dropout import KeyedDropout
from mpitrain.place import DTYPES


class Memory:
    """Tensors that are made once and used again by the next step, whatever its number of tokens."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self._held = dtype, {}

    def take(self, name: str, *shape: int) -> Tensor:
        size = math.prod(shape)
        if name not in self._held or len(self._held[name]) < size:
            self._held[name] = torch.full((size + size // 2,), 1e-3).to(self.dtype)
        return self._held[name][:size].view(shape)


class Linear:
    """A linear layer and where its gradients go."""

    def __init__(self, size_in: int, size_out: int, dtype: torch.dtype, products: bool) -> None:
        self.weight = (torch.randn(size_out, size_in) * size_in**-0.5).to(dtype)
        self.gradient, self.bias = torch.zeros(size_out, size_in), torch.zeros(size_out, dtype=dtype)
        self.products = products

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        if self.products:
            return torch.mm(x, self.weight.t(), out=out)
        return torch.addmm(self.bias, x, self.weight.t(), out=out)

    def backward(self, gradient: Tensor, x: Tensor, out: Tensor, common: Memory) -> Tensor:
        of_weight = torch.mm(gradient.t(), x, out=common.take("weight", *self.weight.shape))
        if not self.products:
            self.gradient.copy_(of_weight)
            gradient.sum(0)
        return torch.mm(gradient, self.weight, out=out)


class Layer:
    """An encoder layer; `memory` holds what its backward pass reads, `common`, shared by all layers, the rest."""

    def __init__(self, card: ModelCard, dtype: torch.dtype, common: Memory, products: bool) -> None:
        hidden, wide = card.hidden_size, card.intermediate_size
        self.card, self.products = card, products
        self.memory, self.common = Memory(dtype), common
        sizes = [(hidden, 3 * hidden), (hidden, hidden), (hidden, wide), (wide, hidden)]
        self.project, self.merge, self.widen, self.narrow = (Linear(*size, dtype, products) for size in sizes)
        self.scale, self.shift = torch.ones(hidden, dtype=dtype), torch.zeros(hidden, dtype=dtype)
        self.saved: list[tuple[Tensor, ...]] = []

    def forward(self, x: Tensor, sequences: tuple[int, int], dropout: KeyedDropout) -> Tensor:
        take, tokens, hidden = self.memory.take, len(x), self.card.hidden_size
        self.saved, self.sequences = [(x,)], sequences
        projected = self.project.forward(x, take("projected", tokens, 3 * hidden))
        context = take("context", tokens, hidden)
        if not self.products:
            self.heads_of(projected).copy_(self.by_token(projected))
            self.attend(dropout)
            self.by_token(context).copy_(self.heads_of(context))
        merged = self.merge.forward(context, take("merged", tokens, hidden))
        middle = self.join(merged, x, dropout, 1)
        widened = self.widen.forward(middle, take("widened", tokens, self.card.intermediate_size))
        active = widened if self.products else F.gelu(widened)
        self.saved.append((context, middle, widened, active))
        return self.join(self.narrow.forward(active, take("narrowed", tokens, hidden)), middle, dropout, 2)

    def by_token(self, x: Tensor) -> Tensor:
        """What is computed of each token, [tokens, any], as one head after the other would read or write it."""
        heads = self.card.num_attention_heads
        return x.view(len(x), -1, heads, self.card.hidden_size // heads).permute(1, 2, 0, 3)

    def heads_of(self, x: Tensor) -> Tensor:
        """Memory of the same shape in which each head has its tokens together."""
        return self.common.take("heads", *self.by_token(x).shape)

    def attend(self, dropout: KeyedDropout) -> None:
        """Products, softmax and dropout of attention, forward."""
        count, length = self.sequences
        shape = (count * self.card.num_attention_heads, length, self.card.hidden_size // self.card.num_attention_heads)
        queries, keys, values = (self.memory.take(name, *shape) for name in ("queries", "keys", "values"))
        scores = self.common.take("scores", shape[0], length, length)
        torch.baddbmm(scores, queries, keys.transpose(1, 2), beta=0, alpha=shape[2] ** -0.5, out=scores)
        softmax = scores.float()
        torch._softmax(softmax, -1, False, out=softmax)
        keep = self.keep(scores, dropout, 0)
        weights = torch.mul(softmax.to(scores.dtype), keep, out=self.memory.take("weights", *scores.shape))
        torch.bmm(weights, values, out=self.common.take("contexts", *shape))
        self.saved.append((queries, keys, values, softmax, keep, weights))

    def keep(self, x: Tensor, dropout: KeyedDropout, site: int) -> Tensor:
        """What dropout keeps of `x`."""
        found = dropout.mask(x, self.card.hidden_dropout_prob, site)
        return torch.ones_like(x) if found is None else found[0]

    def join(self, x: Tensor, residual: Tensor, dropout: KeyedDropout, site: int) -> Tensor:
        """Dropout, residual, LayerNorm."""
        if self.products:
            return x
        keep = self.keep(x, dropout, site)
        total = torch.addcmul(residual, x, keep, value=1.1)
        out, mean, spread = torch.native_layer_norm(total, x.shape[1:], self.scale, self.shift, 1e-12)
        self.saved.append((total, mean, spread, keep))
        return out

    def backward(self, gradient: Tensor) -> Tensor:
        take, saved, residual = self.common.take, self.saved, gradient
        if not self.products:
            residual, gradient = self.leave(gradient, saved.pop())
        context, middle, widened, active = saved.pop()
        wide = self.narrow.backward(gradient, active, take("wide", *widened.shape), self.common)
        wide = wide if self.products else torch.ops.aten.gelu_backward(wide, widened)
        gradient = self.widen.backward(wide, middle, take("middle", *middle.shape), self.common)
        if not self.products:
            residual, gradient = self.leave(gradient.add_(residual), saved.pop())
        of_context = self.merge.backward(gradient, context, take("context", *context.shape), self.common)
        projected = take("projected", len(context), 3 * context.shape[1])
        if not self.products:
            self.heads_of(of_context).copy_(self.by_token(of_context))
            self.look_back(*saved.pop())
            self.by_token(projected).copy_(self.heads_of(projected))
        (x,) = saved.pop()
        out = self.memory.take("gradient", *x.shape)
        self.project.backward(projected, x, out, self.common)
        return out if self.products else out.add_(residual)

    def leave(self, gradient: Tensor, saved: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Back through `join`: gradients of residual and x."""
        total, mean, spread, keep = saved
        shape = total.shape[1:]
        residual, _, _ = torch.ops.aten.native_layer_norm_backward(
            gradient, total, shape, mean, spread, self.scale, self.shift, [True] * 3
        )
        return residual, (residual * keep).mul_(1.1)

    def look_back(
        self, queries: Tensor, keys: Tensor, values: Tensor, softmax: Tensor, keep: Tensor, weights: Tensor
    ) -> None:
        """Back through `attend`."""
        contexts, out = (self.common.take(name, *queries.shape) for name in ("contexts", "out"))
        torch.bmm(weights.transpose(1, 2), contexts, out=out)
        of_weights = torch.bmm(contexts, values.transpose(1, 2)).mul_(keep).float()
        torch._softmax_backward_data(of_weights, softmax, -1, torch.float32, grad_input=of_weights)
        of_scores = of_weights.to(keep.dtype)
        for a, b in ((of_scores, keys), (of_scores.transpose(1, 2), queries)):
            torch.baddbmm(out, a, b, beta=0, alpha=queries.shape[2] ** -0.5, out=out)


class Update:
    """What a rank does with its share of gradients: add up, norm, clip, AdamW in fp32, cast."""

    def __init__(self, num_elements: int, num_table_elements: int, num_ranks: int, dtype: torch.dtype) -> None:
        own = (num_elements + num_table_elements) // num_ranks
        self.masters, self.gradients, self.means, self.squares = (torch.full((own,), 1e-3) for _ in range(4))
        # Of a table only few rows have gradients.
        self.others = [torch.full((num_elements // num_ranks,), 1e-3) for _ in range(num_ranks - 1)]
        self.weights, self.count, self.divisor = torch.empty(own, dtype=dtype), torch.ones(()), torch.tensor(2.0)

    def run(self) -> None:
        summed = self.gradients[: len(self.others[0])] if self.others else self.gradients[:0]
        for chunk, *others in zip(*(torch.split(each, CHUNK) for each in (summed, *self.others)), strict=True):
            for other in others:
                chunk += other
            torch.linalg.vector_norm(chunk)
        torch._fused_adamw_(
            *([each] for each in (self.masters, self.gradients, self.means, self.squares)), [], [self.count],
            lr=1e-5, beta1=0.9, beta2=0.999, weight_decay=0.01, eps=1e-8, amsgrad=False, maximize=False,
            grad_scale=self.divisor,
        )  # fmt: skip
        self.weights.copy_(self.masters)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--products", action="store_true", help="nothing but the products of linear layers")
    options = parser.parse_args()
    comm = MPI.COMM_WORLD
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // comm.size))
    torch.set_grad_enabled(False)
    card, dtype = load_card(options.model), DTYPES[options.precision]
    common = Memory(dtype)
    layers = [Layer(card, dtype, common, options.products) for _ in range(card.num_hidden_layers)]
    linears = [each for layer in layers for each in (layer.project, layer.merge, layer.widen, layer.narrow)]
    num_elements = sum(each.weight.numel() for each in linears)
    table = card.vocab_size * card.hidden_size
    update = None if options.products else Update(num_elements, table, comm.size, dtype)
    lengths = np.repeat(*np.loadtxt(options.lengths, np.int64, unpack=True))
    generator = np.random.default_rng(0)

    def step() -> int:
        whole = generator.choice(lengths, options.batch)
        sequences = options.batch // comm.size, round(math.sqrt((whole.astype(float) ** 2).mean()))
        x = common.take("x", int(whole.sum()) // comm.size, card.hidden_size)
        gradient = common.take("gradient", *x.shape)
        for layer in layers:
            x = layer.forward(x, sequences, KeyedDropout(0, 0, 0))
        for layer in reversed(layers):
            gradient = layer.backward(gradient)
        if update is not None:
            update.run()
        return int(whole.sum())

    take_turns(step, options, comm.rank, comm.Barrier)


if __name__ == "__main__":
    main()
