"""One optimisation step: run the schedule, reduce, vote, clip, update."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from mpitrain.comm import tree
from mpitrain.comm.exchange import Exchange
from mpitrain.comm.reducer import GradientReducer
from mpitrain.dataset.batches import Indices, StepPlan, pad_lengths, wanted_tokens
from mpitrain.dataset.sequences import Sequences
from mpitrain.drift import DriftCheck, raise_together
from mpitrain.model.bert import IGNORED_LABEL
from mpitrain.model.dropout import KeyedDropout
from mpitrain.model.layout import PackedLayout
from mpitrain.model.tensor_parallel import own_rows, sum_in_place
from mpitrain.observe.trace import Trace
from mpitrain.optim import LossScale, ShardedAdamW, learning_rate_at
from mpitrain.pipeline.executor import Executor, MicroBatch
from mpitrain.runtime.agree import collect, everyone, total
from mpitrain.runtime.failpoints import reach
from mpitrain.runtime.memory import peak_memory
from mpitrain.runtime.mesh import Mesh
from mpitrain.runtime.notes import begin_step, note
from mpitrain.sections import Train

Question = Callable[[], bool]
PAD = 0  # a token that every vocabulary has; what becomes of it has no part in the loss


def never() -> bool:
    """No."""
    return False


class Shares(NamedTuple):
    """What each rank tells of its part of a step, [ranks] each.

    Attributes:
        work: seconds of its own work, waiting for others left out; that of the update before this one.
        passes: seconds of its passes, waiting for the stages beside it left out.
        pipeline_wait: seconds of this waiting.
        memory: `peak_memory` so far.
    """

    work: NDArray[np.float64]
    passes: NDArray[np.float64]
    pipeline_wait: NDArray[np.float64]
    memory: NDArray[np.float64]


@dataclass(frozen=True)
class StepResult:
    """What a step did; the same on every rank but for `seconds`.

    Attributes:
        loss: mean cross entropy over the labelled tokens of the whole batch.
        grad_norm: global norm before clipping.
        updated: False if a gradient was not finite and all ranks skipped the update together.
        stop: some rank was asked to stop.
        ready: all ranks were.
        shares: of the ranks.
        seconds: of this rank, by part of the step; `tensor`, in messages of its tensor group, is a part of
            `forward_backward`, `copy` and `gather` are parts of `update`; `reduce_hidden` ran beside others.
        wire_errors: by stage and bucket, the norm of all rounding errors on the wire by that of the sum; empty if
            nothing is rounded; NaN where sums are not finite.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    updated: bool
    stop: bool
    ready: bool
    shares: Shares
    seconds: dict[str, float]
    wire_errors: list[list[float]]


