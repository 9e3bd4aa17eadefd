from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpitrain.pipeline.messages import program
from mpitrain.pipeline.prove import Proof, ScheduleError, Times, play
from mpitrain.pipeline.schedule import SCHEDULES, Instruction, Kind, Schedule, in_turn, one_f_one_b

KINDS = [*SCHEDULES, "evaluation"]


def found(name: str, num_stages: int, num_chunks: int = 2) -> Schedule:
    return SCHEDULES["1f1b" if name == "evaluation" else name](num_stages, num_chunks)


def programs(name: str, num_stages: int, num_micro_batches: int) -> list[tuple[Instruction, ...]]:
    schedule, train = found(name, num_stages), name != "evaluation"
    return [program(schedule, stage, num_micro_batches, train=train) for stage in range(num_stages)]


def played(name: str, num_stages: int, count: int, told=None, **keywords) -> Proof:
    told = told or programs(name, num_stages, count)
    placement = found(name, num_stages).placement
    return play(told, count, placement=placement, train=name != "evaluation", **keywords)


def edited(name: str, stage: int, change, num_stages: int = 3, num_micro_batches: int = 4):
    """The programs of a schedule, with one stage's list of instructions changed in place by `change`."""
    told = programs(name, num_stages, num_micro_batches)
    steps = list(told[stage])
    change(steps)
    told[stage] = tuple(steps)
    return told


IDLE = {  # of a stage, in forwards of a chunk, from how many micro-batches on, for S stages
    "gpipe": (lambda stages: 3 * (stages - 1), lambda stages, count: count > 0),
    "1f1b": (lambda stages: 3 * (stages - 1), lambda stages, count: count > 0),
    "zb-h1": (lambda stages: stages - 1, lambda stages, count: count >= stages),
    "interleaved": (lambda stages: 3 * (stages - 1), lambda stages, count: count and count % stages == 0),
    "zb-v": (lambda stages: stages - 1, lambda stages, count: count >= 2 * stages - 1),
    "evaluation": (lambda stages: stages - 1, lambda stages, count: count > 0),
}
PEAKS = {  # chunks of micro-batches alive on a stage, at most
    "gpipe": lambda stage, stages, count: count,
    "1f1b": lambda stage, stages, count: min(count, stages - stage),
    "zb-h1": lambda stage, stages, count: min(count, stages),
    "interleaved": lambda stage, stages, count: min(2 * count, 3 * stages - 2 * stage - 1),
    "zb-v": lambda stage, stages, count: min(2 * count, 2 * stages),
    "evaluation": lambda stage, stages, count: 0,
}


@pytest.mark.parametrize("blocking_sends", [True, False])
@pytest.mark.parametrize("num_stages", range(1, 17))
@pytest.mark.parametrize("name", KINDS)
def test_no_schedule_deadlocks_and_memory_and_bubble_are_as_published(name, num_stages, blocking_sends):
    idle, holds = IDLE[name]
    for count in [*range(10), 15, 16, 17, 2 * num_stages - 1, 2 * num_stages, 31, 63, 64]:
        proof = played(name, num_stages, count, blocking_sends=blocking_sends)
        peaks = [PEAKS[name](stage, num_stages, count) for stage in range(num_stages)]
        assert all(found <= peak for found, peak in zip(proof.peak_live, peaks, strict=True))
        assert count < 2 * num_stages or max(proof.peak_live) == max(peaks)
        work = count * len(found(name, num_stages).placement.places[0]) * (1 if name == "evaluation" else 3)
        assert proof.makespan <= work + 3 * count * (num_stages - 1) + 3 * num_stages
        if holds(num_stages, count):
            assert proof.makespan == work + idle(num_stages)
            assert proof.bubble == pytest.approx(idle(num_stages) / proof.makespan)


@pytest.mark.parametrize("num_chunks", [3, 4])
def test_more_chunks_make_the_bubble_smaller(num_chunks):
    for num_stages in (2, 4, 7):
        schedule = found("interleaved", num_stages, num_chunks)
        told = [program(schedule, stage, 2 * num_stages) for stage in range(num_stages)]
        proof = play(told, 2 * num_stages, placement=schedule.placement)
        assert proof.makespan == 3 * num_chunks * 2 * num_stages + 3 * (num_stages - 1)


