"""What is foretold of a mesh follows from the machine's figures as one would do it by hand."""

from __future__ import annotations

from math import prod

import pytest

from mpitrain.arrange import arrange
from mpitrain.config import Config
from mpitrain.fit import block_sizes
from mpitrain.forecast import forecasts, step_terms
from mpitrain.machine import Load, Machine
from mpitrain.model.card import ModelCard
from mpitrain.model.cost import block_costs

CARD = ModelCard(
    vocab_size=1000,
    hidden_size=96,
    num_hidden_layers=12,
    num_attention_heads=4,
    intermediate_size=384,
    max_position_embeddings=128,
)
NUM_LABELS, LENGTH = 7, 25.0
MACHINE = Machine(
    ranks_per_node=8,
    processors_per_node=8,
    memory_gib_per_node=64,
    gflops=10,
    sharing_loss=0,
    step_ms=0,
    message_us=0,
    exchange_us=0,
    exchange_gb_per_second=1e9,
    sum_gb_per_second=2,
    update_mega_per_second=100,
    network_us=20,
    network_gb_per_second=1,
)
TOKENS = 32 * LENGTH  # of a step
FLOP = TOKENS * sum(block_costs(CARD, NUM_LABELS, LENGTH))


def a_config(data=None, pipe=None, tensor=None, **train) -> Config:
    return Config(mesh={"data": data, "pipe": pipe, "tensor": tensor}, train={"batch_size": 32, **train})


def terms_of(mesh: tuple[int, int, int], config: Config | None = None, micro_batches: int = 8, **changes):
    """On a machine with such changes."""
    config, num_ranks = config or a_config(*mesh, micro_batches=micro_batches), prod(mesh)
    found = arrange(num_ranks, config, CARD, NUM_LABELS)
    told = MACHINE.model_copy(update=changes)
    return step_terms(told, Load(num_ranks, 1000, LENGTH), config, CARD, NUM_LABELS, found)


def largest_of(stages) -> int:
    """Parameters of the largest one."""
    sizes = block_sizes(CARD, NUM_LABELS)
    return max(sum(sum(sizes[first:last]) for first, last in stage) for stage in stages)


def test_one_rank_computes_and_updates_all_by_itself():
    terms = terms_of((1, 1, 1), processors_per_node=1)
    assert terms["compute"] == pytest.approx(FLOP / 10e9)
    assert terms["update"] == pytest.approx(sum(block_sizes(CARD, NUM_LABELS)) / 100e6)
    assert [terms[name] for name in ("bubble", "messages", "reduce")] == pytest.approx([0, 0, 0])
    slower = terms_of((1, 1, 1), processors_per_node=1, step_ms=3)
    assert slower["update"] == pytest.approx(terms["update"] + 3e-3)


def test_what_is_not_kept_is_computed_again():
    """A forward pass more (Chen et al. 2016, section 4.1), which is a third of a step."""
    config = a_config(1, 1, 1, recompute="block")
    assert terms_of((1, 1, 1), config, processors_per_node=1)["compute"] == pytest.approx(4 / 3 * FLOP / 10e9)


def test_replicas_share_the_update_and_crowded_ones_take_turns():
    whole = sum(block_sizes(CARD, NUM_LABELS)) / 100e6
    assert terms_of((4, 1, 1))["update"] == pytest.approx(whole / 4)
    assert terms_of((4, 1, 1), processors_per_node=2)["update"] == pytest.approx(2 * whole / 4)


def test_the_largest_stage_is_waited_for():
    stages = arrange(2, a_config(1, 2, 1), CARD, NUM_LABELS).stages
    assert terms_of((1, 2, 1))["update"] == pytest.approx(largest_of(stages) / 100e6)


def test_a_rank_takes_the_processors_that_others_leave():
    assert terms_of((2, 1, 1))["compute"] == pytest.approx(FLOP / 2 / 40e9)
    assert terms_of((8, 1, 1))["compute"] == pytest.approx(FLOP / 8 / 10e9)


