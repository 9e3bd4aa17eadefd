"""BERT for token classification as a list of blocks, any run of which is a stage; it knows nothing of ranks.

Block 0 is the embeddings, blocks 1 to L the encoder layers, block L + 1 the head. Parameters carry the names that
Hugging Face gives them, so a checkpoint needs no table of translations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its customary name
from torch.utils.checkpoint import checkpoint

from mpitrain.errors import DataError
from mpitrain.model.attention import PackedLayout, packed_attention
from mpitrain.model.card import ModelCard
from mpitrain.model.dropout import KeyedDropout
from mpitrain.model.linear import linear, linear_gelu, stacked_linear

IGNORED_LABEL = -100
# Of x, weight and bias to the activation of the linear layer.
ACTIVATIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "gelu": partial(linear_gelu, approximate="none"),
    "gelu_new": partial(linear_gelu, approximate="tanh"),
    "relu": lambda *arguments: F.relu(linear(*arguments)),
}
SITES_PER_BLOCK = 3  # dropout places in a block: attention probabilities, attention output, output


class Weights(nn.Module):
    """A weight, perhaps a bias: a linear map, a LayerNorm or an embedding table, as its user sees fit.

    Values are NaN until `initialize` or `load_weights` sets them, so that forgetting to shows at once.
    """

    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(self, *shape: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full(shape, torch.nan))
        if bias:
            self.bias = nn.Parameter(torch.full(shape[:1], torch.nan))

    def linear(self, x: Tensor) -> Tensor:
        """[num_tokens, shape[1]] to [num_tokens, shape[0]]."""
        return linear(x, self.weight, self.bias)

    def layer_norm(self, x: Tensor, epsilon: float) -> Tensor:
        """Normalise over the last dimension; torch keeps the statistics of bf16 input in float32."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, epsilon)


class Embeddings(nn.Module):
    """Block 0: int64 tokens [num_tokens] to [num_tokens, hidden_size]."""

    def __init__(self, card: ModelCard) -> None:
        super().__init__()
        self.card = card
        self.word_embeddings = Weights(card.vocab_size, card.hidden_size, bias=False)
        self.position_embeddings = Weights(card.max_position_embeddings, card.hidden_size, bias=False)
        self.token_type_embeddings = Weights(card.type_vocab_size, card.hidden_size, bias=False)
        self.LayerNorm = Weights(card.hidden_size)

    def forward(self, tokens: Tensor, layout: PackedLayout, dropout: KeyedDropout | None) -> Tensor:
        """Look up, add, normalise, drop."""
        if layout.longest > self.card.max_position_embeddings:
            raise DataError(
                f"a sequence has {layout.longest} tokens, but the model's max_position_embeddings is "
                f"{self.card.max_position_embeddings}; prepare the data with a max_length of at most that"
            )
        hidden = F.embedding(tokens, self.word_embeddings.weight, sparse=True)
        # One sentence per sequence: every token is of type 0.
        hidden = hidden + F.embedding(layout.position_ids, self.position_embeddings.weight)
        hidden = hidden + self.token_type_embeddings.weight[0]
        hidden = self.LayerNorm.layer_norm(hidden, self.card.layer_norm_eps)
        return _drop(hidden, dropout, self.card.hidden_dropout_prob, site=0)


class SelfAttention(nn.Module):
    """The three projections and the attention between them."""

    def __init__(self, card: ModelCard, site: int, recompute: bool) -> None:
        super().__init__()
        self.card, self.site, self.recompute = card, site, recompute
        self.query, self.key, self.value = (Weights(card.hidden_size, card.hidden_size) for _ in range(3))

    def forward(self, hidden: Tensor, layout: PackedLayout, dropout: KeyedDropout | None) -> Tensor:
        """[num_tokens, hidden_size] to the same, heads side by side."""
        maps = (self.query, self.key, self.value)
        projected = stacked_linear(hidden, [each.weight for each in maps], [each.bias for each in maps])
        heads, probability = self.card.num_attention_heads, self.card.attention_probs_dropout_prob
        arguments = (projected, layout, heads, dropout, probability, self.site)
        return _forget(packed_attention, *arguments) if self.recompute else packed_attention(*arguments)