@given(st.sampled_from(KINDS), st.integers(1, 5), st.integers(1, 6), st.booleans(), st.data())
def test_any_single_deletion_is_caught(name, num_stages, count, blocking_sends, data):
    stage = data.draw(st.integers(0, num_stages - 1))
    length = len(programs(name, num_stages, count)[stage])
    position = data.draw(st.integers(0, length - 1))
    told = edited(name, stage, lambda steps: steps.pop(position), num_stages, count)
    with pytest.raises(ScheduleError):
        played(name, num_stages, count, told, blocking_sends=blocking_sends)


@given(st.sampled_from(KINDS), st.integers(1, 5), st.integers(1, 6), st.data())
def test_any_instruction_told_twice_is_caught(name, num_stages, count, data):
    stage = data.draw(st.integers(0, num_stages - 1))
    steps = [step for step in programs(name, num_stages, count)[stage] if step.kind is not Kind.DRAIN]
    step = data.draw(st.sampled_from(steps))
    told = edited(name, stage, lambda steps: steps.insert(steps.index(step), step), num_stages, count)
    with pytest.raises(ScheduleError):
        played(name, num_stages, count, told)


def post_when_needed(steps):
    """Move every POST to just before its RECEIVE: right only where MPI buffers what nobody asked for yet."""
    for step in [step for step in steps if step.kind.value.startswith("post")]:
        steps.remove(step)
        receive = Kind(step.kind.value.replace("post", "receive"))
        steps.insert(steps.index(Instruction(receive, step.micro_batch)), step)


def test_a_program_that_relies_on_buffered_sends_deadlocks_and_the_error_names_who_waits_where():
    told = edited("1f1b", 0, post_when_needed, num_stages=2)
    told[1] = edited("1f1b", 1, post_when_needed, num_stages=2)[1]
    play(told, 4, blocking_sends=False)
    problem = (
        "deadlock: stage 0 waits at 'send activation 1'; stage 1 waits at 'send gradient 0'; "
        "in a circle: stage 0 waits for stage 1 waits for stage 0"
    )
    with pytest.raises(ScheduleError, match=problem):
        play(told, 4)


def swap(first: str, second: str):
    def change(steps):
        names = [str(step) for step in steps]
        one, two = names.index(first), names.index(second)
        steps[one], steps[two] = steps[two], steps[one]

    return change


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (swap("receive activation 0", "forward 0"), "'forward 0' comes before its activation"),
        (swap("receive gradient 0", "backward 0"), "'backward 0' comes before its gradient"),
        (swap("forward 0", "send activation 0"), "'send activation 0' comes before 'forward 0'"),
        (swap("backward 3", "send gradient 3"), "'send gradient 3' comes before 'backward 3'"),
        (swap("post activation 0", "receive activation 0"), "'receive activation 0' was not posted before"),
        (swap("send gradient 3", "drain"), "does not end with 'drain'"),
        (lambda steps: steps.append(Instruction(Kind.FORWARD, 4)), "'forward 4' is not part of this step"),
        (lambda steps: steps.insert(0, Instruction(Kind.POST_ACTIVATION, 7)), "activation 7 to stage 1"),
    ],
)
def test_what_is_out_of_order_is_named(change, problem):
    with pytest.raises(ScheduleError, match=problem):
        play(edited("1f1b", 1, change), 4)


def test_a_backward_before_its_own_forward_is_caught():
    with pytest.raises(ScheduleError, match="'backward 0' comes before 'forward 0'"):
        play(edited("1f1b", 0, swap("forward 0", "backward 0"), num_stages=1), 4)


def test_a_message_to_nobody_is_caught():
    told = edited("gpipe", 2, lambda steps: steps.insert(-1, Instruction(Kind.SEND_ACTIVATION, 0)))
    with pytest.raises(ScheduleError, match="'send activation 0' has no neighbour: there are 3 stages"):
        play(told, 4)


