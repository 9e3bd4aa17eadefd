"""Schedules as data: the order in which a stage computes, and one pass that adds the messages to any order.

Three stages, four micro-batches; time runs to the right, 0123 are forwards, abcd their backwards (twice as long):

gpipe: all forwards, then all backwards (Huang et al. 2019, "GPipe", section 2.2). Every micro-batch is kept alive.

    stage 0  0123......aabbccdd
    stage 1  .0123...aabbccdd..
    stage 2  ..0123aabbccdd....

1f1b: one forward, one backward (Narayanan et al. 2019, "PipeDream", section 3.2, with the flush of Narayanan et al.
2021, "Megatron-LM", section 2.2.1). The same bubble, but stage s of S keeps at most S - s micro-batches alive.

    stage 0  012....aa3bb.cc.dd
    stage 1  .01..aa2bb3cc.dd..
    stage 2  ..0aa1bb2cc3dd....

An order of compute says nothing of messages: `with_messages` derives them, the same way for every schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """What a stage can be told to do. Activations come from the stage before, gradients from the stage after."""

    POST_ACTIVATION = "post activation"  # start a non-blocking receive
    POST_GRADIENT = "post gradient"
    RECEIVE_ACTIVATION = "receive activation"  # wait for the receive that was posted
    RECEIVE_GRADIENT = "receive gradient"
    FORWARD = "forward"
    BACKWARD = "backward"
    SEND_ACTIVATION = "send activation"  # start a non-blocking send
    SEND_GRADIENT = "send gradient"
    DRAIN = "drain"  # wait until all own sends are complete


@dataclass(frozen=True, slots=True)
class Instruction:
    """One thing to do, and for which micro-batch (numbered from 0 within the replica's step; -1 for DRAIN)."""

    kind: Kind
    micro_batch: int

    def __str__(self) -> str:
        return self.kind.value if self.kind is Kind.DRAIN else f"{self.kind.value} {self.micro_batch}"


Order = Callable[[int, int, int], list[Instruction]]


def _forwards(start: int, stop: int) -> list[Instruction]:
    return [Instruction(Kind.FORWARD, micro_batch) for micro_batch in range(start, stop)]


def _backwards(start: int, stop: int) -> list[Instruction]:
    return [Instruction(Kind.BACKWARD, micro_batch) for micro_batch in range(start, stop)]


def forward_only(stage: int, num_stages: int, num_micro_batches: int) -> list[Instruction]:
    """Order of compute for evaluation: every forward, no backward."""
    return _forwards(0, num_micro_batches)


def gpipe(stage: int, num_stages: int, num_micro_batches: int) -> list[Instruction]:
    """All forwards, then all backwards: the order of compute of one stage (Huang et al. 2019, section 2.2)."""
    return _forwards(0, num_micro_batches) + _backwards(0, num_micro_batches)


def one_f_one_b(stage: int, num_stages: int, num_micro_batches: int) -> list[Instruction]:
    """Warm-up forwards, then one forward and one backward in turn, then the backwards that are left.

    The warm-up fills the stages that come after this one (Narayanan et al. 2021, section 2.2.1).
    """
    num_warm_up = min(num_stages - 1 - stage, num_micro_batches)
    num_pairs = num_micro_batches - num_warm_up
    order = _forwards(0, num_warm_up)
    for pair in zip(_forwards(num_warm_up, num_micro_batches), _backwards(0, num_pairs), strict=True):
        order.extend(pair)
    return order + _backwards(num_pairs, num_micro_batches)


SCHEDULES: dict[str, Order] = {"gpipe": gpipe, "1f1b": one_f_one_b}


@dataclass(frozen=True)
class _Messages:
    """The messages that belong to one kind of compute; None where the pipeline has no neighbour."""

    post: Kind | None
    receive: Kind | None
    send: Kind | None


def with_messages(compute: Sequence[Instruction], stage: int, num_stages: int) -> tuple[Instruction, ...]:
    """Insert the messages that an order of compute needs on this stage.

    In each direction one receive is always posted ahead: the first before anything is computed, the next as soon as
    the one before it has arrived. So a neighbour's send meets its receive even where MPI buffers nothing.
    """
    first, last = stage == 0, stage == num_stages - 1
    messages = {
        Kind.FORWARD: _Messages(
            post=None if first else Kind.POST_ACTIVATION,
            receive=None if first else Kind.RECEIVE_ACTIVATION,
            send=None if last else Kind.SEND_ACTIVATION,
        ),
        Kind.BACKWARD: _Messages(
            post=None if last else Kind.POST_GRADIENT,
            receive=None if last else Kind.RECEIVE_GRADIENT,
            send=None if first else Kind.SEND_GRADIENT,
        ),
    }
    posts = {
        kind: iter([Instruction(found.post, step.micro_batch) for step in compute if step.kind is kind and found.post])
        for kind, found in messages.items()
    }
    program = [post for queue in posts.values() if (post := next(queue, None))]
    for step in compute:
        found = messages[step.kind]
        if found.receive:
            program.append(Instruction(found.receive, step.micro_batch))
            program.extend([post] if (post := next(posts[step.kind], None)) else [])
        program.append(step)
        if found.send:
            program.append(Instruction(found.send, step.micro_batch))
    return (*program, Instruction(Kind.DRAIN, -1))


def program(
    name: str, stage: int, num_stages: int, num_micro_batches: int, *, train: bool = True
) -> tuple[Instruction, ...]:
    """All that one stage does in one step (`train`) or in one pass of evaluation; no micro-batches: just DRAIN.

    `name` is a key of SCHEDULES; `num_micro_batches` is that of the stage's own replica.
    """
    order = SCHEDULES[name] if train else forward_only
    return with_messages(order(stage, num_stages, num_micro_batches), stage, num_stages)