class Stepper:
    """Everything of a rank that a step needs; `close` gives it back."""

    def __init__(
        self,
        mesh: Mesh,
        executor: Executor,
        exchange: Exchange,
        optimizer: ShardedAdamW,
        *,
        options: Train,
        num_steps: int,
        peak_learning_rate: float,
        check_every: int = 0,
    ) -> None:
        """Train for `num_steps` steps in all; see `DriftCheck` for `check_every`."""
        self.mesh = mesh
        self.executor = executor
        self.exchange = exchange
        self.reducer = GradientReducer(
            exchange, reproducible=options.reproducible, sum_shared=partial(sum_in_place, executor.stage.group)
        )
        self.optimizer = optimizer
        self.options = options
        self.num_steps = num_steps
        self.peak_learning_rate = peak_learning_rate
        self.loss_scale = LossScale(options.precision)
        self.drift = DriftCheck(mesh, executor.stage, optimizer, check_every)
        self.trace = None
        self.num_updates = 0
        self.skipped_in_a_row = 0
        self._seconds_updating = 0.0  # in the last step, waiting for copies and for others' weights left out

    @property
    def trace(self) -> Trace | None:
        """Where all that is done is recorded, by executor and reducer too, if anywhere."""
        return self._trace

    @trace.setter
    def trace(self, trace: Trace | None) -> None:
        self._trace = self.executor.trace = self.reducer.trace = trace

    def load(self, plan: StepPlan, split: Sequences) -> list[MicroBatch]:
        """This replica's share of a step, with what this stage needs of it."""
        stage, device, loaded = self.executor.stage, self.exchange.transport.device, []
        share = plan.share(self.mesh.replica, self.mesh.num_replicas, reproducible=self.options.reproducible)
        for number in share:
            reach("data")
            sequences = plan.micro_batches[number]
            lengths = pad_lengths(split.index.lengths[sequences])
            num_tokens = int(lengths.sum())
            wanted = wanted_tokens(_read(split, "word_starts", sequences, num_tokens, 0) == 1)
            tokens = _read(split, "tokens", sequences, num_tokens, PAD) if stage.has_embeddings else None
            mine = wanted[own_rows(len(wanted), stage.group)]
            labels = _read(split, "labels", sequences, num_tokens, IGNORED_LABEL)[mine] if stage.has_head else None
            layout, dropout = PackedLayout(lengths, device, wanted), KeyedDropout(self.options.seed, plan.step, number)
            loaded.append(MicroBatch(layout, _tensor(tokens, device), _tensor(labels, device), dropout))
        return loaded

    def run(
        self,
        plan: StepPlan,
        micro_batches: Sequence[MicroBatch],
        *,
        loading: float = 0.0,
        stop: Question = never,
        ready: Question = never,
        before_update: Callable[[], None] = lambda: None,
    ) -> StepResult:
        """Train on this replica's micro-batches of `plan` (collective over the mesh).

        Args:
            plan: the step.
            micro_batches: as `load` gives them.
            loading: seconds in which this rank has waited for them.
            stop: whether this rank was asked to stop; called before the vote.
            ready: whether it is ready for something that all ranks do together; likewise.
            before_update: called before weights and moments change, if they do.

        Raises:
            MpitrainError: on all ranks, if replicas have drifted apart.
        """
        loss, seconds = self._pass(plan, micro_batches)
        began = time.perf_counter()
        note(b"sum of gradients over replicas")
        reach("reduce")
        self.reducer.finish()
        self._record("wait for reduce", began)
        reduced = time.perf_counter()
        note(b"vote on the update")
        work = loading + seconds["forward_backward"] - seconds["tensor"] + self._seconds_updating
        mine = [work, seconds["forward_backward"], seconds["pipeline_wait"], peak_memory()]
        loss, grad_norm, stops, is_ready, shares = self._agree(loss, stop(), ready(), mine)
        wire_errors = self._measure_wire()
        learning_rate = learning_rate_at(plan.step, self.num_steps, self.peak_learning_rate, self.options.warmup_ratio)
        updated = math.isfinite(grad_norm) and math.isfinite(loss)
        copying, gathering = self._update(grad_norm, learning_rate, before_update) if updated else (0.0, 0.0)
        self._record("update", reduced)
        self._count(updated)
        self.drift.begin(plan.step + 1)
        reach("weight", lambda: next(self.executor.stage.parameters()).data)
        reach("moment", lambda: next((each.values for each in self.optimizer.slices() if each.kind == "exp_avg"), None))
        seconds |= {
            "reduce": reduced - began,
            "reduce_hidden": max(0.0, self.reducer.seconds - (reduced - began)),
            "update": time.perf_counter() - reduced,
            "copy": copying,
            "gather": gathering,
        }
        self._seconds_updating = seconds["update"] - copying - gathering
        return StepResult(loss, grad_norm, learning_rate, updated, stops, is_ready, shares, seconds, wire_errors)

    def _pass(self, plan: StepPlan, micro_batches: Sequence[MicroBatch]) -> tuple[float, dict[str, float]]:
        """Forward and backward; this stage's share of the loss, and seconds by part."""
        group = self.executor.stage.group
        exchanged, began = group.seconds, time.perf_counter()
        begin_step(plan.step + 1)
        self.reducer.start_step(len(micro_batches))
        loss = self.executor.train(
            micro_batches,
            num_labelled=plan.num_labelled,
            loss_scale=self.loss_scale.value,
            after_backward=self.reducer.end_micro_batch,
        )
        waited = self.executor.seconds_waited
        return loss, {
            "forward_backward": time.perf_counter() - began - waited,
            "pipeline_wait": waited,
            "tensor": group.seconds - exchanged,
        }

    def _agree(
        self, loss: float, stop: bool, ready: bool, shares: Sequence[float]
    ) -> tuple[float, float, bool, bool, Shares]:
        """Loss and gradient norm of the batch, any to stop, all ready, everyone's shares: one vote, the same bits."""
        squares = self._exact_squares() if self.options.reproducible else self.optimizer.squared_norm()
        changed = self.drift.changed()
        mine = [loss, squares / self.loss_scale.value**2, float(stop), float(not ready), float(bool(changed))]
        told = everyone(self.mesh.world, np.array([*mine, *shares]))
        whole, squares, stops, unready, drifted = map(float, told[:, : len(mine)].sum(axis=0))
        if drifted:
            raise_together(self.mesh.world, changed)
        grad_norm = math.sqrt(squares) if squares >= 0 else math.nan
        return whole, grad_norm, stops > 0, unready == 0, Shares(*told[:, len(mine) :].T)

    def _measure_wire(self) -> list[list[float]]:
        """See StepResult."""
        mine = self.exchange.take_wire_errors()
        if not mine:
            return []
        sums = total(self.mesh.tensor_axis, total(self.mesh.data_axis, np.array(mine)))
        relative = [math.sqrt(lost / square) if square else 0.0 for lost, square in sums.tolist()]
        return collect(self.mesh.pipe_axis, relative)

    def _exact_squares(self) -> float:
        """The sum of squares over all ranks on the first rank, 0 on others: no mesh changes a bit of it."""
        world, gradients = self.mesh.world, self.optimizer.gradients()
        largest = [float(gradient.abs().max()) for gradient in gradients]
        peaks: list[float] = [peak for peaks in collect(world, largest) for peak in peaks]
        if not all(map(math.isfinite, peaks)):
            return math.nan
        scale = tree.power_of_two_above(max(peaks))
        limbs = total(world, np.array(tree.square_limbs(gradients, scale)))
        return tree.from_limbs(limbs, scale) if world.rank == 0 else 0.0

    def _update(self, grad_norm: float, learning_rate: float, before: Callable[[], None]) -> tuple[float, float]:
        """Returns the seconds spent in `before`, and those in which new weights spread."""
        note(b"copy of what is saved")
        began = time.perf_counter()
        before()
        copying = time.perf_counter() - began
        note(b"update of weights")
        reach("update")
        limit = self.options.max_grad_norm
        clip = limit / grad_norm if limit is not None and grad_norm > limit else 1.0
        self.optimizer.step(learning_rate, clip / self.loss_scale.value)
        began = time.perf_counter()
        note(b"new weights of all ranks")
        self.exchange.spread()
        return copying, time.perf_counter() - began

    def _record(self, name: str, began: float) -> None:
        if self.trace is not None:
            self.trace.add(name, "step", int(1e9 * began))

    def close(self) -> None:
        """End the reducer's thread and give the exchange's memory back; the model is empty after this (collective)."""
        self.reducer.close()
        self.exchange.close()

    def _count(self, updated: bool) -> None:
        self.num_updates += updated
        self.skipped_in_a_row = 0 if updated else self.skipped_in_a_row + 1
        self.loss_scale.update(updated)


def _tensor(values: Indices | None, device: torch.device) -> torch.Tensor | None:
    return None if values is None else torch.from_numpy(values).to(device)


def _read(split: Sequences, field: str, sequences: Indices, num_tokens: int, filler: int) -> Indices:
    """[num_tokens]; `filler` from where the sequences end."""
    found = split.read(field, sequences)
    return np.concatenate([found, np.full(num_tokens - len(found), filler)])