def test_stages_that_expect_different_numbers_of_micro_batches_are_caught():
    told = [programs("1f1b", 2, 4)[0], programs("1f1b", 2, 3)[1]]
    with pytest.raises(ScheduleError, match="stage 1: never computed: backward 3, forward 3"):
        play(told, 4)
    silent = tuple(step for step in told[1] if step != Instruction(Kind.SEND_GRADIENT, 2))
    with pytest.raises(ScheduleError, match=r"stage 0 waits at 'receive gradient 2'; stage 1 has come to its end"):
        play([programs("1f1b", 2, 3)[0], silent], 3)


def test_stages_that_follow_different_schedules_are_caught():
    told = [programs("1f1b", 2, 4)[0], programs("gpipe", 2, 4)[1]]
    with pytest.raises(ScheduleError, match="deadlock"):
        play(told, 4)


def test_the_slowest_stage_sets_the_pace():
    proof = play(programs("1f1b", 3, 10), 10, times=Times([1, 4, 1], [2, 8, 2]))
    assert proof.busy == [30, 120, 30]
    assert proof.makespan == 120 + 1 + 2
    assert proof.bubble == pytest.approx(1 - 60 / proof.makespan)


def starts_before_a_slow_stage(told, **keywords):
    """When stage 0 starts its forwards, with a second stage that is four times as slow."""
    proof = play(told, 4, train=False, times=Times([1, 4]), **keywords)
    return [span.start for span in proof.spans[0]]


def test_a_blocking_send_holds_its_stage_until_the_receive_is_posted():
    told = programs("evaluation", 2, 4)
    assert starts_before_a_slow_stage(told) == [0, 1, 2, 5]
    assert starts_before_a_slow_stage(told, blocking_sends=False) == [0, 1, 2, 3]


def test_a_drain_holds_its_stage_until_all_its_sends_have_met_their_receives():
    drain = Instruction(Kind.DRAIN, -1)
    told = edited("evaluation", 0, lambda steps: steps.insert(steps.index(Instruction(Kind.FORWARD, 3)), drain), 2, 4)
    assert starts_before_a_slow_stage(told, blocking_sends=False) == [0, 1, 2, 5]


def test_both_schedules_take_equally_long_when_stages_are_equal():
    for count in range(1, 12):
        pace = [play(programs(name, 4, count), count).makespan for name in ("gpipe", "1f1b")]
        assert pace[0] == pace[1] == 3 * (count + 3)


def test_the_warm_up_is_as_short_as_the_stages_behind_allow():
    firsts = [[step.kind for step in one_f_one_b(stage, 4, 9)].index(Kind.BACKWARD) for stage in range(4)]
    assert firsts == [4, 3, 2, 1]


@pytest.mark.parametrize(
    ("steps", "problem"),
    [
        ("FIBW", "'backward 0' was computed before"),
        ("FBW", "'backward weight 0' was computed before"),
        ("FWI", "'backward weight 0' comes before 'backward input 0'"),
        ("FI", "never computed: backward weight 0"),
        ("IFW", "'backward input 0' comes before 'forward 0'"),
    ],
)
def test_a_backward_is_whole_or_in_two_halves(steps, problem):
    kinds = {"F": Kind.FORWARD, "B": Kind.BACKWARD, "I": Kind.BACKWARD_INPUT, "W": Kind.BACKWARD_WEIGHT}
    told = [(*(Instruction(kinds[step], 0) for step in steps), Instruction(Kind.DRAIN, -1))]
    with pytest.raises(ScheduleError, match=problem):
        play(told, 1)


def test_a_chunk_needs_the_one_before_it_on_the_same_stage():
    told = [(Instruction(Kind.FORWARD, 0, 1), Instruction(Kind.FORWARD, 0), Instruction(Kind.DRAIN, -1))]
    with pytest.raises(ScheduleError, match="'forward 0 of chunk 1' comes before 'forward 0'"):
        play(told, 1, placement=in_turn(1, 2), train=False)
