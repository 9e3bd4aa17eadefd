"""What the passes of a model cost, in floating point operations (FLOP)."""

from __future__ import annotations

from mpitrain.model.card import ModelCard

# Element-wise work of embeddings, layer and head per hidden element and token, forward and backward, in the FLOP of a
# matrix product that takes as long: measured for three cards on a CPU, between float32 and bfloat16.
ELEMENTWISE = (3000, 4000, 500)


def block_costs(card: ModelCard, num_labels: int, mean_length: float) -> list[float]:
    """Estimated FLOP per token of each block, forward and backward (backward is twice forward).

    `mean_length` is that of the sequence in which a token stands: the sum of squared lengths divided by the sum.
    """
    hidden = card.hidden_size
    embeddings, layer, head = (hidden * each for each in ELEMENTWISE)
    layer += 3 * 2 * hidden * (4 * hidden + 2 * card.intermediate_size)
    attention = 3 * 2 * 2 * hidden * mean_length
    return [embeddings, *[layer + attention] * card.num_hidden_layers, head + 3 * 2 * hidden * num_labels]