class Residual(nn.Module):
    """The end of a sub-layer: project, drop, add to the sub-layer's input, normalise."""

    def __init__(self, card: ModelCard, size: int, site: int) -> None:
        super().__init__()
        self.card, self.site = card, site
        self.dense = Weights(card.hidden_size, size)
        self.LayerNorm = Weights(card.hidden_size)

    def forward(self, x: Tensor, residual: Tensor, dropout: KeyedDropout | None) -> Tensor:
        """[num_tokens, size] and [num_tokens, hidden_size] to the latter."""
        x, probability = self.dense.linear(x), self.card.hidden_dropout_prob
        x = residual + x if dropout is None else dropout.add(x, probability, self.site, residual)
        return self.LayerNorm.layer_norm(x, self.card.layer_norm_eps)


class Attention(nn.Module):
    """The first sub-layer; exists to give its parts their names."""

    def __init__(self, card: ModelCard, site: int, recompute: bool) -> None:
        super().__init__()
        self.self = SelfAttention(card, site, recompute)
        self.output = Residual(card, card.hidden_size, site + 1)

    def forward(
        self, hidden: Tensor, layout: PackedLayout, dropout: KeyedDropout | None, wanted: Tensor | None
    ) -> Tensor:
        """[num_tokens, hidden_size] to the same, or to the rows `wanted` of it."""
        context = self.self(hidden, layout, dropout)
        if wanted is not None:
            context, hidden = context.index_select(0, wanted), hidden.index_select(0, wanted)
        return cast(Tensor, self.output(context, hidden, dropout))


