import math
from itertools import pairwise

import pytest
import torch

from mpitrain import shelf
from mpitrain.errors import DataError, UsageError
from mpitrain.model.bert import BertStage, num_blocks, parameter_shapes
from mpitrain.model.card import ModelCard, load_card, resolve_model

NAMES = sorted(file.stem for place in shelf.shelves("models") for file in place.glob("*.toml"))
GOOD = "hidden_size = 8\nnum_hidden_layers = 1\nnum_attention_heads = 2\nintermediate_size = 16\n"


def test_the_shelf_holds_the_cards_that_the_readme_promises():
    readme = (shelf.shelves("models")[-1] / "README.md").read_text()
    assert len(NAMES) == 10
    assert all(f"`{name}`" in readme for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_stages", [1, 2, 4])
def test_every_card_cuts_into_stages_that_hold_each_parameter_once(name, num_stages):
    card = load_card(name)
    cuts = [num_blocks(card) * stage // num_stages for stage in range(num_stages + 1)]
    with torch.device("meta"):
        stages = [BertStage(card, 9, [cut]) for cut in pairwise(cuts)]
    names = [name for stage in stages for name, _ in stage.named_parameters()]
    assert names == list(parameter_shapes(card, 9))


@pytest.mark.parametrize(
    ("name", "millions"),
    [("bert-tiny", 4.4), ("bert-mini", 11.2), ("bert-base-uncased", 109.5), ("bert-large-cased", 333.6)],
)
def test_cards_have_the_published_number_of_parameters(name, millions):
    card = load_card(name)
    pooler = card.hidden_size * (card.hidden_size + 1)  # counted by the papers, of no use here
    total = sum(math.prod(shape) for shape in parameter_shapes(card, 0).values()) + pooler
    assert total / 1e6 == pytest.approx(millions, abs=0.06)


def test_all_mistakes_of_a_card_are_reported_at_once(tmp_path):
    path = tmp_path / "wrong.toml"
    path.write_text('hidden_size = -8\nnum_attention_heads = "two"\nhidden_act = "swish"\nlayers = 3\n')
    with pytest.raises(UsageError) as caught:
        load_card(path)
    lines = str(caught.value).splitlines()
    fields = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "layers")
    assert all(sum(f"{path}: {field}:" in line for line in lines) == 1 for field in fields)
    assert "-8" in lines[0] and "is missing" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("num_attention_heads = 3", "3 does not divide hidden_size = 8"),
        ("hidden_dropout_prob = 1.0", "less than 1"),
        ("layer_norm_eps = 0", "greater than 0"),
        ("hidden_size = = 8", "TOML"),
    ],
)
def test_a_card_that_makes_no_sense_is_refused(tmp_path, change, words):
    field = change.split()[0]
    path = tmp_path / "card.toml"
    path.write_text("".join(line for line in GOOD.splitlines(True) if not line.startswith(field)) + change)
    with pytest.raises(UsageError, match=words):
        load_card(path)


def test_a_name_is_a_card_a_directory_with_a_config_is_a_directory(tmp_path):
    (tmp_path / "mine.toml").write_text(GOOD)
    (tmp_path / "config.json").write_text("{}")
    assert isinstance(resolve_model("bert-base-cased"), ModelCard)
    assert resolve_model(tmp_path / "mine.toml") == ModelCard(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    assert resolve_model(tmp_path) == tmp_path


def test_a_directory_without_a_config_is_bad_data(tmp_path):
    with pytest.raises(DataError, match=r"found no config\.json"):
        resolve_model(tmp_path)


def test_a_hub_name_is_answered_with_the_command_that_fetches_it():
    with pytest.raises(UsageError, match=r"hf download google-bert/bert-base-cased --local-dir \./bert-base-cased\n"):
        resolve_model("google-bert/bert-base-cased")
    with pytest.raises(UsageError, match=r"names there are: .*bert-mini(.|\n)*hf download bert-minni"):
        resolve_model("bert-minni")
    with pytest.raises(UsageError, match="bert-mini") as caught:
        resolve_model("/no/such/place/at all")
    assert "hf download" not in str(caught.value)
