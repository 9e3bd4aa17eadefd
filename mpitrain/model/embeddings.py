"""Block 0: what tokens and their positions stand for, added, normalised, dropped."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its customary name

from mpitrain.errors import DataError
from mpitrain.model.card import ModelCard
from mpitrain.model.dropout import KeyedDropout
from mpitrain.model.layout import PackedLayout
from mpitrain.model.tensor_parallel import Group, own_rows, region, scatter
from mpitrain.model.weights import Weights


class Embeddings(nn.Module):
    """Int64 tokens [num_tokens] to the own rows of [num_tokens, hidden_size]."""

    def __init__(self, card: ModelCard, group: Group) -> None:
        super().__init__()
        self.card, self.group = card, group
        self.word_embeddings = Weights(card.vocab_size, card.hidden_size, bias=False, group=group, dim=0)
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
        hidden = scatter(self._look_up(tokens), self.group)
        # One sentence per sequence: every token is of type 0.
        positions = layout.position_ids[own_rows(layout.num_tokens, self.group)]
        hidden = hidden + F.embedding(positions, self.position_embeddings.weight)
        hidden = hidden + self.token_type_embeddings.weight[0]
        hidden = self.LayerNorm.layer_norm(hidden, self.card.layer_norm_eps)
        if dropout is None:
            return hidden
        own = region(layout.num_tokens, self.card.hidden_size, self.group)
        return dropout(hidden, self.card.hidden_dropout_prob, 0, own)

    def _look_up(self, tokens: Tensor) -> Tensor:
        """[num_tokens, hidden_size], zero for word pieces that others have."""
        shard = self.word_embeddings.shards["weight"]
        if shard.is_whole:
            return F.embedding(tokens, self.word_embeddings.weight, sparse=True)
        here = ((tokens >= shard.start) & (tokens < shard.stop)).nonzero().squeeze(1)
        found = F.embedding(tokens[here] - shard.start, self.word_embeddings.weight, sparse=True)
        return found.new_zeros(len(tokens), found.shape[1]).index_copy(0, here, found)
