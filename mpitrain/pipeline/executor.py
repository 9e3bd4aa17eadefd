"""Carry out a stage's instructions: compute, post, receive, send; the schedule decides, nothing is decided here.

One tensor crosses a border between chunks, [num_rows, hidden_size], in a shape that both sides know from the plan: no
shape messages; between chunks of one stage it is handed over. The tag is that of micro-batch, receiving chunk and
direction. A sent activation is waited for before its backward pass (its gradient can only come after it arrived), sent
gradients at the end of the step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from mpitrain.comm.buffers import Parcel, Transport
from mpitrain.model.bert import BertStage, token_loss
from mpitrain.model.dropout import KeyedDropout
from mpitrain.model.layout import PackedLayout
from mpitrain.model.linear import postponed
from mpitrain.model.tensor_parallel import gather
from mpitrain.observe.trace import Trace, now
from mpitrain.pipeline.messages import program
from mpitrain.pipeline.schedule import Instruction, Kind, Schedule
from mpitrain.runtime.failpoints import reach
from mpitrain.runtime.mesh import Mesh
from mpitrain.runtime.notes import State, note

COMPUTE = {Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT}
POSTS = {Kind.POST_ACTIVATION, Kind.POST_GRADIENT}
ACTIVATION, GRADIENT = 0, 1  # what enters a chunk from the one before and from the one behind
PARTNERS = {  # direction of a message, and whether it is sent
    Kind.RECEIVE_ACTIVATION: (ACTIVATION, False),
    Kind.RECEIVE_GRADIENT: (GRADIENT, False),
    Kind.SEND_ACTIVATION: (ACTIVATION, True),
    Kind.SEND_GRADIENT: (GRADIENT, True),
}
WORDS = {kind: kind.value.encode() for kind in Kind}


@dataclass(frozen=True)
class MicroBatch:
    """What a stage knows of one micro-batch.

    Attributes:
        layout: lengths of its packed sequences, and which tokens are wanted.
        tokens: int64 [num_tokens], on the stage that has the embeddings.
        labels: int64 [own rows of num_wanted], -100 where ignored, on the stage that has the head.
        dropout: keyed random numbers, None in evaluation.
    """

    layout: PackedLayout
    tokens: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    dropout: KeyedDropout | None = None


@dataclass
class _Flight:
    """What a stage holds of a micro-batch in one of its chunks between its instructions."""

    arriving: list[Parcel | None] = field(default_factory=lambda: [None, None])
    leaving: list[Parcel | None] = field(default_factory=lambda: [None, None])
    inputs: torch.Tensor | None = None
    outputs: torch.Tensor | None = None
    gradient: torch.Tensor | None = None
    for_weights: list[Callable[[], None]] = field(default_factory=list)

    def made(self, direction: int) -> torch.Tensor:
        """What the chunk has computed for the next one; a gradient is given away, outputs wait for their backward."""
        tensor = self.outputs if direction == ACTIVATION else self.gradient
        assert tensor is not None
        if direction == GRADIENT:
            self.gradient = None
        return tensor.detach()

    def take(self, direction: int, tensor: torch.Tensor) -> None:
        """What has come, from wherever."""
        if direction == ACTIVATION:
            self.inputs = tensor.requires_grad_(torch.is_grad_enabled())
        else:
            self.gradient = tensor


class Executor:
    """One stage at work."""

    def __init__(self, stage: BertStage, mesh: Mesh, transport: Transport, schedule: Schedule) -> None:
        """Run `stage` at this rank's place on the pipe axis."""
        self.stage = stage
        self._mesh = mesh
        self._transport = transport
        self._schedule = schedule
        self._places = schedule.placement.places[mesh.stage]
        self._micro_batches: Sequence[MicroBatch] = ()
        self._flights: list[list[_Flight]] = []  # by chunk and micro-batch
        self._losses: list[torch.Tensor] = []
        self._num_labelled = 1
        self._loss_scale = 1.0
        self._after_backward: Callable[[], None] = lambda: None
        self.seconds_waited = self.seconds_computed = 0.0
        self.trace: Trace | None = None
        self._carry_out: dict[Kind, Callable[[int, int], None]] = {
            Kind.POST_ACTIVATION: partial(self._post, ACTIVATION),
            Kind.POST_GRADIENT: partial(self._post, GRADIENT),
            Kind.RECEIVE_ACTIVATION: partial(self._receive, ACTIVATION),
            Kind.RECEIVE_GRADIENT: partial(self._receive, GRADIENT),
            Kind.FORWARD: self._forward,
            Kind.BACKWARD: self._backward,
            Kind.BACKWARD_INPUT: self._backward_input,
            Kind.BACKWARD_WEIGHT: self._backward_weight,
            Kind.SEND_ACTIVATION: partial(self._send, ACTIVATION),
            Kind.SEND_GRADIENT: partial(self._send, GRADIENT),
            Kind.DRAIN: lambda chunk, number: self._drain(),
        }

    def train(
        self,
        micro_batches: Sequence[MicroBatch],
        *,
        num_labelled: int,
        loss_scale: float,
        after_backward: Callable[[], None],
    ) -> float:
        """Forward and backward of all micro-batches; gradients appear in `parameter.grad`.

        Returns:
            This stage's share of the batch's loss: zero unless it holds the head.
        """
        self._num_labelled, self._loss_scale, self._after_backward = num_labelled, loss_scale, after_backward
        self._losses = []
        self._run(micro_batches, train=True)
        return float(torch.stack(self._losses).double().sum()) if self._losses else 0.0

    @torch.no_grad()
    def infer(self, micro_batches: Sequence[MicroBatch]) -> list[torch.Tensor]:
        """Logits [num_wanted, num_labels] of each micro-batch if the stage holds the head, else an empty list."""
        self._run(micro_batches, train=False)
        own = [flight.outputs for flight in self._flights[-1] if flight.outputs is not None]
        rows = [batch.layout.num_wanted for batch in micro_batches]
        group = self.stage.group
        return [gather(*each, group) for each in zip(own, rows, strict=True)] if self.stage.has_head else []

    def _run(self, micro_batches: Sequence[MicroBatch], *, train: bool) -> None:
        self._micro_batches = micro_batches
        self._flights = [[_Flight() for _ in micro_batches] for _ in self._places]
        self.seconds_waited = self.seconds_computed = 0.0
        for instruction in program(self._schedule, self._mesh.stage, len(micro_batches), train=train):
            self._note(instruction)
            began, began_to_compute = now(), time.thread_time()
            self._carry_out[instruction.kind](instruction.chunk, instruction.micro_batch)
            if instruction.kind in COMPUTE:  # without what other ranks take of a core that they share
                self.seconds_computed += time.thread_time() - began_to_compute
            if self.trace is not None and instruction.kind not in POSTS:
                self._record(self.trace, instruction, began)

    def _note(self, instruction: Instruction) -> None:
        peer, state = -1, State.MOVING
        if instruction.kind in COMPUTE and self._mesh.num_tensor == 1:  # else it waits for others in between
            state = State.WORKING
        if instruction.kind in PARTNERS:
            direction, sending = PARTNERS[instruction.kind]
            peer = self._mesh.rank_of(self._neighbour(instruction.chunk, direction, sending=sending)[0])
        note(WORDS[instruction.kind], instruction.micro_batch, peer, instruction.chunk, state)

    @staticmethod
    def _record(trace: Trace, instruction: Instruction, began: int) -> None:
        category = "compute" if instruction.kind in COMPUTE else "message"
        number, chunk, kind = instruction.micro_batch, instruction.chunk, instruction.kind.value
        trace.add(str(instruction), category, began, micro_batch=number, chunk=chunk, kind=kind)

    def _neighbour(self, chunk: int, direction: int, *, sending: bool) -> tuple[int, int]:
        """(stage, chunk) that a message goes to or comes from."""
        onward = sending == (direction == ACTIVATION)
        found = self._schedule.placement.neighbour(self._mesh.stage, chunk, 1 if onward else -1)
        assert found is not None
        return found

    def _tag(self, direction: int, number: int, receiving_chunk: int) -> int:
        return 2 * (number * self._schedule.placement.num_chunks + receiving_chunk) + direction

    def _post(self, direction: int, chunk: int, number: int) -> None:
        shape = (
            self.stage.rows(self._micro_batches[number].layout, chunk)[direction],
            self.stage.card.hidden_size,
        )
        source, _ = self._neighbour(chunk, direction, sending=False)
        dtype = next(self.stage.parameters()).dtype
        parcel = self._transport.post(self._mesh.pipe_axis, shape, dtype, source, self._tag(direction, number, chunk))
        self._flights[chunk][number].arriving[direction] = parcel

    def _receive(self, direction: int, chunk: int, number: int) -> None:
        flight = self._flights[chunk][number]
        began = time.perf_counter()
        parcel = flight.arriving[direction]
        assert parcel is not None
        tensor = parcel.received()
        flight.arriving[direction] = None
        self.seconds_waited += time.perf_counter() - began
        flight.take(direction, tensor)

    def _forward(self, chunk: int, number: int) -> None:
        reach("forward")
        flight, batch, place = self._flights[chunk][number], self._micro_batches[number], self._places[chunk]
        inputs = batch.tokens if place == 0 else flight.inputs
        assert inputs is not None
        flight.outputs = self.stage(inputs, batch.layout, batch.dropout, chunk)
        if self._ends(chunk):
            if torch.is_grad_enabled():
                assert batch.labels is not None
                flight.outputs = token_loss(flight.outputs, batch.labels, self._num_labelled)
                self._losses.append(flight.outputs.detach())
        else:
            self._hand_over(ACTIVATION, chunk, number)

    def _ends(self, chunk: int) -> bool:
        return self._schedule.placement.neighbour(self._mesh.stage, chunk, 1) is None

    def _hand_over(self, direction: int, chunk: int, number: int) -> None:
        """What a chunk has made to the next one, if that is on this stage."""
        stage, other = self._neighbour(chunk, direction, sending=True)
        if stage == self._mesh.stage:
            self._flights[other][number].take(direction, self._flights[chunk][number].made(direction))

    def _backward(self, chunk: int, number: int) -> None:
        reach("backward")
        flight = self._flights[chunk][number]
        self._settle(flight, ACTIVATION)
        assert flight.outputs is not None
        outputs = flight.outputs * self._loss_scale if self._ends(chunk) else flight.outputs
        torch.autograd.backward(outputs, flight.gradient)
        flight.gradient = flight.inputs.grad if flight.inputs is not None else None
        flight.inputs = flight.outputs = None
        if self._places[chunk] > 0:
            self._hand_over(GRADIENT, chunk, number)
        self._after_backward()

    def _backward_input(self, chunk: int, number: int) -> None:
        with postponed(self._flights[chunk][number].for_weights):
            self._backward(chunk, number)

    @torch.no_grad()
    def _backward_weight(self, chunk: int, number: int) -> None:
        work = self._flights[chunk][number].for_weights
        while work:
            work.pop(0)()  # in the order of the backward pass, in which buckets fill

    def _send(self, direction: int, chunk: int, number: int) -> None:
        flight = self._flights[chunk][number]
        target, other = self._neighbour(chunk, direction, sending=True)
        tag = self._tag(direction, number, other)
        flight.leaving[direction] = self._transport.send(self._mesh.pipe_axis, flight.made(direction), target, tag)

    def _drain(self) -> None:
        for flights in self._flights:
            for flight in flights:
                for direction in (ACTIVATION, GRADIENT):
                    self._settle(flight, direction)

    def _settle(self, flight: _Flight, direction: int) -> None:
        parcel = flight.leaving[direction]
        if parcel is not None:
            began = time.perf_counter()
            parcel.sent()
            self.seconds_waited += time.perf_counter() - began
            flight.leaving[direction] = None
