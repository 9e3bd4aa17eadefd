"""From an order of compute to a program: the messages that a stage exchanges, put in where they belong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mpitrain.pipeline.schedule import Instruction, Kind, Placement, Schedule


@dataclass(frozen=True)
class _Messages:
    """Those of one direction, and whence they come: the step to the chunk before or after in the model."""

    post: Kind
    receive: Kind
    send: Kind
    source: int


ACTIVATIONS = _Messages(Kind.POST_ACTIVATION, Kind.RECEIVE_ACTIVATION, Kind.SEND_ACTIVATION, -1)
GRADIENTS = _Messages(Kind.POST_GRADIENT, Kind.RECEIVE_GRADIENT, Kind.SEND_GRADIENT, 1)
OF_COMPUTE = {Kind.FORWARD: ACTIVATIONS, Kind.BACKWARD: GRADIENTS, Kind.BACKWARD_INPUT: GRADIENTS}


def with_messages(compute: Sequence[Instruction], stage: int, placement: Placement) -> tuple[Instruction, ...]:
    """Insert the messages that an order of compute needs on this stage; none between chunks of the same stage.

    For each chunk and direction one receive is always posted ahead: the first before anything is computed, the next as
    soon as the one before it has arrived. So a neighbour's send meets its receive even where MPI buffers nothing.
    """

    def passes(step: Instruction, direction: int) -> bool:
        neighbour = placement.neighbour(stage, step.chunk, direction)
        return neighbour is not None and neighbour[0] != stage

    posts: dict[tuple[Kind, int], list[Instruction]] = {}
    for step in reversed(compute):
        found = OF_COMPUTE.get(step.kind)
        if found and passes(step, found.source):
            queue = posts.setdefault((found.post, step.chunk), [])
            queue.append(Instruction(found.post, step.micro_batch, step.chunk))
    program = [queue.pop() for queue in reversed(posts.values())]
    for step in compute:
        found = OF_COMPUTE.get(step.kind)
        if found and passes(step, found.source):
            program.append(Instruction(found.receive, step.micro_batch, step.chunk))
            if queue := posts[found.post, step.chunk]:
                program.append(queue.pop())
        program.append(step)
        if found and passes(step, -found.source):
            program.append(Instruction(found.send, step.micro_batch, step.chunk))
    return (*program, Instruction(Kind.DRAIN, -1))


def program(schedule: Schedule, stage: int, num_micro_batches: int, *, train: bool = True) -> tuple[Instruction, ...]:
    """All that one stage does in one step (`train`) or in one pass of evaluation; no micro-batches: just DRAIN.

    `num_micro_batches` is that of the stage's own replica.
    """
    order = schedule.order if train else schedule.forward_order
    return with_messages(order(stage, num_micro_batches), stage, schedule.placement)