class Intermediate(nn.Module):
    """The widening half of the second sub-layer."""

    def __init__(self, card: ModelCard) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[card.hidden_act]
        self.dense = Weights(card.intermediate_size, card.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """[num_tokens, hidden_size] to [num_tokens, intermediate_size]."""
        return self.activation(hidden, self.dense.weight, self.dense.bias)


class EncoderLayer(nn.Module):
    """Blocks 1 to L: [num_tokens, hidden_size] to the same; post-norm (Vaswani et al. 2017, section 3.1).

    Block L goes on with the tokens whose logits are wanted alone as soon as the others have been attended to.
    """

    def __init__(self, card: ModelCard, block: int, recompute_attention: bool) -> None:
        super().__init__()
        site = block * SITES_PER_BLOCK
        self.is_last = block == card.num_hidden_layers
        self.attention = Attention(card, site, recompute_attention)
        self.intermediate = Intermediate(card)
        self.output = Residual(card, card.intermediate_size, site + 2)

    def forward(self, hidden: Tensor, layout: PackedLayout, dropout: KeyedDropout | None) -> Tensor:
        """[num_tokens, hidden_size] to the same, of block L to [num_wanted, hidden_size]."""
        hidden = self.attention(hidden, layout, dropout, layout.wanted if self.is_last else None)
        return cast(Tensor, self.output(self.intermediate(hidden), hidden, dropout))


class BertStage(nn.Module):
    """Chunks of the `num_blocks(card)` blocks, each a run [first, last) of them; parameters are in forward order.

    What the backward pass needs is kept, or computed again from the input of each attention or block (Chen et al.,
    "Training deep nets with sublinear memory cost", 2016, section 3), as `recompute` says: none, attention or block.
    """

    def __init__(
        self, card: ModelCard, num_labels: int, chunks: Sequence[tuple[int, int]], recompute: str = "none"
    ) -> None:
        super().__init__()
        assert all(0 <= first < last <= num_blocks(card) for first, last in chunks), "a chunk holds at least one block"
        self.card, self.chunks, self.recompute = card, list(chunks), recompute
        blocks = [block for first, last in chunks for block in range(first, last)]
        self.has_embeddings, self.has_head = blocks[0] == 0, blocks[-1] == num_blocks(card) - 1
        layers = [block for block in blocks if 1 <= block <= card.num_hidden_layers]
        self.bert = nn.Module()
        if self.has_embeddings:
            self.bert.embeddings = Embeddings(card)
        self.bert.encoder = nn.Module()
        self.bert.encoder.layer = nn.ModuleDict(
            {str(block - 1): EncoderLayer(card, block, recompute == "attention") for block in layers}
        )
        if self.has_head:
            self.classifier = Weights(num_labels, card.hidden_size)

    def forward(
        self, inputs: Tensor, layout: PackedLayout, dropout: KeyedDropout | None = None, chunk: int = 0
    ) -> Tensor:
        """Carry a packed micro-batch through a chunk.

        Args:
            inputs: int64 tokens [num_tokens] if the chunk begins with the embeddings, else hidden [num_rows,
                hidden_size] where `num_rows` is that of `rows`.
            layout: of the micro-batch, on the device of the inputs.
            dropout: of this micro-batch; None in evaluation.
            chunk: which one, of this stage's own.

        Returns:
            Logits [num_wanted, num_labels] if the chunk ends with the head, else hidden [num_rows, hidden_size].

        Raises:
            DataError: a sequence is longer than the positions that the card has.
        """
        hidden = inputs
        for block in range(*self.chunks[chunk]):
            if block == num_blocks(self.card) - 1:
                return self._classify(hidden, dropout)
            arguments = (hidden, layout, dropout)
            run = self._block(block)
            hidden = _forget(run, *arguments) if self.recompute == "block" else run(*arguments)
        return hidden

    def _block(self, block: int) -> nn.Module:
        return self.bert.get_submodule("embeddings" if block == 0 else f"encoder.layer.{block - 1}")

    def _classify(self, hidden: Tensor, dropout: KeyedDropout | None) -> Tensor:
        chance = self.card.classifier_dropout
        probability = self.card.hidden_dropout_prob if chance is None else chance
        hidden = _drop(hidden, dropout, probability, (num_blocks(self.card) - 1) * SITES_PER_BLOCK)
        return self.classifier.linear(hidden)

    def rows(self, layout: PackedLayout, chunk: int = 0) -> tuple[int, int]:
        """Of the hidden states that enter and leave a chunk: behind block L only tokens that are wanted go on."""
        entering, leaving = (
            layout.num_wanted if border > self.card.num_hidden_layers else layout.num_tokens
            for border in self.chunks[chunk]
        )
        return entering, leaving

    @property
    def tables(self) -> list[str]:
        """Names of the parameters whose gradients are sparse, [num_rows, size]: only rows that were looked up."""
        return ["bert.embeddings.word_embeddings.weight"] if self.has_embeddings else []

    @property
    def stacks(self) -> list[list[str]]:
        """Names of matrices that are multiplied as one, and need no copy for that where they are adjacent in memory."""
        names = [name for name, _ in self.named_parameters() if name.endswith(".self.query.weight")]
        return [[name.replace(".query.", f".{each}.") for each in ("query", "key", "value")] for name in names]


def _drop(x: Tensor, dropout: KeyedDropout | None, probability: float, site: int) -> Tensor:
    return x if dropout is None else dropout(x, probability, site)


def _forget(run: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """What `run` returns; the backward pass runs it again, to the same bits, as dropout keeps no state."""
    if not torch.is_grad_enabled():
        return run(*arguments)
    return cast(Tensor, checkpoint(run, *arguments, use_reentrant=False, preserve_rng_state=False))


def num_blocks(card: ModelCard) -> int:
    """Embeddings, encoder layers, head."""
    return card.num_hidden_layers + 2


def parameter_shapes(card: ModelCard, num_labels: int) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of the whole model, in forward order; takes no memory for values."""
    with torch.device("meta"):
        stage = BertStage(card, num_labels, [(0, num_blocks(card))])
    return {name: tuple(parameter.shape) for name, parameter in stage.named_parameters()}


def token_loss(logits: Tensor, labels: Tensor, num_labelled: int) -> Tensor:
    """A micro-batch's share of the batch's mean cross entropy; shares add up to the mean.

    Args:
        logits: [num_wanted, num_labels], any floating dtype.
        labels: int64 [num_wanted], -100 where there is none.
        num_labelled: labelled tokens in the whole batch.

    Returns:
        float32 scalar; 0, still with a graph, if nothing is labelled.
    """
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORED_LABEL, reduction="sum") / max(num_labelled, 1)
