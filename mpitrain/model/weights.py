"""A weight, perhaps a bias, of which a rank of a tensor group may hold a part."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its customary name

from mpitrain.model.linear import linear
from mpitrain.model.tensor_parallel import Alone, Group, shard
from mpitrain.split import Shard


class Weights(nn.Module):
    """A linear map, a LayerNorm or an embedding table, as its user sees fit.

    Values are NaN until `initialize` or `load_weights` sets them, so that forgetting to shows at once.

    Attributes:
        shards: which part of the whole model's weight and bias these are, by name.
    """

    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(self, *shape: int, bias: bool = True, group: Group | None = None, dim: int | None = None) -> None:
        """The own part of a whole of this shape that is cut along `dim`; None: all of it."""
        super().__init__()
        self.group = group or Alone()
        self.shards = {"weight": Shard.whole(*shape) if dim is None else shard(shape, dim, self.group)}
        if bias:
            self.shards["bias"] = shard(shape[:1], 0, self.group) if dim == 0 else Shard.whole(shape[0])
        for name, part in self.shards.items():
            setattr(self, name, nn.Parameter(torch.full(part.own_shape, torch.nan)))

    def linear(self, x: Tensor) -> Tensor:
        """[num_tokens, shape[1]] to [num_tokens, shape[0]], or the own columns of that."""
        return linear(x, self.weight, self.bias)

    def partial(self, x: Tensor) -> Tensor:
        """The own columns of `x` to a part of a sum over the group; one rank adds the bias."""
        return linear(x, self.weight, self.bias if self.group.rank == 0 else None)

    def layer_norm(self, x: Tensor, epsilon: float) -> Tensor:
        """Normalise over the last dimension; torch keeps the statistics of bf16 input in float32."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, epsilon)
