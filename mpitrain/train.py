"""The training loop: take micro-batches, step, record; now and then evaluate and save; on a signal save and leave."""

from __future__ import annotations

import math
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

from mpitrain.checkpoint.load import fill, verify
from mpitrain.config import Config
from mpitrain.dataset.loader import prefetch
from mpitrain.errors import CheckpointError, ExitCode, MpitrainError, code_of, on_all_ranks
from mpitrain.evaluate import evaluate
from mpitrain.files import user_path
from mpitrain.metrics import is_plain
from mpitrain.observe.console import Console, score_table
from mpitrain.observe.record import EXIT, RunDirectory
from mpitrain.recording import compare_with_forecast, record_ranks, record_scores, record_step
from mpitrain.resume import resume, save_checkpoint
from mpitrain.run import Run, build
from mpitrain.runtime.agree import Comm, collect, share, together
from mpitrain.runtime.failpoints import reach
from mpitrain.runtime.launch import StopRequest, last_words, stay_if_ending
from mpitrain.runtime.notes import note
from mpitrain.runtime.survive import is_loss
from mpitrain.tracing import Tracing

CAUTION = 1.5  # what comes next may take so many times as long as before
SECONDS_TO_LEAVE = 2.0  # from the last checkpoint to the end of all processes


class RanksLostError(Exception):
    """Some rank has died, and this one has left all that it had to do with the others.

    Attributes:
        run: as it was left.
    """

    def __init__(self, run: Run) -> None:
        """Keep it for who makes a smaller one."""
        super().__init__("ranks are lost")
        self.run = run


def train(comm: Comm, config: Config, console: Console, stop: StopRequest, born: float) -> tuple[int, Path]:
    """Train, evaluate and save (collective); the exit code and the run directory.

    Args:
        comm, config, console, stop: who, what, whose voice, and what may end it early.
        born: from when on its time counts, by time.perf_counter.

    Raises:
        MpitrainError: on all ranks, with the first cause.
        RanksLostError: some rank has died, and this one can go on without it.
    """
    directory = forget_last_exit(comm, config.out)
    run: Run | None = None

    def write_exit(error: BaseException) -> None:
        code, reason = code_of(error), str(error) or repr(error)
        with suppress(MpitrainError):  # the disk may be what has failed
            if run is not None:
                run.write_exit(code, reason)
            elif directory is not None:
                directory.write_exit(code, reason, 0)

    try:
        with last_words(write_exit):
            run = build(comm, config, console, stop, born, directory)
            resume(run)
            tracing = Tracing(run)
            stopped = run_steps(run, tracing)
            tracing.close()
            save_checkpoint(run)
            run.saver.finish()
            stopped = stopped or report_best(run)
            compare_with_forecast(run)
            reach("end")
            run.close()
            comm.Barrier()  # a rank that fails until here has the last word in exit.json
            stay_if_ending()  # who was stuck until then may have been woken, to be asked where
            comm.Barrier()  # and nobody tells the end who cannot know of that
    except BaseException as error:
        if run is not None and config.runtime.on_failure == "shrink" and is_loss(error):
            run.abandon()
            raise RanksLostError(run) from error
        if run is not None and getattr(error, "agreed", False):
            with suppress(MpitrainError):  # what was begun before is not to be lost
                run.saver.finish()
        # An agreed error is everybody's; any other ends the job, and this rank alone knows why.
        if comm.rank == 0 or not getattr(error, "agreed", False):
            write_exit(error)
        raise
    code, reason = (ExitCode.STOPPED, f"stopped by {stopped}") if stopped else (ExitCode.DONE, "done")
    if comm.rank == 0:
        record_ranks(run)
        run.write_exit(code, reason)
        run.directory.forget_starts()
    return code, run.directory.path


def forget_last_exit(comm: Comm, out: Path | None) -> RunDirectory | None:
    """The run directory if it is there already, claimed, without the exit code of the last start (collective).

    Claimed before anything is written: what belongs to another job, or is no run, must stay as it is.
    """
    there = share(comm, out is not None and out.is_dir())
    if not there or out is None:
        return None
    directory = RunDirectory(out)
    with together(comm, f"opening {out}"):
        if comm.rank == 0:
            with user_path("--out", out):
                directory.create()
                (out / EXIT).unlink(missing_ok=True)
    return directory


def run_steps(run: Run, tracing: Tracing) -> str:
    """Train until the last step, the end of patience or a signal; names the signal, if any (collective)."""
    if evaluation_is_due(run) and not evaluate_dev(run):  # the last start was stopped before it
        return who_stops(run)
    split = run.splits["train"]
    plans = (run.plan.step(step) for step in range(run.progress.step, 0 if is_hopeless(run) else run.num_steps))
    batches = prefetch(plans, lambda plan: run.stepper.load(plan, split))
    first = run.progress.step + 1
    run.console.start_steps(run.progress.step, run.num_steps)
    began = time.perf_counter()
    try:
        for plan, micro_batches in batches:
            loading = time.perf_counter() - began
            tracing.begin(plan.step + 1)
            result = run.stepper.run(
                plan,
                micro_batches,
                loading=loading,
                stop=partial(is_to_stop, run),
                ready=run.saver.is_ready,
                before_update=run.saver.wait_for_copy,
            )
            run.progress.step = plan.step + 1
            run.scores.clear()
            record_step(run, plan, result, time.perf_counter() - began, {"data": loading, **result.seconds})
            tracing.end()
            if result.ready:
                run.saver.advance()
            if run.progress.step == first:
                waited = time.perf_counter() - run.born
                run.console.say("start", f"{waited:.1f} s from this program's start to the end of a step")
                if run.deadline.left() < 0:
                    run.console.warn(
                        f"that was longer than its time ({run.deadline.told_by}): each start does one step"
                    )
            refuse_to_go_on_without_updates(run)
            if result.stop or (evaluation_is_due(run) and not evaluate_dev(run)):
                return who_stops(run)
            if run.progress.step % run.config.checkpoint.every == 0:
                save_checkpoint(run)
            if is_hopeless(run):
                break
            note(b"data of the next step")
            began = time.perf_counter()
    finally:
        run.console.stop_steps()
        batches.close()
    return ""