def test_more_ranks_than_processors_are_no_faster():
    few = terms_of((2, 1, 1), processors_per_node=2)
    assert terms_of((8, 1, 1), processors_per_node=2)["compute"] == pytest.approx(few["compute"])
    staged = terms_of((1, 4, 1), processors_per_node=1)
    assert staged["compute"] == pytest.approx(FLOP / 10e9)
    assert staged["bubble"] == pytest.approx(0), "who waits leaves the processor to others"


def test_the_replica_with_most_micro_batches_is_waited_for():
    assert terms_of((3, 1, 1), processors_per_node=3)["compute"] == pytest.approx(FLOP * 3 / 8 / 10e9)
    assert terms_of((3, 1, 1), processors_per_node=1)["compute"] == pytest.approx(FLOP / 10e9), "unless all take turns"


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_the_bubble_of_even_stages_is_the_one_in_the_books(micro_batches):
    """(p - 1) / (m + p - 1) of the time (Narayanan et al. 2021, section 2.2.1)."""
    config = a_config(1, 4, 1, micro_batches=micro_batches)
    found = arrange(4, config, CARD, NUM_LABELS)
    costs = block_costs(CARD, NUM_LABELS, LENGTH)
    stages = [sum(costs[first:last]) for ((first, last),) in found.stages]
    assert max(stages) < 1.1 * min(stages)
    terms = terms_of((1, 4, 1), micro_batches=micro_batches, processors_per_node=4)
    share = terms["bubble"] / (terms["bubble"] + terms["compute"])
    assert share == pytest.approx(3 / (micro_batches + 3), rel=0.05)


def test_gradients_are_summed_in_memory_then_around_a_ring_of_nodes():
    num_bytes = 4 * sum(block_sizes(CARD, NUM_LABELS))
    inside = num_bytes / 2e9
    assert terms_of((8, 1, 1))["reduce"] == pytest.approx(inside)
    buckets = max(1, round(num_bytes / 2**23))
    ring = 2 * 3 / 4 * num_bytes / 1e9 + buckets * 2 * 3 * 20e-6
    assert terms_of((32, 1, 1))["reduce"] == pytest.approx(inside + ring)
    alone = terms_of((4, 1, 1), ranks_per_node=1, processors_per_node=1)
    assert alone["reduce"] == pytest.approx(ring), "nothing is summed where there is one replica"
    assert terms_of((8, 1, 1), processors_per_node=2)["reduce"] == pytest.approx(4 * inside)
    assert terms_of((32, 1, 1), processors_per_node=2)["reduce"] == pytest.approx(4 * inside + ring)
    config = Config(train={"batch_size": 32}, comm={"wire_dtype": "bf16"})
    narrow = terms_of((4, 1, 1), config, ranks_per_node=1, processors_per_node=1, network_us=0)
    assert narrow["reduce"] == pytest.approx(2 * 3 / 4 * num_bytes / 2 / 1e9)


def test_stages_of_a_node_share_its_network():
    stages = arrange(4, a_config(2, 2, 1), CARD, NUM_LABELS).stages
    terms = terms_of((2, 2, 1), ranks_per_node=2, network_us=0)
    assert terms["reduce"] == pytest.approx(2 * 1 / 2 * 2 * 4 * largest_of(stages) / 1e9)


def test_ranks_that_share_layers_exchange_rows_eight_times_a_layer_and_micro_batch():
    still = terms_of((1, 1, 2))
    assert still["compute"] == pytest.approx(FLOP / 2 / 40e9)
    assert terms_of((1, 1, 2), sharing_loss=0.1)["compute"] == pytest.approx(1.1 * still["compute"])
    assert terms_of((1, 1, 4), sharing_loss=0.1)["compute"] == pytest.approx(1.3 * FLOP / 4 / 20e9)
    terms = terms_of((1, 1, 2), exchange_us=100, exchange_gb_per_second=1)
    row_bytes = TOKENS / 8 * 96 * 4
    assert terms["messages"] == pytest.approx(8 * 8 * (12 + 2) * (100e-6 + row_bytes / 1e9))


