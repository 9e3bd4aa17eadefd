from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpitrain import sections
from mpitrain.pipeline import schedule
from mpitrain.pipeline.draw import text
from mpitrain.pipeline.messages import program, with_messages
from mpitrain.pipeline.prove import Times, play
from mpitrain.pipeline.schedule import SCHEDULES, Instruction, Kind, in_turn

COMPUTE = (Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT)
DRAWN = {"gpipe": (3, 4), "1f1b": (3, 4), "zb-h1": (3, 4), "interleaved": (2, 4), "zb-v": (2, 4)}


def programs(name: str, num_stages: int, num_micro_batches: int, train: bool = True) -> list[tuple[Instruction, ...]]:
    found = SCHEDULES[name](num_stages, 2)
    return [program(found, stage, num_micro_batches, train=train) for stage in range(num_stages)]


def picture(name: str, num_stages: int, num_micro_batches: int, train: bool = True) -> str:
    told, placement = programs(name, num_stages, num_micro_batches, train), SCHEDULES[name](num_stages, 2).placement
    times = Times() if placement.num_chunks == 1 or not train else Times(1, 2, 1)
    proof = play(told, num_micro_batches, placement=placement, times=times, train=train)
    return "".join(f"    {line}\n" for line in text(proof, placement).splitlines())


def test_the_names_are_those_of_the_configuration():
    assert set(SCHEDULES) == set(sections.SCHEDULES)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_pictures_in_the_documentation_are_what_the_schedules_do(name):
    after_name = schedule.__doc__.split(f"\n{name}: ")[1]
    assert picture(name, *DRAWN[name]) == after_name.split("\n\n", 2)[1] + "\n"


def test_1f1b_with_fewer_micro_batches_than_stages_starts_like_gpipe():
    drawn = ["01........aa.bb", ".01.....aa.bb..", "..01..aa.bb....", "...0aa1bb......"]
    assert picture("1f1b", 4, 2) == "".join(f"    stage {stage}  {line}\n" for stage, line in enumerate(drawn))


def test_evaluation_is_a_staircase():
    assert picture("gpipe", 2, 4, train=False) == "    stage 0  0123.\n    stage 1  .0123\n"


def test_a_middle_stage_posts_ahead_receives_computes_and_sends():
    found = SCHEDULES["gpipe"](3, 2)
    told = [str(step) for step in with_messages(found.forward_order(1, 2), 1, found.placement)]
    assert told == [
        "post activation 0",
        "receive activation 0",
        "post activation 1",
        "forward 0",
        "send activation 0",
        "receive activation 1",
        "forward 1",
        "send activation 1",
        "drain",
    ]


def test_the_last_stage_turns_each_activation_into_a_gradient():
    told = [str(step) for step in programs("1f1b", 2, 1)[1]]
    assert told == ["post activation 0", "receive activation 0", "forward 0", "backward 0", "send gradient 0", "drain"]


def test_the_turn_of_a_v_needs_no_messages():
    told = [str(step) for step in programs("zb-v", 2, 1)[1]]
    assert told == [
        "post activation 0",
        "post gradient 0 of chunk 1",
        "receive activation 0",
        "forward 0",
        "forward 0 of chunk 1",
        "send activation 0 of chunk 1",
        "receive gradient 0 of chunk 1",
        "backward input 0 of chunk 1",
        "backward weight 0 of chunk 1",
        "backward input 0",
        "send gradient 0",
        "backward weight 0",
        "drain",
    ]


@pytest.mark.parametrize("name", SCHEDULES)
def test_one_stage_sends_nothing(name):
    assert {step.kind for step in programs(name, 1, 5)[0]} <= {*COMPUTE, Kind.DRAIN}


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_replica_without_micro_batches_only_drains(name, train):
    assert programs(name, 3, 0, train) == [(Instruction(Kind.DRAIN, -1),)] * 3


@given(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 8), st.integers(0, 20), st.data())
def test_messages_leave_the_order_of_compute_as_it_is(name, num_stages, num_micro_batches, data):
    stage = data.draw(st.integers(0, num_stages - 1))
    found = SCHEDULES[name](num_stages, 2)
    order = found.order(stage, num_micro_batches)
    told = with_messages(order, stage, found.placement)
    assert [step for step in told if step.kind in COMPUTE] == order


@given(st.sampled_from(sorted(SCHEDULES)), st.integers(2, 8), st.integers(1, 20))
def test_exactly_one_receive_is_posted_ahead_for_each_chunk_and_direction(name, num_stages, num_micro_batches):
    for told in programs(name, num_stages, num_micro_batches):
        for post, receive in [("post activation", "receive activation"), ("post gradient", "receive gradient")]:
            for chunk in (0, 1):
                steps = [s.kind.value for s in told if s.kind.value in (post, receive) and s.chunk == chunk]
                assert steps == [post, *[receive, post] * (num_micro_batches - 1), receive] or steps == []


def test_the_interleaved_placement_goes_round_and_that_of_a_v_comes_back():
    assert in_turn(3, 2).places == ((0, 3), (1, 4), (2, 5))
    assert SCHEDULES["zb-v"](3, 2).placement.places == ((0, 5), (1, 4), (2, 3))
