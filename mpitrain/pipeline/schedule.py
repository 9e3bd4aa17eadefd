"""Schedules as data: which stage holds which part of the model, and the order in which it computes.

Time runs to the right; 0123 are forwards, abcd their backwards. A backward takes twice as long as a forward, or it is
cut in halves: abcd the gradients of inputs, which the stage before waits for, ABCD those of weights, which nobody does.

gpipe: all forwards, then all backwards (Huang et al. 2019, "GPipe", section 2.2). Every micro-batch is kept alive.

    stage 0  0123......aabbccdd
    stage 1  .0123...aabbccdd..
    stage 2  ..0123aabbccdd....

1f1b: one forward, one backward (Narayanan et al. 2019, "PipeDream", section 3.2, with the flush of Narayanan et al.
2021, "Megatron-LM", section 2.2.1). The same bubble, but stage s of S keeps at most S - s micro-batches alive.

    stage 0  012....aa3bb.cc.dd
    stage 1  .01..aa2bb3cc.dd..
    stage 2  ..0aa1bb2cc3dd....

zb-h1: 1f1b with backwards in halves; those of weights fill the gaps (Qi et al. 2024, "Zero Bubble Pipeline
Parallelism", section 2). A third of the bubble; no stage keeps more alive than the first one of 1f1b.

    stage 0  012..aA3bBcCdD
    stage 1  .01.a2bA3cBdCD
    stage 2  ..0a1b2cA3dBCD

interleaved: a stage holds several chunks of the model, in turn with the other stages, and micro-batches go round in
groups of as many as there are stages (Narayanan et al. 2021, section 2.2.2). Two chunks halve the bubble, and double
the messages; they are half as long. Below each stage, the number of its chunk.

    stage 0  01012.aa3bb2aa3bb.cc.ddccdd
             00110 11011100100 11 110000
    stage 1  .010aa1bb2aa3bb2cc3ddccdd..
              001111110000001111110000

zb-v: two chunks a stage, the second in reverse order of stages, so that the first stage has the loss and no gradient
waits to come home; backwards in halves (Qi et al. 2024, section 6).
Hardly any bubble from 2 S - 1 micro-batches on, and as much alive as the first stage of 1f1b keeps.

    stage 0  0120aA1bB3aA2cCbB3dDcCdD.
             000111111000111001110000
    stage 1  .0011aA2aA2bB3bB3cCcddCDD
              010111000111000111010010

An order of compute says nothing of messages: `messages.with_messages` derives them, the same way for every schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from itertools import chain


class Kind(Enum):
    """What a stage can be told to do. Activations come from the part of the model before, gradients from that after."""

    POST_ACTIVATION = "post activation"  # start a non-blocking receive
    POST_GRADIENT = "post gradient"
    RECEIVE_ACTIVATION = "receive activation"  # wait for the receive that was posted
    RECEIVE_GRADIENT = "receive gradient"
    FORWARD = "forward"
    BACKWARD = "backward"  # the same as both of these
    BACKWARD_INPUT = "backward input"
    BACKWARD_WEIGHT = "backward weight"
    SEND_ACTIVATION = "send activation"  # start a non-blocking send
    SEND_GRADIENT = "send gradient"
    DRAIN = "drain"  # wait until all own sends are complete


@dataclass(frozen=True, slots=True)
class Instruction:
    """One thing to do, and for which micro-batch (numbered from 0 within the replica's step; -1 for DRAIN) and chunk.

    The chunk is one of the stage's own: that which computes, sends or receives.
    """

    kind: Kind
    micro_batch: int
    chunk: int = 0

    def __str__(self) -> str:
        number = "" if self.kind is Kind.DRAIN else f" {self.micro_batch}"
        return f"{self.kind.value}{number}" + (f" of chunk {self.chunk}" if self.chunk else "")


@dataclass(frozen=True)
class Placement:
    """Which stage holds which chunks: for each stage their places in the model's order, ascending.

    Together they are 0, 1, ...; Megatron-LM calls them virtual stages.
    """

    places: tuple[tuple[int, ...], ...]

    @cached_property
    def holders(self) -> dict[int, tuple[int, int]]:
        """(stage, chunk) by place in the model."""
        return {place: (stage, chunk) for stage, places in enumerate(self.places) for chunk, place in enumerate(places)}

    @property
    def stages(self) -> list[int]:
        """The stage of each place."""
        return [self.holders[place][0] for place in range(len(self.holders))]

    @property
    def num_chunks(self) -> int:
        """Of the stage that has most."""
        return max(map(len, self.places))

    def neighbour(self, stage: int, chunk: int, step: int) -> tuple[int, int] | None:
        """(stage, chunk) of what comes after a chunk (`step` 1) or before it (-1); None at the ends of the model."""
        return self.holders.get(self.places[stage][chunk] + step)


def in_turn(num_stages: int, num_chunks: int) -> Placement:
    """Stage s holds places s, s + S, s + 2 S, ..."""
    return Placement(tuple(tuple(range(stage, num_stages * num_chunks, num_stages)) for stage in range(num_stages)))


def in_a_v(num_stages: int) -> Placement:
    """Down the stages and up again: the first stage holds both ends of the model."""
    return Placement(tuple((stage, 2 * num_stages - 1 - stage) for stage in range(num_stages)))


Order = Callable[[int, int], list[Instruction]]  # of stage and number of micro-batches: what it computes


@dataclass(frozen=True)
class Schedule:
    """A placement, and an order of compute for every stage of it."""

    name: str
    placement: Placement
    order: Order

    def forward_order(self, stage: int, num_micro_batches: int) -> list[Instruction]:
        """Order of compute for evaluation: no backward."""
        places = self.placement.places
        return only(
            num_micro_batches, _in_groups(Kind.FORWARD, len(places), num_micro_batches, range(len(places[stage])))
        )


def _forwards(start: int, stop: int) -> list[Instruction]:
    return [Instruction(Kind.FORWARD, micro_batch) for micro_batch in range(start, stop)]


def _backwards(start: int, stop: int) -> list[Instruction]:
    return [Instruction(Kind.BACKWARD, micro_batch) for micro_batch in range(start, stop)]


def _alternate(
    forwards: Sequence[Instruction], backwards: Sequence[Instruction], num_warm_up: int
) -> list[Instruction]:
    """Forwards to warm up, then one forward and one backward in turn, then the backwards that are left."""
    pairs = zip(forwards[num_warm_up:], backwards, strict=False)
    return [*forwards[:num_warm_up], *chain.from_iterable(pairs), *backwards[max(0, len(forwards) - num_warm_up) :]]


def gpipe(stage: int, num_stages: int, num_micro_batches: int) -> list[Instruction]:
    """All forwards, then all backwards: the order of compute of one stage (Huang et al. 2019, section 2.2)."""
    return _forwards(0, num_micro_batches) + _backwards(0, num_micro_batches)


def one_f_one_b(stage: int, num_stages: int, num_micro_batches: int) -> list[Instruction]:
    """The warm-up fills the stages that come after this one (Narayanan et al. 2021, section 2.2.1)."""
    forwards, backwards = _forwards(0, num_micro_batches), _backwards(0, num_micro_batches)
    return _alternate(forwards, backwards, num_stages - 1 - stage)


def zb_h1(stage: int, num_stages: int, num_micro_batches: int) -> list[Instruction]:
    """1F1B in halves; the halves for weights stay back by as many micro-batches as there are stages before this one."""
    order = []
    for step in one_f_one_b(stage, num_stages, num_micro_batches):
        if step.kind is Kind.FORWARD:
            order.append(step)
            continue
        order.append(Instruction(Kind.BACKWARD_INPUT, step.micro_batch))
        if step.micro_batch >= stage:
            order.append(Instruction(Kind.BACKWARD_WEIGHT, step.micro_batch - stage))
    left = range(max(0, num_micro_batches - stage), num_micro_batches)
    return order + [Instruction(Kind.BACKWARD_WEIGHT, micro_batch) for micro_batch in left]


def interleaved(stage: int, num_stages: int, num_micro_batches: int, num_chunks: int) -> list[Instruction]:
    """1F1B over chunks, a group of `num_stages` micro-batches after the other through each (section 2.2.2).

    A last group that is not full is computed as if it were, without what is not there.
    """
    forwards = _in_groups(Kind.FORWARD, num_stages, num_micro_batches, range(num_chunks))
    backwards = _in_groups(Kind.BACKWARD, num_stages, num_micro_batches, range(num_chunks)[::-1])
    num_warm_up = 2 * (num_stages - 1 - stage) + (num_chunks - 1) * num_stages
    return only(num_micro_batches, _alternate(forwards, backwards, num_warm_up))


def zb_v(stage: int, num_stages: int, num_micro_batches: int) -> list[Instruction]:
    """Warm up until the first gradient is there, then a forward and a whole backward of each chunk in turn, then drain.

    With less than 2 S - 1 micro-batches, as with so many, without what is not there.
    """
    total = max(num_micro_batches, 2 * num_stages - 1)
    order: list[Instruction] = []
    done: dict[tuple[Kind, int], int] = {}

    def add(kind: Kind, chunk: int) -> None:
        number = done.get((kind, chunk), 0)
        done[kind, chunk] = number + 1
        order.append(Instruction(kind, number, chunk))

    def add_backward(chunk: int) -> None:
        add(Kind.BACKWARD_INPUT, chunk)
        add(Kind.BACKWARD_WEIGHT, chunk)

    for _ in range(2 * (num_stages - stage) - 1):
        add(Kind.FORWARD, 0)
    for _ in range(stage):
        add(Kind.FORWARD, 1)
        add(Kind.FORWARD, 0)
    for _ in range(num_stages - stage):
        add(Kind.FORWARD, 1)
        add_backward(1)
    while done[Kind.FORWARD, 1] < total:
        if done[Kind.FORWARD, 0] < total:
            add(Kind.FORWARD, 0)
        add_backward(0)
        add(Kind.FORWARD, 1)
        add_backward(1)
    for _ in range(stage):
        add(Kind.BACKWARD_INPUT, 0)
        add(Kind.BACKWARD_INPUT, 1)
    for _ in range(num_stages - stage):
        add(Kind.BACKWARD_INPUT, 0)
        add(Kind.BACKWARD_WEIGHT, 0)
    for chunk in (1, 0):
        while done[Kind.BACKWARD_WEIGHT, chunk] < total:
            add(Kind.BACKWARD_WEIGHT, chunk)
    return only(num_micro_batches, order)


def _in_groups(kind: Kind, size: int, num_micro_batches: int, chunks: Sequence[int]) -> list[Instruction]:
    """Groups of `size` micro-batches, the last one as well, each through all chunks before the next."""
    groups = [range(start, start + size) for start in range(0, num_micro_batches, size)]
    return [Instruction(kind, number, chunk) for group in groups for chunk in chunks for number in group]


def only(num_micro_batches: int, order: Sequence[Instruction]) -> list[Instruction]:
    """What an order computes of the first micro-batches: who waits for whom among them stays the same."""
    return [step for step in order if step.micro_batch < num_micro_batches]


SCHEDULES: dict[
    str, Callable[[int, int], Schedule]
] = {  # of the number of stages, and of chunks where there is a choice
    "gpipe": lambda num_stages, _: _of_one_chunk("gpipe", num_stages, gpipe),
    "1f1b": lambda num_stages, _: _of_one_chunk("1f1b", num_stages, one_f_one_b),
    "zb-h1": lambda num_stages, _: _of_one_chunk("zb-h1", num_stages, zb_h1),
    "interleaved": lambda num_stages, num_chunks: Schedule(
        "interleaved",
        in_turn(num_stages, num_chunks),
        lambda stage, num_micro_batches: interleaved(stage, num_stages, num_micro_batches, num_chunks),
    ),
    "zb-v": lambda num_stages, _: Schedule(
        "zb-v", in_a_v(num_stages), lambda stage, num_micro_batches: zb_v(stage, num_stages, num_micro_batches)
    ),
}


def _of_one_chunk(name: str, num_stages: int, order: Callable[[int, int, int], list[Instruction]]) -> Schedule:
    return Schedule(
        name, in_turn(num_stages, 1), lambda stage, num_micro_batches: order(stage, num_stages, num_micro_batches)
    )
