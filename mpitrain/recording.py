"""What is written down and said of a step and of scores: a line each, the progress that a person sees, slow ranks."""

from __future__ import annotations

import math
import time
from typing import Any

from mpitrain.dataset.batches import StepPlan
from mpitrain.forecast import step_terms
from mpitrain.machine import Load
from mpitrain.run import Run
from mpitrain.step import StepResult

WARM_UP = 2  # steps that are not like others


def record_step(run: Run, plan: StepPlan, result: StepResult, seconds: float, parts: dict[str, float]) -> None:
    """A line in metrics.jsonl, and what a person sees."""
    shares = result.shares
    run.last_steps.append(seconds)
    run.seen = time.perf_counter()
    run.ranks.add(shares.work, shares.memory)
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
        "work": (work := float(shares.work.mean())),
        "passes": float(shares.passes.mean()),
        # Other ranks may have begun to wait while rank 0 was still at what follows the step before.
        "bubble": max(0.0, min(run.ranks.bubble(shares.passes, shares.pipeline_wait), seconds - work - parts["copy"])),
        "padding": plan.num_padding,
        "memory": int(shares.memory.max()),
        "elapsed": run.seen - run.born,
    }
    if len(run.last_steps) > WARM_UP:
        run.steady.append(metrics)
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
        for slow in run.stragglers.add(shares.work, costs, seconds):
            run.console.warn(
                f"rank {slow.rank} on {run.ranks.nodes[slow.rank]} is slow: own work {1e3 * slow.work:.3g} ms a step, "
                f"where its peers would take {1e3 * slow.share:.3g}; the others wait {1e3 * slow.waiting:.3g} ms a step"
            )
        if run.ranks.num_steps == 1:
            record_ranks(run)  # a job that dies soon has something to tell, too
    if not result.updated:
        run.console.warn(f"step {plan.step + 1}: loss or gradient is not finite; all ranks skip this update")
    run.console.step(metrics, run.num_steps, run.last_f1)


def compare_with_forecast(run: Run) -> None:
    """Say what a step took on rank 0 and what was foretold of it, term by term, if the machine's figures are known."""
    if run.machine is None or not run.steady:
        return

    def mean(part: str) -> float:
        return float(sum(metrics[part] for metrics in run.steady)) / len(run.steady)

    options, problem = run.config.train, run.problem
    load = Load(run.world.size, len(run.splits["train"].index.lengths), mean("tokens") / options.batch_size)
    arrangement, num_labels = run.place.arrangement, len(problem.label_names)
    foretold = step_terms(run.machine, load, run.config, problem.card, num_labels, arrangement)
    waits = ("bubble", "messages")  # on rank 0 they cannot be told apart: who waits for a message, waits
    expected, seconds = sum(foretold.values()), mean("seconds")
    foretold = {"compute": foretold["compute"], "waiting": sum(map(foretold.pop, waits)), **foretold}
    took = {"compute": mean("forward_backward") - mean("tensor"), "waiting": mean("pipeline_wait") + mean("tensor")}
    took["reduce"] = mean("reduce")
    took["update"] = seconds - sum(took.values())
    run.console.say(
        "forecast",
        f"a step took {1e3 * seconds:.4g} ms, and {1e3 * expected:.4g} were foretold ({expected / seconds - 1:+.0%}) "
        f"by the figures of {run.machine.name}",
    )
    terms = (f"{term} {1e3 * took[term]:.3g} ({1e3 * foretold[term]:.3g})" for term in took)
    run.console.say("", f"{', '.join(terms)} ms, of the mean of the last {len(run.steady)} steps")


def record_scores(run: Run, name: str, scores: dict[str, Any], seconds: float) -> None:
    """A line in evaluations.jsonl; of weights that may be those of an earlier step (rank 0 only)."""
    elapsed = time.perf_counter() - run.born
    step, weights = run.progress.step, run.weights_of or run.progress.step
    told = {"split": name, "step": step, "weights": weights, "epoch": weights / run.plan.steps_per_epoch}
    run.directory.add_evaluation({**told, "seconds": seconds, "elapsed": elapsed, **scores})
    record_ranks(run)


def record_ranks(run: Run) -> None:
    """What each rank has taken so far in this start, if it has done a step (rank 0 only)."""
    if run.ranks.num_steps:
        run.directory.write("ranks.json", run.ranks.document())
