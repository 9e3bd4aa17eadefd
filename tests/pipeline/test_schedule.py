from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpitrain.pipeline import schedule
from mpitrain.pipeline.prove import Proof, play
from mpitrain.pipeline.schedule import SCHEDULES, Instruction, Kind, forward_only, program, with_messages

COMPUTE = (Kind.FORWARD, Kind.BACKWARD)


def picture(proof: Proof) -> str:
    """One line per stage, one column per unit of time; 0 is a forward, a its backward."""
    lines = []
    for stage, spans in enumerate(proof.spans):
        line = ["."] * round(proof.makespan)
        for span in spans:
            first = "0" if span.instruction.kind is Kind.FORWARD else "a"
            for column in range(round(span.start), round(span.stop)):
                line[column] = chr(ord(first) + span.instruction.micro_batch)
        lines.append(f"    stage {stage}  {''.join(line)}\n")
    return "".join(lines)


def programs(name: str, num_stages: int, num_micro_batches: int, train: bool = True) -> list[tuple[Instruction, ...]]:
    return [program(name, stage, num_stages, num_micro_batches, train=train) for stage in range(num_stages)]


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_pictures_in_the_documentation_are_what_the_schedules_do(name):
    after_name = schedule.__doc__.split(f"\n{name}: ")[1]
    assert picture(play(programs(name, 3, 4), 4)) in after_name.split("\n\n", 2)[1] + "\n"


def test_1f1b_with_fewer_micro_batches_than_stages_starts_like_gpipe():
    drawn = ["01........aa.bb", ".01.....aa.bb..", "..01..aa.bb....", "...0aa1bb......"]
    drawn = "".join(f"    stage {stage}  {line}\n" for stage, line in enumerate(drawn))
    assert picture(play(programs("1f1b", 4, 2), 2)) == drawn


def test_evaluation_is_a_staircase():
    drawn = "    stage 0  0123.\n    stage 1  .0123\n"
    assert picture(play(programs("gpipe", 2, 4, train=False), 4, train=False)) == drawn


def test_a_middle_stage_posts_ahead_receives_computes_and_sends():
    told = [str(step) for step in with_messages(forward_only(1, 3, 2), 1, 3)]
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
    told = [str(step) for step in program("1f1b", 1, 2, 1)]
    assert told == ["post activation 0", "receive activation 0", "forward 0", "backward 0", "send gradient 0", "drain"]


@pytest.mark.parametrize("name", SCHEDULES)
def test_one_stage_sends_nothing(name):
    assert {step.kind for step in program(name, 0, 1, 5)} == {*COMPUTE, Kind.DRAIN}


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_replica_without_micro_batches_only_drains(name, train):
    assert programs(name, 3, 0, train) == [(Instruction(Kind.DRAIN, -1),)] * 3


@given(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 8), st.integers(0, 20), st.data())
def test_messages_leave_the_order_of_compute_as_it_is(name, num_stages, num_micro_batches, data):
    stage = data.draw(st.integers(0, num_stages - 1))
    order = SCHEDULES[name](stage, num_stages, num_micro_batches)
    told = with_messages(order, stage, num_stages)
    assert [step for step in told if step.kind in COMPUTE] == order


@given(st.sampled_from(sorted(SCHEDULES)), st.integers(2, 8), st.integers(1, 20))
def test_exactly_one_receive_is_posted_ahead_in_each_direction(name, num_stages, num_micro_batches):
    for told in programs(name, num_stages, num_micro_batches):
        for post, receive in [("post activation", "receive activation"), ("post gradient", "receive gradient")]:
            steps = [step.kind.value for step in told if step.kind.value in (post, receive)]
            assert steps == [post, *[receive, post] * (num_micro_batches - 1), receive] or steps == []
