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

from mpitrain.model.attention import packed_attention
from mpitrain.model.card import ModelCard
from mpitrain.model.dropout import KeyedDropout
from mpitrain.model.embeddings import Embeddings
from mpitrain.model.layout import PackedLayout
from mpitrain.model.linear import linear, linear_gelu, stacked_linear
from mpitrain.model.tensor_parallel import Alone, Group, gather, own_rows, region, scatter
from mpitrain.model.weights import Weights

IGNORED_LABEL = -100
# Of x, weight and bias to the activation of the linear layer.
ACTIVATIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "gelu": partial(linear_gelu, approximate="none"),
    "gelu_new": partial(linear_gelu, approximate="tanh"),
    "relu": lambda *arguments: F.relu(linear(*arguments)),
}
SITES_PER_BLOCK = 3  # dropout places in a block: attention probabilities, attention output, output


class SelfAttention(nn.Module):
    """The three projections to this rank's heads, and the attention between them."""

    def __init__(self, card: ModelCard, group: Group, site: int, recompute: bool) -> None:
        super().__init__()
        self.card, self.site, self.recompute = card, site, recompute
        size, self.head_size = card.hidden_size, card.hidden_size // card.num_attention_heads
        self.query, self.key, self.value = (Weights(size, size, group=group, dim=0) for _ in range(3))

    def forward(self, hidden: Tensor, layout: PackedLayout, dropout: KeyedDropout | None) -> Tensor:
        """[num_tokens, hidden_size] to [num_tokens, own heads * head_size], heads side by side."""
        maps = (self.query, self.key, self.value)
        projected = stacked_linear(hidden, [each.weight for each in maps], [each.bias for each in maps])
        own, probability = self.query.shards["weight"], self.card.attention_probs_dropout_prob
        first, last = own.start // self.head_size, own.stop // self.head_size
        heads = self.card.num_attention_heads
        arguments = (projected, layout, last - first, dropout, probability, self.site, first, heads)
        return _forget(packed_attention, *arguments) if self.recompute else packed_attention(*arguments)


class Residual(nn.Module):
    """The end of a sub-layer: project, drop, add to the sub-layer's input, normalise."""

    def __init__(self, card: ModelCard, group: Group, size: int, site: int) -> None:
        super().__init__()
        self.card, self.group, self.site = card, group, site
        self.dense = Weights(card.hidden_size, size, group=group, dim=1)
        self.LayerNorm = Weights(card.hidden_size)

    def forward(self, x: Tensor, residual: Tensor, dropout: KeyedDropout | None) -> Tensor:
        """Own columns of [num_rows, size], and own rows of [num_rows, hidden_size], to the latter."""
        own = region(len(x), self.card.hidden_size, self.group)
        x, probability = scatter(self.dense.partial(x), self.group), self.card.hidden_dropout_prob
        x = residual + x if dropout is None else dropout.add(x, probability, self.site, residual, own)
        return self.LayerNorm.layer_norm(x, self.card.layer_norm_eps)


class Attention(nn.Module):
    """The first sub-layer; exists to give its parts their names."""

    def __init__(self, card: ModelCard, group: Group, site: int, recompute: bool) -> None:
        super().__init__()
        self.group = group
        self.self = SelfAttention(card, group, site, recompute)
        self.output = Residual(card, group, card.hidden_size, site + 1)

    def forward(
        self, hidden: Tensor, layout: PackedLayout, dropout: KeyedDropout | None, wanted: Tensor | None
    ) -> Tensor:
        """Own rows of [num_tokens, hidden_size] to the same, or to the own ones of the rows `wanted` of it."""
        everything = gather(hidden, layout.num_tokens, self.group)
        context = self.self(everything, layout, dropout)
        if wanted is not None:
            context = context.index_select(0, wanted)
            hidden = everything.index_select(0, wanted[own_rows(len(wanted), self.group)])
        return cast(Tensor, self.output(context, hidden, dropout))


class Intermediate(nn.Module):
    """The widening half of the second sub-layer."""

    def __init__(self, card: ModelCard, group: Group) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[card.hidden_act]
        self.dense = Weights(card.intermediate_size, card.hidden_size, group=group, dim=0)

    def forward(self, hidden: Tensor) -> Tensor:
        """[num_rows, hidden_size] to own columns of [num_rows, intermediate_size]."""
        return self.activation(hidden, self.dense.weight, self.dense.bias)


class EncoderLayer(nn.Module):
    """Blocks 1 to L: own rows of [num_tokens, hidden_size] to the same; post-norm (Vaswani et al. 2017, section 3.1).

    Block L goes on with the tokens whose logits are wanted alone as soon as the others have been attended to.
    """

    def __init__(self, card: ModelCard, group: Group, block: int, recompute_attention: bool) -> None:
        super().__init__()
        site = block * SITES_PER_BLOCK
        self.group, self.is_last = group, block == card.num_hidden_layers
        self.attention = Attention(card, group, site, recompute_attention)
        self.intermediate = Intermediate(card, group)
        self.output = Residual(card, group, card.intermediate_size, site + 2)

    def forward(self, hidden: Tensor, layout: PackedLayout, dropout: KeyedDropout | None) -> Tensor:
        """Own rows of [num_tokens, hidden_size] to the same, of block L to those of [num_wanted, hidden_size]."""
        hidden = self.attention(hidden, layout, dropout, layout.wanted if self.is_last else None)
        everything = gather(hidden, layout.num_wanted if self.is_last else layout.num_tokens, self.group)
        return cast(Tensor, self.output(self.intermediate(everything), hidden, dropout))


