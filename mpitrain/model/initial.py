"""First weights: random, the same on any mesh, or given ones."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor, nn

from mpitrain.model.bert import BertStage
from mpitrain.model.card import ModelCard


def initialize(stage: BertStage, card: ModelCard, seed: int) -> None:
    """Set all parameters as BERT does: normal(0, initializer_range), biases 0, LayerNorm weights 1, [PAD] row 0.

    Each parameter has its own stream, keyed by seed and name, drawn in float32 on the CPU: every mesh, device and
    dtype starts from the same values. NumPy's Philox draws them, as torch's depend on the CPU's instruction set.
    """
    for name, parameter in stage.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
            continue
        if name.endswith("LayerNorm.weight"):
            nn.init.ones_(parameter)
            continue
        key = int.from_bytes(blake2b(f"{seed}:{name}".encode(), digest_size=16).digest(), "little")
        draw = np.random.Generator(np.random.Philox(key=key)).standard_normal(stage.shards[name].shape, np.float32)
        draw *= card.initializer_range
        if name.endswith("word_embeddings.weight"):
            draw[0] = 0
        load_weights(stage, {name: torch.from_numpy(draw)})


def load_weights(stage: BertStage, weights: Mapping[str, Tensor]) -> None:
    """Copy whole values, as far as this rank has them, into the parameters of these names; the others stay.

    They are cast to the parameters' dtype and device.
    """
    with torch.no_grad():
        for name, values in weights.items():
            stage.get_parameter(name).copy_(values[stage.shards[name].slices])
