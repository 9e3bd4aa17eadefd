"""Carry out a stage's instructions: compute, post, receive, send; the schedule decides, nothing is decided here.

One tensor crosses a stage border, [num_rows, hidden_size], in a shape that both sides know from the plan: no shape
messages. The tag is 2 x micro-batch + direction. A sent activation is waited for before its backward pass (its
gradient can only come after it arrived), sent gradients at the end of the step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from mpitrain.comm.buffers import Parcel, Transport
from mpitrain.model.attention import PackedLayout
from mpitrain.model.bert import BertStage, token_loss
from mpitrain.model.dropout import KeyedDropout
from mpitrain.pipeline.schedule import Instruction, Kind
from mpitrain.runtime.mesh import Mesh

ACTIVATION, GRADIENT = 0, 1  # what enters a stage from the one before and from the one behind


@dataclass(frozen=True)
class MicroBatch:
    """What a stage knows of one micro-batch.

    Attributes:
        layout: lengths of its packed sequences, and which tokens are wanted.
        tokens: int64 [num_tokens], on the first stage.
        labels: int64 [num_wanted], -100 where ignored, on the last stage.
        dropout: keyed random numbers, None in evaluation.
    """

    layout: PackedLayout
    tokens: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    dropout: KeyedDropout | None = None


@dataclass
class _Flight:
    """What a stage holds of a micro-batch between its instructions."""

    arriving: list[Parcel | None] = field(default_factory=lambda: [None, None])
    leaving: list[Parcel | None] = field(default_factory=lambda: [None, None])
    inputs: torch.Tensor | None = None
    outputs: torch.Tensor | None = None
    gradient: torch.Tensor | None = None


class Executor:
    """One stage at work."""

    def __init__(self, stage: BertStage, mesh: Mesh, transport: Transport, hidden_size: int) -> None:
        """Run `stage` at this rank's place on the pipe axis."""
        self._stage = stage
        self._mesh = mesh
        self._transport = transport
        self._hidden_size = hidden_size
        self._micro_batches: Sequence[MicroBatch] = ()
        self._flights: list[_Flight] = []
        self._losses: list[torch.Tensor] = []
        self._num_labelled = 1
        self._loss_scale = 1.0
        self._before_last_backward: Callable[[], None] = lambda: None
        self._after_backward: Callable[[], None] = lambda: None
        self.seconds_waited = 0.0
        self._carry_out: dict[Kind, Callable[[int], None]] = {
            Kind.POST_ACTIVATION: lambda m: self._post(m, ACTIVATION),
            Kind.POST_GRADIENT: lambda m: self._post(m, GRADIENT),
            Kind.RECEIVE_ACTIVATION: lambda m: self._receive(m, ACTIVATION),
            Kind.RECEIVE_GRADIENT: lambda m: self._receive(m, GRADIENT),
            Kind.FORWARD: self._forward,
            Kind.BACKWARD: self._backward,
            Kind.SEND_ACTIVATION: lambda m: self._send(m, ACTIVATION),
            Kind.SEND_GRADIENT: lambda m: self._send(m, GRADIENT),
            Kind.DRAIN: lambda m: self._drain(),
        }

    def train(
        self,
        program: Sequence[Instruction],
        micro_batches: Sequence[MicroBatch],
        *,
        num_labelled: int,
        loss_scale: float,
        before_last_backward: Callable[[], None],
        after_backward: Callable[[], None],
    ) -> float:
        """Forward and backward of all micro-batches; gradients appear in `parameter.grad`.

        Returns:
            This stage's share of the batch's loss: non-zero on the last stage only.
        """
        self._num_labelled, self._loss_scale = num_labelled, loss_scale
        self._before_last_backward, self._after_backward = before_last_backward, after_backward
        self._losses = []
        self._run(program, micro_batches)
        return float(torch.stack(self._losses).double().sum()) if self._losses else 0.0

    @torch.no_grad()
    def infer(self, program: Sequence[Instruction], micro_batches: Sequence[MicroBatch]) -> list[torch.Tensor]:
        """Logits [num_wanted, num_labels] of each micro-batch on the last stage, else an empty list."""
        self._run(program, micro_batches)
        return [flight.outputs for flight in self._flights if flight.outputs is not None] if self._mesh.is_last else []

    def _run(self, program: Sequence[Instruction], micro_batches: Sequence[MicroBatch]) -> None:
        self._micro_batches = micro_batches
        self._flights = [_Flight() for _ in micro_batches]
        self._backwards_left = sum(instruction.kind is Kind.BACKWARD for instruction in program)
        self.seconds_waited = 0.0
        for instruction in program:
            self._carry_out[instruction.kind](instruction.micro_batch)

    def _post(self, number: int, direction: int) -> None:
        shape = (self._stage.rows(self._micro_batches[number].layout)[direction], self._hidden_size)
        source = self._mesh.previous_stage if direction == ACTIVATION else self._mesh.next_stage
        dtype = next(self._stage.parameters()).dtype
        parcel = self._transport.post(self._mesh.pipe_axis, shape, dtype, source, 2 * number + direction)
        self._flights[number].arriving[direction] = parcel

    def _receive(self, number: int, direction: int) -> None:
        flight = self._flights[number]
        began = time.perf_counter()
        parcel = flight.arriving[direction]
        assert parcel is not None
        tensor = parcel.received()
        flight.arriving[direction] = None
        self.seconds_waited += time.perf_counter() - began
        if direction == ACTIVATION:
            flight.inputs = tensor.requires_grad_(torch.is_grad_enabled())
        else:
            flight.gradient = tensor

    def _forward(self, number: int) -> None:
        flight, batch = self._flights[number], self._micro_batches[number]
        inputs = batch.tokens if self._mesh.is_first else flight.inputs
        assert inputs is not None
        flight.outputs = self._stage(inputs, batch.layout, batch.dropout)
        if self._mesh.is_last and torch.is_grad_enabled():
            assert batch.labels is not None
            flight.outputs = token_loss(flight.outputs, batch.labels, self._num_labelled)
            self._losses.append(flight.outputs.detach())

    def _backward(self, number: int) -> None:
        flight = self._flights[number]
        self._settle(flight, ACTIVATION)
        self._backwards_left -= 1
        if self._backwards_left == 0:
            self._before_last_backward()
        assert flight.outputs is not None
        outputs = flight.outputs * self._loss_scale if self._mesh.is_last else flight.outputs
        torch.autograd.backward(outputs, flight.gradient)
        flight.gradient = flight.inputs.grad if flight.inputs is not None else None
        flight.inputs = flight.outputs = None
        self._after_backward()

    def _send(self, number: int, direction: int) -> None:
        flight = self._flights[number]
        tensor = flight.outputs if direction == ACTIVATION else flight.gradient
        target = self._mesh.next_stage if direction == ACTIVATION else self._mesh.previous_stage
        assert tensor is not None
        parcel = self._transport.send(self._mesh.pipe_axis, tensor.detach(), target, 2 * number + direction)
        flight.leaving[direction] = parcel

    def _drain(self) -> None:
        for flight in self._flights:
            for direction in (ACTIVATION, GRADIENT):
                self._settle(flight, direction)

    def _settle(self, flight: _Flight, direction: int) -> None:
        parcel = flight.leaving[direction]
        if parcel is not None:
            began = time.perf_counter()
            parcel.sent()
            self.seconds_waited += time.perf_counter() - began
            flight.leaving[direction] = None