class BertStage(nn.Module):
    """Chunks of the `num_blocks(card)` blocks, each a run [first, last) of them; parameters are in forward order.

    What the backward pass needs is kept, or computed again from the input of each attention or block (Chen et al.,
    "Training deep nets with sublinear memory cost", 2016, section 3), as `recompute` says: none, attention or block.
    """

    def __init__(
        self,
        card: ModelCard,
        num_labels: int,
        chunks: Sequence[tuple[int, int]],
        recompute: str = "none",
        group: Group | None = None,
    ) -> None:
        super().__init__()
        self.group = group = group or Alone()
        assert all(0 <= first < last <= num_blocks(card) for first, last in chunks), "a chunk holds at least one block"
        self.card, self.chunks, self.recompute = card, list(chunks), recompute
        blocks = [block for first, last in chunks for block in range(first, last)]
        self.has_embeddings, self.has_head = blocks[0] == 0, blocks[-1] == num_blocks(card) - 1
        layers = [block for block in blocks if 1 <= block <= card.num_hidden_layers]
        self.bert = nn.Module()
        if self.has_embeddings:
            self.bert.embeddings = Embeddings(card, group)
        self.bert.encoder = nn.Module()
        self.bert.encoder.layer = nn.ModuleDict(
            {str(block - 1): EncoderLayer(card, group, block, recompute == "attention") for block in layers}
        )
        if self.has_head:
            self.classifier = Weights(num_labels, card.hidden_size)
        maps = ((prefix, each) for prefix, each in self.named_modules() if isinstance(each, Weights))
        # Which part of each parameter this is, by name.
        self.shards = {f"{prefix}.{name}": shard for prefix, each in maps for name, shard in each.shards.items()}

    def forward(
        self, inputs: Tensor, layout: PackedLayout, dropout: KeyedDropout | None = None, chunk: int = 0
    ) -> Tensor:
        """Carry a packed micro-batch through a chunk.

        Args:
            inputs: int64 tokens [num_tokens] if the chunk begins with the embeddings, else hidden [own rows,
                hidden_size] as of `rows`.
            layout: of the micro-batch, on the device of the inputs.
            dropout: of this micro-batch; None in evaluation.
            chunk: which one, of this stage's own.

        Returns:
            Logits [own rows, num_labels] of the wanted tokens if the chunk ends with the head, else hidden [own rows,
            hidden_size]; of a group of one all rows are its own.

        Raises:
            DataError: a sequence is longer than the positions that the card has.
        """
        hidden = inputs
        for block in range(*self.chunks[chunk]):
            if block == num_blocks(self.card) - 1:
                return self._classify(hidden, layout, dropout)
            arguments = (hidden, layout, dropout)
            run = self._block(block)
            hidden = _forget(run, *arguments) if self.recompute == "block" else run(*arguments)
        return hidden

    def _block(self, block: int) -> nn.Module:
        return self.bert.get_submodule("embeddings" if block == 0 else f"encoder.layer.{block - 1}")

    def _classify(self, hidden: Tensor, layout: PackedLayout, dropout: KeyedDropout | None) -> Tensor:
        if dropout is not None:
            chance = self.card.classifier_dropout
            probability = self.card.hidden_dropout_prob if chance is None else chance
            own = region(layout.num_wanted, self.card.hidden_size, self.group)
            hidden = dropout(hidden, probability, (num_blocks(self.card) - 1) * SITES_PER_BLOCK, own)
        return self.classifier.linear(hidden)

    def rows(self, layout: PackedLayout, chunk: int = 0) -> tuple[int, int]:
        """Own ones of the hidden states that enter and leave a chunk: behind block L only those wanted go on."""
        counts = (
            layout.num_wanted if border > self.card.num_hidden_layers else layout.num_tokens
            for border in self.chunks[chunk]
        )
        entering, leaving = (own_rows(count, self.group) for count in counts)
        return entering.stop - entering.start, leaving.stop - leaving.start

    @property
    def shared(self) -> list[str]:
        """Names of parameters that all ranks of the group have, each with gradients of its own rows."""
        return [name for name, shard in self.shards.items() if self.group.size > 1 and shard.is_whole]

    @property
    def tables(self) -> list[str]:
        """Names of the parameters whose gradients are sparse, [num_rows, size]: only rows that were looked up."""
        return ["bert.embeddings.word_embeddings.weight"] if self.has_embeddings else []

    @property
    def stacks(self) -> list[list[str]]:
        """Names of matrices that are multiplied as one, and need no copy for that where they are adjacent in memory."""
        names = [name for name, _ in self.named_parameters() if name.endswith(".self.query.weight")]
        return [[name.replace(".query.", f".{each}.") for each in ("query", "key", "value")] for name in names]


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
        labels: int64 [num_wanted], or the own rows of that as logits are, -100 where there is none.
        num_labelled: labelled tokens in the whole batch.

    Returns:
        float32 scalar; 0, still with a graph, if nothing is labelled.
    """
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORED_LABEL, reduction="sum") / max(num_labelled, 1)
