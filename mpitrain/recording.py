"""What is written down and said of a step: a line of metrics, the progress that a person sees, ranks that are slow."""

from __future__ import annotations

import math
from typing import Any

from mpitrain.dataset.batches import StepPlan
from mpitrain.run import Run
from mpitrain.step import StepResult


def record_step(run: Run, plan: StepPlan, result: StepResult, seconds: float, parts: dict[str, float]) -> None:
    """A line in metrics.jsonl, and what a person sees."""
    run.last_steps.append(seconds)
    metrics: dict[str, Any] = {
        "step": plan.step + 1,
        "epoch": plan.epoch,
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "learning_rate": result.learning_rate,
        "tokens": plan.num_tokens,
        "seconds": seconds,
        "tokens_per_second": plan.num_tokens / seconds,
        **parts,
        "save": run.saver.take_seconds(),
        "work": float(result.work.mean()),
    }
    if run.world.rank == 0:
        num_replicas, reproducible = run.place.mesh.num_replicas, run.config.train.reproducible
        costs = plan.replica_costs(num_replicas, reproducible=reproducible)
        metrics["imbalance"] = float(costs.max() / costs.mean())
        # JSON has no NaN and no infinity.
        finite: dict[str, Any] = {key: None if not math.isfinite(value) else value for key, value in metrics.items()}
        if result.wire_errors:
            finite["wire_error"] = [[e if math.isfinite(e) else None for e in stage] for stage in result.wire_errors]
        run.directory.add_metrics(finite)
        if run.board is not None:
            run.board.add(finite)
        for slow in run.stragglers.add(result.work, costs, seconds):
            run.console.warn(
                f"rank {slow.rank} on {run.nodes[slow.rank]} is slow: own work {1e3 * slow.work:.3g} ms a step, where "
                f"its peers would take {1e3 * slow.share:.3g}; the others wait {1e3 * slow.waiting:.3g} ms a step"
            )
    if not result.updated:
        run.console.warn(f"step {plan.step + 1}: loss or gradient is not finite; all ranks skip this update")
    run.console.step(metrics, run.num_steps, run.last_f1)
