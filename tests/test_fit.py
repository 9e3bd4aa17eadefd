"""Where no mesh is asked for: what has room, with as few stages as will do, then shared layers, never across nodes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small import small_card

from mpitrain import config
from mpitrain.arrange import arrange
from mpitrain.errors import UsageError
from mpitrain.fit import Room, block_sizes, most_kept, need_of, state_bytes
from mpitrain.model.bert import parameter_shapes
from mpitrain.pipeline.schedule import SCHEDULES
from mpitrain.runtime.memory import group_limits

CARD = small_card(hidden_size=64, num_hidden_layers=16, num_attention_heads=4, intermediate_size=256, vocab_size=500)
MUCH = 1 << 50


def arranged(num_ranks: int, *flags: str, num_bytes: int = MUCH, nodes=None, card=CARD):
    room = Room(num_bytes, nodes or [0] * num_ranks)
    found = arrange(num_ranks, config.load(flags), card, 9, room=room, length=20.0)
    return found.data, found.pipe, found.tensor


def need(data: int, pipe: int, tensor: int, *flags: str) -> int:
    """Bytes that are expected of a mesh."""
    settings = config.load(flags)
    shape = ("--mesh.data", str(data), "--mesh.pipe", str(pipe), "--mesh.tensor", str(tensor))
    found = arrange(data * pipe * tensor, config.load([*shape, *flags]), CARD, 9)
    return need_of(CARD, settings, 9, found.stages, found.schedule, data, tensor, 20.0).expected


def test_the_less_memory_there_is_the_more_stages_and_then_shared_layers():
    assert arranged(8) == (4, 2, 1)
    assert arranged(8, num_bytes=need(4, 2, 1)) == (4, 2, 1)
    assert need(2, 4, 1) < need(4, 2, 1)
    assert arranged(8, num_bytes=need(4, 2, 1) - 1) == (2, 4, 1)
    least = arranged(8, num_bytes=need(2, 4, 1) - 1)
    assert least[2] == 2 and need(*least) < need(2, 4, 1)
    assert arranged(8, "--mesh.data", "auto", "--mesh.pipe", "auto", "--mesh.tensor", "auto") == (4, 2, 1)


@pytest.mark.parametrize("nodes", [[0, 1] * 4, [0, 0, 0, 1, 1, 1, 1, 1]])
def test_layers_are_not_shared_across_nodes_unless_that_is_asked_for(nodes):
    tight = need(2, 4, 1) - 1
    assert arranged(8, num_bytes=tight, nodes=[0] * 4 + [1] * 4)[2] == 2
    assert arranged(8, num_bytes=tight, nodes=nodes)[2] == 1
    with pytest.raises(UsageError, match=r"different nodes .of .*ranks.; .* or --mesh.tensor_across_nodes true"):
        arranged(8, "--mesh.tensor", "2", nodes=nodes)
    assert arranged(8, "--mesh.tensor", "2", "--mesh.tensor_across_nodes", "true", nodes=nodes) == (4, 1, 2)


def test_where_not_even_the_program_has_room_the_mesh_is_the_usual_one():
    tiny = small_card()
    assert arranged(8, num_bytes=1 << 28, card=tiny) == arranged(8, card=tiny) == (4, 2, 1)


def test_what_was_asked_for_is_not_changed_for_want_of_room():
    tight = need(2, 4, 1) - 1
    assert arranged(8, "--mesh.pipe", "2", num_bytes=tight) == (4, 2, 1)
    assert arranged(8, "--mesh.tensor", "4", num_bytes=tight)[2] == 4


def test_a_model_that_no_mesh_has_room_for_is_refused_with_the_arithmetic():
    with pytest.raises(
        UsageError, match=r"mesh: 1 data x 1 pipe: .* take 0.\d+ GiB of a rank, which may use 0.000977 GiB"
    ):
        arranged(1, num_bytes=1 << 20)


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--mesh.tensor", "3"], r"the model has 4; 1, 2, 4 would work"),
        (["--mesh.tensor", "8"], r"the model has 4; 1, 2, 4 would work"),
        (["--mesh.tensor", "2", "--train.reproducible", "true"], "use --mesh.tensor 1"),
        (["--mesh.tensor", "16"], "1 data x 1 pipe x 16 tensor = 16, but there are 8 ranks; tensor may be 1, 2, 4, 8"),
        (["--mesh.tensor", "2", "--mesh.data", "8"], "8 data x 1 pipe x 2 tensor = 16, but there are 8 ranks; with 2"),
    ],
)
def test_groups_that_do_not_fit_are_refused(flags, problem):
    card = CARD.model_copy(update={"num_attention_heads": 16}) if "16" in flags else CARD
    with pytest.raises(UsageError, match=problem):
        arranged(8, *flags, card=card, nodes=[0] * 8)


def test_reproducible_sums_never_share_layers():
    assert arranged(8, "--train.reproducible", "true", num_bytes=need(2, 4, 1) - 1)[2] == 1


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_blocks_have_the_parameters_of_the_model(tensor):
    whole = sum(len(range(n)) for n in block_sizes(CARD, 9))
    shapes = parameter_shapes(CARD, 9)
    assert whole == sum(s[0] * (s[1] if len(s) > 1 else 1) for s in shapes.values())
    assert whole / tensor <= sum(block_sizes(CARD, 9, tensor)) < 1.1 * whole / tensor


@given(st.integers(1, 10**9), st.integers(1, 64))
def test_state_is_sixteen_bytes_a_parameter_alone_and_eight_for_endless_replicas(count, data):
    assert state_bytes(count, 1, "fp32") == state_bytes(count, 1, "bf16") + 2 * count - 4 * count == 16 * count
    assert state_bytes(count, data, "fp32") == 8 * count + 8 * count // data
    assert state_bytes(count, 1, "fp32", sharing=2) == 14 * count


@pytest.mark.parametrize(("name", "kept"), [("gpipe", 8), ("1f1b", 4), ("interleaved", 11), ("zb-h1", 4), ("zb-v", 8)])
def test_the_first_of_four_stages_keeps_as_many_passes_as_its_schedule_says(name, kept):
    assert most_kept(SCHEDULES[name](4, 2).order(0, 8)) == kept


@pytest.mark.parametrize("flag", ["--train.recompute", "--train.precision", "--train.micro_batches"])
def test_what_takes_less_memory_is_expected_to(flag):
    less = {"--train.recompute": "block", "--train.precision": "bf16", "--train.micro_batches": "16"}[flag]
    big = ("--train.batch_size", "512")
    assert need(1, 1, 1, *big, flag, less) < need(1, 1, 1, *big)


def test_a_control_group_limits_memory(tmp_path):
    told, root = tmp_path / "told", tmp_path / "root"
    for place, limit in [("memory.max", "max"), ("job/memory.max", "5000"), ("job/step/memory.max", "9000")]:
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        (root / place).write_text(limit + "\n")
    told.write_text("0::/job/step\n")
    assert min(group_limits(told, root)) == 5000
    (root / "memory" / "job").mkdir(parents=True)
    (root / "memory" / "job" / "memory.limit_in_bytes").write_text("700\n")
    told.write_text("7:cpu,cpuacct:/job\n3:memory:/job\n")
    assert min(group_limits(told, root)) == 700
    assert min(group_limits(tmp_path / "none", root)) == 1 << 62