def is_to_stop(run: Run) -> bool:
    """Whether this rank was asked to stop, or knows that the time is needed for one more step and a save."""
    if not run.stop and math.isfinite(run.deadline.at):
        num_bytes = sum(piece.values.nbytes for piece in run.stepper.optimizer.slices())
        num_saves = 2 + ((run.progress.step + 1) % run.config.checkpoint.every == 0)  # one is under way, perhaps
        needed = max(run.last_steps, default=0.0) + num_saves * run.saver.seconds_of_save(num_bytes)
        if run.deadline.left() < CAUTION * needed + SECONDS_TO_LEAVE:
            run.stop.signals.append(f"the end of its time ({run.deadline.told_by})")
    return bool(run.stop)


def who_stops(run: Run) -> str:
    """What has stopped the run on the first rank that was asked to (collective)."""
    return str(next(names[0] for names in collect(run.world, run.stop.signals) if names))


def refuse_to_go_on_without_updates(run: Run) -> None:
    """Raise on all ranks after too many skipped steps in a row: the counters are the same everywhere."""
    if run.stepper.skipped_in_a_row >= run.config.train.max_skipped_steps:
        raise on_all_ranks(
            MpitrainError(
                f"{run.stepper.skipped_in_a_row} steps in a row had a loss or gradient that is not finite (the last "
                f"is step {run.progress.step}); try a lower --train.learning_rate or --train.precision fp32"
            )
        )


def evaluation_is_due(run: Run) -> bool:
    """At the end of every epoch and of the run, once."""
    step = run.progress.step
    at_end = step > 0 and (step % run.plan.steps_per_epoch == 0 or step == run.num_steps)
    return "dev" in run.splits and at_end and run.progress.evaluated_step != step


def score(run: Run, name: str) -> bool:
    """Score a split, if these weights were not yet; False if the run is to stop before the end (collective)."""
    note(b"evaluation")
    if name not in run.scores:
        stage, split = run.stepper.executor, run.splits[name]
        began = time.perf_counter()
        found = evaluate(stage, run.place, run.problem, split, partial(is_to_stop, run))
        if found is None:
            return False
        run.scores[name] = found
        if run.world.rank == 0:
            record_scores(run, name, found[0], time.perf_counter() - began)
    return True


def evaluate_dev(run: Run) -> bool:
    """Score the dev split, remember the best, and save it; False if the run is to stop before the end (collective)."""
    progress = run.progress
    began = time.perf_counter()
    if not score(run, "dev"):
        return False
    scores, _ = run.scores["dev"]
    progress.evaluated_step, run.last_f1 = progress.step, scores["f1_conlleval"]
    if run.board is not None:
        run.board.add_scores("dev", scores, progress.step)
    better = scores["f1_conlleval"] > progress.best_f1 and math.isfinite(scores["loss"])
    progress.evaluations_without_gain = 0 if better else progress.evaluations_without_gain + 1
    epoch = progress.step / run.plan.steps_per_epoch
    run.console.say(
        "dev",
        f"epoch {epoch:.3g}: F1 {scores['f1_conlleval']:.4f}  loss {scores['loss']:.4f}  token accuracy "
        f"{scores['token_accuracy']:.4f}{'  best so far' if better else ''}  ({time.perf_counter() - began:.1f} s)",
    )
    if better:
        progress.best_f1, progress.best_step = scores["f1_conlleval"], progress.step
        if run.config.checkpoint.best:
            save_checkpoint(run)
    return True


def is_hopeless(run: Run) -> bool:
    """Whether patience is at its end."""
    patience = run.config.train.early_stopping
    return bool(patience) and run.progress.evaluations_without_gain >= patience


def take_best_weights(run: Run) -> None:
    """Go back to the best weights, unless their checkpoint has been damaged since (collective)."""
    best = run.directory.checkpoints / f"step-{run.progress.best_step:08d}"
    try:
        manifest = verify(run.world, best)
    except CheckpointError as error:
        run.console.warn(f"{error}; the scores below are those of the last weights")
        return
    fill(run.world, best, manifest, [piece for piece in run.stepper.optimizer.slices() if piece.kind == "weight"])
    run.stepper.optimizer.publish()
    run.stepper.exchange.spread()
    run.scores.clear()
    run.weights_of = run.progress.best_step
    run.console.say("best", f"weights of step {run.progress.best_step}, the best on dev")


def report_best(run: Run) -> str:
    """Scores of dev and test by the best weights, or by the last ones if those are not kept (collective).

    Names what has stopped the run before the end, if anything has.
    """
    if run.config.checkpoint.best and run.progress.best_step not in (-1, run.progress.step):
        take_best_weights(run)
    for name in ("dev", "test"):
        if name in run.splits and not score(run, name):
            return who_stops(run)
    if run.scores:
        name, (report, replicas) = list(run.scores.items())[-1]
        plain = is_plain(run.problem.label_names)
        run.console.show(score_table(name, report, replicas, plain=plain))
        if run.world.rank == 0:
            run.directory.write("eval.json", {name: scores for name, (scores, _) in run.scores.items()})
    return ""
