"""A model in parts on the threads of one process gives the numbers of the whole."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from mpitrain.model.bert import BertStage, num_blocks, token_loss
from mpitrain.model.card import ModelCard
from mpitrain.model.dropout import KeyedDropout
from mpitrain.model.initial import initialize
from mpitrain.model.layout import PackedLayout
from mpitrain.model.linear import postponed
from mpitrain.split import part

LABELS, SEED = 5, 3
CARD = ModelCard(
    vocab_size=61,
    max_position_embeddings=40,
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=12,
    intermediate_size=50,  # no number of ranks but two divides it
)
LENGTHS = [9, 1, 30, 4, 1]
WANTED = torch.tensor([0, 1, 9, 10, 12, 20, 33, 40, 44])


class Threads:
    """A group whose ranks are threads."""

    def __init__(self, rank, size, barrier, board):
        self.rank, self.size, self._barrier, self._board = rank, size, barrier, board

    def _everyone(self, tensor):
        self._board[self.rank] = tensor.detach()
        self._barrier.wait()
        found = list(self._board)
        self._barrier.wait()
        return found

    def gather_rows(self, own, num_rows):
        start, stop = part(self.rank, num_rows, self.size)
        assert len(own) == stop - start
        return torch.cat(self._everyone(own))

    def scatter_sum(self, partial):
        return torch.stack(self._everyone(partial)).sum(0)[slice(*part(self.rank, len(partial), self.size))]


def on_threads(size, work):
    """What `work(group)` returns on each of so many ranks."""
    barrier, board = threading.Barrier(size, timeout=60), [None] * size

    def run(rank):
        torch.set_num_threads(1)
        try:
            return work(Threads(rank, size, barrier, board))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))


def build(group, recompute="none"):
    stage = BertStage(CARD, LABELS, [(0, num_blocks(CARD))], recompute, group)
    initialize(stage, CARD, SEED)
    return stage


def passes(stage, group, layout, tokens, labels, dropout):
    """This rank's logits, loss and gradients of what it holds."""
    logits = stage(tokens, layout, dropout)
    own = labels[slice(*part(group.rank, len(labels), group.size))] if group else labels
    loss = token_loss(logits, own, int((labels >= 0).sum()))
    loss.backward()
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for name, p in stage.named_parameters()
    }
    return logits.detach(), float(loss.detach()), gradients


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, CARD.vocab_size, (sum(LENGTHS),), generator=generator)
    return tokens, torch.arange(len(WANTED)) % LABELS


@pytest.mark.parametrize("recompute", ["none", "attention", "block"])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_parts_of_a_model_give_its_logits_loss_and_gradients(size, recompute, batch):
    def layout():
        return PackedLayout(LENGTHS, wanted=WANTED.numpy())

    whole = build(None)
    expected = passes(whole, None, layout(), *batch, KeyedDropout(1, 2, 3))

    def work(group):
        stage = build(group, recompute)
        return stage, *passes(stage, group, layout(), *batch, KeyedDropout(1, 2, 3))

    found = on_threads(size, work)
    torch.testing.assert_close(torch.cat([logits for _, logits, _, _ in found]), expected[0], rtol=1e-4, atol=1e-5)
    assert sum(loss for _, _, loss, _ in found) == pytest.approx(expected[1], rel=1e-5)
    for name, gradient in expected[2].items():
        parts = [gradients[name] for _, _, _, gradients in found]
        shards = [stage.shards[name] for stage, *_ in found]
        if name in found[0][0].shared:
            torch.testing.assert_close(torch.stack(parts).sum(0), gradient, rtol=1e-4, atol=1e-5)
        else:
            assert sum(shard.stop - shard.start for shard in shards) == gradient.shape[shards[0].dim]
            for shard, mine in zip(shards, parts, strict=True):
                torch.testing.assert_close(mine, gradient[shard.slices], rtol=1e-4, atol=1e-5)


def test_gradients_of_weights_may_be_put_off(batch):
    def work(group):
        stage = build(group)
        stage(batch[0], PackedLayout(LENGTHS), KeyedDropout(0, 0, 0)).square().sum().backward()
        return stage

    def gradients(stage):
        return {n: p.grad.to_dense() for n, p in stage.named_parameters() if p.grad is not None}

    at_once, work_left = on_threads(2, work), []
    with postponed(work_left):
        later = on_threads(2, work)
    assert len(gradients(later[0])) < len(gradients(at_once[0]))
    with torch.no_grad():
        for each in work_left:
            each()
    for one, other in zip(at_once, later, strict=True):
        expected, found = gradients(one), gradients(other)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_hold_equal_parts_of_all_but_vectors_and_small_tables(size):
    whole = sum(parameter.numel() for parameter in build(None).parameters())
    for stage in on_threads(size, build):
        shared = sum(stage.get_parameter(name).numel() for name in stage.shared)
        own = sum(parameter.numel() for parameter in stage.parameters())
        rows = CARD.hidden_size * (1 + 2 * CARD.num_hidden_layers)  # where a cut is not even
        assert own - shared <= (whole - shared) / size + rows
        assert all(
            name.endswith("bias") or "LayerNorm" in name or "position_e" in name or "token_type" in name
            for name in stage.shared
            if name != "classifier.weight"
        )


def test_few_tokens_leave_ranks_without_rows():
    def work(group):
        stage = build(group)
        logits = stage(torch.tensor([7]), PackedLayout([1]), KeyedDropout(0, 0, 0))
        logits.sum().backward()
        return logits.detach()

    alone = build(None)(torch.tensor([7]), PackedLayout([1]), KeyedDropout(0, 0, 0)).detach()
    found = on_threads(3, work)
    assert [len(logits) for logits in found] == [1, 0, 0]
    torch.testing.assert_close(found[0], alone, rtol=1e-4, atol=1e-5)