def test_a_message_between_stages_costs_what_it_does_in_a_node_or_between_nodes():
    passes = 2 * 8  # of each of two stages
    terms = terms_of((1, 2, 1), message_us=500)
    assert terms["messages"] == pytest.approx(passes * 500e-6)
    apart = terms_of((1, 2, 1), message_us=500, ranks_per_node=1, processors_per_node=1)
    assert apart["messages"] == pytest.approx(passes * (520e-6 + TOKENS / 8 * 96 * 4 / 1e9))
    # Each of a stage's ranks sends its rows, and both send over the network of their node.
    shared = terms_of((1, 2, 2), ranks_per_node=2, network_us=0)
    assert shared["messages"] == pytest.approx(passes * 2 * TOKENS / 2 / 8 * 96 * 4 / 1e9)


@pytest.mark.parametrize("num_ranks", [1, 6, 8, 14, 100_000])
def test_all_meshes_are_weighed_the_fastest_that_fits_first(num_ranks):
    config = a_config(micro_batches=64)
    found = forecasts(MACHINE, Load(num_ranks, 1000, LENGTH), config, CARD, NUM_LABELS)
    shapes = [(each.arrangement.data, each.arrangement.pipe, each.arrangement.tensor) for each in found]
    assert len(set(shapes)) == len(shapes) and all(prod(shape) == num_ranks for shape in shapes)
    assert all(shape[2] in (1, 2, 4) and shape[1] <= 14 for shape in shapes)
    if num_ranks == 14:
        assert (1, 14, 1) in shapes, "a stage of embeddings, of each layer, of the classifier"
    if num_ranks == 8:
        assert set(shapes) == {
            (8, 1, 1),
            (4, 2, 1),
            (4, 1, 2),
            (2, 4, 1),
            (2, 2, 2),
            (2, 1, 4),
            (1, 8, 1),
            (1, 4, 2),
            (1, 2, 4),
        }
    keys = [(not each.fits, each.seconds) for each in found]
    assert keys == sorted(keys) and min(each.seconds for each in found) > 0


def test_ranks_that_share_layers_are_on_one_node_unless_asked_for():
    load, told = Load(8, 1000, LENGTH), MACHINE.model_copy(update={"ranks_per_node": 2})
    widest = max(each.arrangement.tensor for each in forecasts(told, load, a_config(), CARD, NUM_LABELS))
    assert widest == 2
    uneven = MACHINE.model_copy(update={"ranks_per_node": 3})
    found = forecasts(uneven, Load(12, 1000, LENGTH), a_config(), CARD, NUM_LABELS)
    assert {each.arrangement.tensor for each in found} == {1}, "a group of 2 would be on two nodes"
    across = Config(mesh={"tensor_across_nodes": True})
    assert max(each.arrangement.tensor for each in forecasts(told, load, across, CARD, NUM_LABELS)) == 4


def test_a_mesh_without_room_comes_last_and_says_so():
    needs = [each.need.expected for each in forecasts(MACHINE, Load(8, 1000, LENGTH), a_config(), CARD, NUM_LABELS)]
    between = 8 * (min(needs) + max(needs)) / 2 / 2**30
    told = MACHINE.model_copy(update={"memory_gib_per_node": between})
    found = forecasts(told, Load(8, 1000, LENGTH), a_config(), CARD, NUM_LABELS)
    fits = [each.fits for each in found]
    assert True in fits and False in fits and fits == sorted(fits, reverse=True)
    assert all((each.need.expected <= between * 2**30 / 8) == each.fits for each in found)


def test_node_hours_are_those_of_all_nodes_for_an_epoch():
    (found,) = forecasts(MACHINE, Load(16, 3169, LENGTH), a_config(16, 1, 1, micro_batches=16), CARD, NUM_LABELS)
    assert found.node_hours == pytest.approx(100 * found.seconds * 2 / 3600)
