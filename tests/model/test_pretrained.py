import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForTokenClassification,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)

from mpitrain.errors import DataError
from mpitrain.model.bert import BertStage, num_blocks, parameter_shapes
from mpitrain.model.card import ModelCard
from mpitrain.model.initial import initialize, load_weights
from mpitrain.model.layout import PackedLayout
from mpitrain.model.pretrained import read_pretrained, write_pretrained

NAMES = ["O", "B-PER", "I-PER"]
SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
}
LENGTHS = [5, 1, 9]


def config(names=NAMES):
    labels = dict(enumerate(names))
    return BertConfig(**SIZES, id2label=labels, label2id={name: number for number, name in labels.items()})


@pytest.fixture
def directory(tmp_path):
    torch.set_num_threads(1)
    BertForTokenClassification(config()).save_pretrained(tmp_path)
    return tmp_path


def edit_weights(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def edit_config(directory, **fields):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def load(found):
    stage = BertStage(found.card, len(found.label_names), [(0, num_blocks(found.card))])
    initialize(stage, found.card, seed=0)
    load_weights(stage, found.weights(name for name, _ in stage.named_parameters()))
    return stage


def logits(stage):
    return stage(torch.arange(3, 18), PackedLayout(LENGTHS))


def oracle(model):
    parts = torch.arange(3, 18).split(LENGTHS)
    return torch.cat([model.eval()(part[None]).logits[0] for part in parts])


def test_a_token_classifier_of_transformers_gives_the_same_logits(directory):
    found = read_pretrained(directory)
    assert found.label_names == NAMES and not found.missing_head and not found.note
    expected = oracle(BertForTokenClassification.from_pretrained(directory))
    torch.testing.assert_close(logits(load(found)), expected, atol=1e-5, rtol=1e-5)


def test_rows_of_the_head_follow_the_order_of_the_data(directory):
    found = read_pretrained(directory, ["I-PER", "O", "B-PER"])
    assert found.label_names == ["I-PER", "O", "B-PER"] and not found.missing_head
    torch.testing.assert_close(logits(load(found)), logits(load(read_pretrained(directory)))[:, [2, 0, 1]])


def test_a_head_for_other_labels_starts_anew_and_says_so(directory):
    found = read_pretrained(directory, ["O", "B-LOC", "I-LOC", "B-ORG"])
    assert found.missing_head and "B-PER" in found.note
    assert set(found.weights(["classifier.weight", "bert.embeddings.LayerNorm.bias"])) == {
        "bert.embeddings.LayerNorm.bias"
    }
    assert logits(load(found)).shape == (15, 4)


@pytest.mark.parametrize("kind", [BertModel, BertForMaskedLM, BertForPreTraining, BertForSequenceClassification])
def test_other_bert_models_give_their_encoder_and_no_head(kind, tmp_path):
    model = kind(config())
    model.save_pretrained(tmp_path)
    found = read_pretrained(tmp_path, NAMES)
    assert found.missing_head and "no token classifier" in found.note
    encoder = model if kind is BertModel else model.bert
    for name, values in found.weights(parameter_shapes(found.card, 3)).items():
        assert torch.equal(values, encoder.get_parameter(name.removeprefix("bert.")))


def test_only_the_tensors_asked_for_are_read_and_come_as_float32(directory):
    edit_weights(directory, lambda tensors: tensors.update({name: each.bfloat16() for name, each in tensors.items()}))
    name = "bert.encoder.layer.1.output.dense.weight"
    weights = read_pretrained(directory).weights([name])
    assert list(weights) == [name] and weights[name].dtype == torch.float32
    assert torch.equal(weights[name], load_file(directory / "model.safetensors")[name].float())


def test_sharded_weights_equal_whole_ones(directory, tmp_path):
    parts = tmp_path / "parts"
    BertForTokenClassification.from_pretrained(directory).save_pretrained(parts, max_shard_size="5KB")
    assert len(list(parts.glob("*.safetensors"))) > 2
    assert torch.equal(logits(load(read_pretrained(parts))), logits(load(read_pretrained(directory))))


def test_legacy_names_and_old_buffers_are_understood(directory):
    before = logits(load(read_pretrained(directory)))

    def age(tensors):
        for name in list(tensors):
            old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            tensors[old] = tensors.pop(name)
        tensors["bert.embeddings.position_ids"] = torch.arange(20)[None]

    edit_weights(directory, age)
    assert torch.equal(logits(load(read_pretrained(directory))), before)


def test_missing_unexpected_and_misshapen_tensors_are_all_listed(directory):
    def damage(tensors):
        del tensors["bert.embeddings.LayerNorm.bias"], tensors["classifier.bias"]
        tensors["bert.encoder.layer.2.output.dense.bias"] = torch.zeros(16)
        tensors["bert.encoder.layer.0.output.dense.weight"] = torch.zeros(16, 16)
        tensors["bert.encoder.layer.0.output.dense.bias"] = torch.zeros(16, dtype=torch.int8)

    edit_weights(directory, damage)
    with pytest.raises(DataError) as caught:
        read_pretrained(directory)
    assert str(directory) in str(caught.value)
    for line in (
        "bert.embeddings.LayerNorm.bias: missing, should be [16]",
        "classifier.bias: missing, should be [3]",
        "bert.encoder.layer.2.output.dense.bias: unexpected",
        "bert.encoder.layer.0.output.dense.weight: found [16, 16], config.json asks for [16, 24]",
        "bert.encoder.layer.0.output.dense.bias: found dtype I8",
    ):
        assert f"\n  {line}" in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "roberta", "is_decoder": True}, "model_type is 'roberta'.*; is_decoder is True"),
        ({"position_embedding_type": "relative_key"}, "relative_key.*only 'absolute'"),
        ({"hidden_act": "silu", "num_attention_heads": 0}, "num_attention_heads: (.|\n)*hidden_act: .*silu"),
        ({"id2label": {"0": "O", "2": "B-PER"}}, "id2label"),
        ({"id2label": {"0": "O", "1": "B-PER", "2": "O"}}, "id2label"),
    ],
)
def test_a_config_that_is_not_a_bert_encoder_is_refused(directory, fields, words):
    edit_config(directory, **fields)
    with pytest.raises(DataError, match=words):
        read_pretrained(directory)


