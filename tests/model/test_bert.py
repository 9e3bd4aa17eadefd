from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from transformers import BertConfig, BertForTokenClassification

from mpitrain.comm.buckets import fill_buckets
from mpitrain.errors import DataError
from mpitrain.model.bert import BertStage, num_blocks, parameter_shapes, token_loss
from mpitrain.model.card import ModelCard
from mpitrain.model.cost import block_costs
from mpitrain.model.dropout import KeyedDropout
from mpitrain.model.initial import initialize, load_weights
from mpitrain.model.layout import PackedLayout

LABELS = 5
SMALL = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48}
UNCASED = ModelCard(vocab_size=61, max_position_embeddings=40, **SMALL)
CASED = ModelCard(vocab_size=47, max_position_embeddings=33, do_lower_case=False, hidden_act="gelu_new", **SMALL)
RELU = ModelCard(vocab_size=47, hidden_act="relu", classifier_dropout=0.3, layer_norm_eps=1e-6, **SMALL)
EVEN, UNEVEN = [7, 7, 7], [9, 1, 30, 4, 1]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def reference(card):
    fields = card.model_dump(exclude={"do_lower_case"})
    return BertForTokenClassification(BertConfig(**fields, num_labels=LABELS)).eval()


def cut(card, num_stages, dtype=torch.float32, places=None, recompute="none"):
    """The model as stages, with the same initial weights for any number of them."""
    places = places or [num_blocks(card) * stage // num_stages for stage in range(num_stages + 1)]
    stages = [BertStage(card, LABELS, [place], recompute) for place in pairwise(places)]
    for stage in stages:
        initialize(stage, card, seed=3)
    return [stage.to(dtype) for stage in stages]


def batch(card, lengths):
    tokens = torch.randint(1, card.vocab_size, (sum(lengths),))
    labels = torch.randint(0, LABELS, (sum(lengths),))
    labels[::3] = -100
    return tokens, labels, PackedLayout(lengths)


def through(stages, tokens, labels, layout, dropout=None):
    """One micro-batch forward and backward, cut at the borders as a pipeline does: (logits, loss, gradients)."""
    inputs, outputs = [tokens], []
    for stage in stages:
        outputs.append(stage(inputs[-1], layout, dropout))
        inputs.append(outputs[-1].detach().requires_grad_())
    loss = token_loss(outputs[-1], labels, int((labels >= 0).sum()))
    loss.backward()
    for output, received in reversed(list(zip(outputs[:-1], inputs[1:-1], strict=True))):
        output.backward(received.grad)
    gradients = {name: parameter.grad.to_dense() for stage in stages for name, parameter in stage.named_parameters()}
    return outputs[-1].detach(), loss.detach(), gradients


def padded(tokens, lengths, value):
    return torch.nn.utils.rnn.pad_sequence(tokens.split(lengths), batch_first=True, padding_value=value)


@pytest.mark.parametrize("num_stages", [1, 2, 4])
@pytest.mark.parametrize("lengths", [EVEN, UNEVEN], ids=["no padding", "padding"])
@pytest.mark.parametrize("card", [UNCASED, CASED, RELU], ids=["uncased", "cased", "relu"])
def test_logits_loss_and_all_gradients_equal_those_of_transformers(card, lengths, num_stages):
    model, stages = reference(card), cut(card, num_stages)
    for stage in stages:
        load_weights(stage, {name: model.get_parameter(name) for name, _ in stage.named_parameters()})
    tokens, labels, layout = batch(card, lengths)
    mask = padded(torch.ones_like(tokens), lengths, 0)
    expected = model(padded(tokens, lengths, 0), attention_mask=mask, labels=padded(labels, lengths, -100))
    expected.loss.backward()
    logits, loss, gradients = through(stages, tokens, labels, layout)
    torch.testing.assert_close(logits, expected.logits[mask.bool()].detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss, expected.loss.detach(), atol=1e-6, rtol=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-6, rtol=1e-5, msg=name)


def test_sequences_of_padding_without_labels_change_neither_loss_nor_gradients():
    tokens, labels, layout = batch(UNCASED, UNEVEN)
    _, loss, gradients = through(cut(UNCASED, 1), tokens, labels, layout)
    tokens, labels = F.pad(tokens, (0, 5)), F.pad(labels, (0, 5), value=-100)
    _, same_loss, same_gradients = through(cut(UNCASED, 1), tokens, labels, PackedLayout([*UNEVEN, 3, 2]))
    torch.testing.assert_close(same_loss, loss, atol=1e-6, rtol=1e-6)
    for name, values in gradients.items():
        torch.testing.assert_close(same_gradients[name], values, atol=1e-6, rtol=1e-5, msg=name)
    assert not same_gradients["bert.embeddings.word_embeddings.weight"][0].any()


@pytest.mark.parametrize("places", [[0, 6], [0, 3, 6], [0, 4, 5, 6]], ids=["one stage", "two", "the head alone"])
def test_tokens_that_are_not_wanted_end_in_the_last_layer_and_nothing_else_changes(places):
    tokens, labels, layout = batch(UNCASED, UNEVEN)
    logits, loss, gradients = through(cut(UNCASED, 1), tokens, labels, layout)
    wanted = torch.tensor([0, *(labels >= 0).nonzero()[:, 0].tolist()])  # one of them has no label
    stages, layout = cut(UNCASED, 0, places=places), PackedLayout(UNEVEN, wanted=wanted.numpy())
    found, same_loss, same_gradients = through(stages, tokens, labels[wanted], layout)
    assert [stage.rows(layout) for stage in stages][-1] == (len(wanted) if places[-2] == 5 else 45, len(wanted))
    torch.testing.assert_close(found, logits[wanted], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(same_loss, loss, atol=1e-6, rtol=1e-6)
    for name, values in gradients.items():
        torch.testing.assert_close(same_gradients[name], values, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("recompute", ["attention", "block"])
@pytest.mark.parametrize("num_stages", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_what_is_computed_again_has_the_same_bits_and_is_not_kept(recompute, num_stages, dtype):
    tokens, labels, layout = batch(UNCASED, UNEVEN)
    kept: dict[str, list[int]] = {"none": [], recompute: []}
    found = []
    for how, sizes in kept.items():
        stages = cut(UNCASED, num_stages, dtype, recompute=how)

        def pack(x, sizes=sizes):
            sizes.append(x.nbytes)
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            found.append(through(stages, tokens, labels, layout, KeyedDropout(0, 1, 2)))
    for name, values in found[0][2].items():
        assert torch.equal(found[1][2][name], values), name
    assert torch.equal(found[0][0], found[1][0])
    assert sum(kept[recompute]) < sum(kept["none"]) * (0.4 if recompute == "block" else 0.9)


def test_only_the_tables_have_sparse_gradients():
    for stage in cut(UNCASED, 2):
        hidden = torch.zeros(sum(UNEVEN), UNCASED.hidden_size, requires_grad=True)
        tokens, _, layout = batch(UNCASED, UNEVEN)
        stage(tokens if stage.has_embeddings else hidden, layout).sum().backward()
        assert [name for name, parameter in stage.named_parameters() if parameter.grad.is_sparse] == stage.tables


def test_names_shapes_and_their_order_are_those_of_transformers():
    with torch.device("meta"):
        expected = {name: tuple(values.shape) for name, values in reference(UNCASED).state_dict().items()}
    assert list(parameter_shapes(UNCASED, LABELS).items()) == list(expected.items())


def test_weights_are_nan_until_somebody_sets_them():
    assert all(parameter.isnan().all() for parameter in BertStage(UNCASED, LABELS, [(0, 6)]).parameters())


@pytest.mark.parametrize("num_stages", [2, 4, 6])
def test_with_dropout_any_cut_gives_the_same_bits_as_no_cut(num_stages):
    arguments = (*batch(UNCASED, UNEVEN), KeyedDropout(seed=1, step=2, micro_batch=3))
    whole, pieces = through(cut(UNCASED, 1), *arguments), through(cut(UNCASED, num_stages), *arguments)
    assert torch.equal(whole[0], pieces[0]) and torch.equal(whole[1], pieces[1])
    assert all(torch.equal(gradient, pieces[2][name]) for name, gradient in whole[2].items())
    assert not torch.equal(whole[0], through(cut(UNCASED, 1), *arguments[:3])[0])


def test_no_two_places_of_the_model_share_a_dropout_site():
    used = []

    class Recorder(KeyedDropout):
        def mask(self, x, probability, site, region=None):
            used.append((site, probability))

    card = UNCASED.model_copy(update={"attention_probs_dropout_prob": 0.2, "classifier_dropout": 0.3})
    tokens, labels, layout = batch(card, UNEVEN)
    through(cut(card, 3), tokens, labels, layout, Recorder(0, 0, 0))
    assert len(used) == len({site for site, _ in used})
    assert sorted(probability for _, probability in used) == [0.1] * 9 + [0.2] * 4 + [0.3]


@pytest.mark.parametrize("bucket_bytes", [1, 20_000, 10**9])
def test_matrices_that_are_multiplied_as_one_are_adjacent_in_their_bucket(bucket_bytes):
    (stage,) = cut(UNCASED, 1)
    buckets = fill_buckets(stage, bucket_bytes, stage.tables, stage.stacks)
    places = {member.name: (bucket, member.start, member.stop) for bucket in buckets for member in bucket.members}
    assert sum(len(bucket.members) for bucket in buckets) == len(places) == len(dict(stage.named_parameters()))
    assert len(stage.stacks) == UNCASED.num_hidden_layers
    for names in stage.stacks:
        query, key, value = (places[name] for name in names)
        assert query[0] is key[0] is value[0] and query[2] == key[1] and key[2] == value[1]
    for bucket in buckets:
        num_bytes = 4 * sum(member.parameter.numel() for member in bucket.members)
        whole = len(bucket.members) == 1 or [member.name for member in bucket.members] in stage.stacks
        assert whole or num_bytes <= bucket_bytes


def test_initial_weights_are_those_of_bert_and_hang_on_seed_and_name_only():
    whole = dict(cut(UNCASED, 1)[0].named_parameters())
    for stage in cut(UNCASED, 4):
        assert all(torch.equal(values, whole[name]) for name, values in stage.named_parameters())
    matrices = [values for values in whole.values() if values.dim() == 2]
    assert torch.cat([values.flatten() for values in matrices]).std().item() == pytest.approx(0.02, rel=0.02)
    assert len({values.flatten()[40].item() for values in matrices}) == len(matrices)
    assert not whole["bert.embeddings.word_embeddings.weight"][0].any()
    assert all((values == float(name.endswith("weight"))).all() for name, values in whole.items() if values.dim() == 1)
    other = BertStage(UNCASED, LABELS, [(5, 6)])
    initialize(other, UNCASED, seed=4)
    assert not torch.equal(other.classifier.weight, whole["classifier.weight"])


def test_bfloat16_starts_from_the_same_weights_rounded_and_stays_close():
    tokens, labels, layout = batch(UNCASED, UNEVEN)
    dropout = KeyedDropout(0, 0, 0)
    exact = through(cut(UNCASED, 1), tokens, labels, layout, dropout)
    rounded = through(cut(UNCASED, 2, torch.bfloat16), tokens, labels, layout, dropout)
    assert rounded[0].dtype == torch.bfloat16 and rounded[1].dtype == torch.float32
    torch.testing.assert_close(rounded[0].float(), exact[0], atol=0.02, rtol=0.05)
    for name, gradient in exact[2].items():
        assert (rounded[2][name].float() - gradient).norm() <= 0.05 * gradient.norm() + 1e-5, name


def test_shares_of_the_loss_add_up_to_the_mean_over_the_whole_batch():
    logits, labels = torch.randn(10, LABELS), torch.tensor([0, 1, -100, 2, 3, 4, -100, -100, -100, 1])
    shares = [
        token_loss(logits[part], labels[part], 6) for part in (slice(0, 3), slice(3, 6), slice(6, 9), slice(9, 10))
    ]
    torch.testing.assert_close(sum(shares), torch.nn.functional.cross_entropy(logits, labels))
    assert shares[2] == 0


@pytest.mark.parametrize("lengths", [[], [3]])
def test_a_micro_batch_without_sequences_or_without_labels_gives_zero_loss_and_zero_gradients(lengths):
    tokens, labels, layout = batch(UNCASED, lengths)
    _, loss, gradients = through(cut(UNCASED, 2), tokens, torch.full_like(labels, -100), layout, KeyedDropout(0, 0, 0))
    assert loss == 0 and all(gradient is not None and not gradient.any() for gradient in gradients.values())


def test_a_sequence_beyond_the_positions_is_refused_with_both_numbers():
    tokens, _, layout = batch(CASED, [34])
    with pytest.raises(DataError, match=r"34 tokens.*is 33"):
        cut(CASED, 1)[0](tokens, layout)


def test_costs_of_the_layers_are_equal_dominate_and_grow_with_the_length():
    short, long = block_costs(UNCASED, LABELS, 10), block_costs(UNCASED, LABELS, 500)
    assert len(short) == num_blocks(UNCASED) and len(set(short[1:-1])) == 1
    assert 0 < short[-1] < short[0] < short[1] < long[1]
    hidden = UNCASED.hidden_size
    assert long[1] - short[1] == pytest.approx(3 * 2 * (2 * hidden * 490))