def test_pickled_weights_are_refused_with_the_command_that_converts_them(directory):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(DataError, match=r"pickles.*\n.*from_pretrained\('.*'\)\.save_pretrained\('.*'\)"):
        read_pretrained(directory)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_file_that_is_gone_or_cut_off_is_named(directory, file, damage):
    path = directory / file
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=file.replace(".", r"\.")):
        read_pretrained(directory)


def test_an_index_that_points_out_of_the_directory_or_at_nothing_is_refused(directory):
    (directory / "model.safetensors").rename(directory / "model-00001-of-00001.safetensors")
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"classifier.bias": "../model.safetensors"}}))
    with pytest.raises(DataError, match="a file of this directory"):
        read_pretrained(directory)
    index.write_text(json.dumps({"weight_map": {"nothing": "model-00001-of-00001.safetensors"}}))
    with pytest.raises(DataError, match=r"nothing \(model-00001"):
        read_pretrained(directory)


def test_case_comes_from_the_tokenizer_s_configuration(directory):
    assert read_pretrained(directory).card.do_lower_case
    (directory / "tokenizer_config.json").write_text('{"do_lower_case": false, "unk_token": "[UNK]"}')
    assert not read_pretrained(directory).card.do_lower_case


def test_two_labels_without_names_are_those_that_transformers_leaves_out(tmp_path):
    BertForTokenClassification(BertConfig(**SIZES)).save_pretrained(tmp_path)
    assert read_pretrained(tmp_path).label_names == ["LABEL_0", "LABEL_1"]


def test_what_is_written_loads_in_transformers_with_no_key_missing_or_left_over(tmp_path):
    card = ModelCard(**SIZES, hidden_act="gelu_new", classifier_dropout=0.2)
    stage = BertStage(card, 3, [(0, num_blocks(card))])
    initialize(stage, card, seed=0)
    write_pretrained(tmp_path / "out", card, NAMES, dict(stage.named_parameters()))
    model, report = AutoModelForTokenClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    assert model.config.id2label == dict(enumerate(NAMES)) and model.config.label2id["B-PER"] == 1
    torch.testing.assert_close(logits(stage), oracle(model), atol=1e-5, rtol=1e-5)
    found = read_pretrained(tmp_path / "out", NAMES)
    assert found.card == card and sorted(file.name for file in found.directory.iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    assert torch.equal(logits(load(found)), logits(stage))


def test_parameters_that_are_views_of_one_buffer_can_be_written(tmp_path):
    card = ModelCard(**SIZES)
    shapes = parameter_shapes(card, 3)
    buffer = torch.arange(sum(torch.Size(shape).numel() for shape in shapes.values()), dtype=torch.float32)
    views, start = {}, 0
    for name, shape in shapes.items():
        views[name] = buffer[start : start + torch.Size(shape).numel()].view(shape)
        start += views[name].numel()
    write_pretrained(tmp_path, card, NAMES, views)
    assert all(torch.equal(values, views[name]) for name, values in read_pretrained(tmp_path).weights(shapes).items())
