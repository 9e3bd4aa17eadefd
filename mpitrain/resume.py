"""State out of a run and into it: what a checkpoint holds beyond tensors, and what a resumed run must share."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from mpitrain import __version__
from mpitrain.checkpoint.load import fill, holds, newest_usable, verify
from mpitrain.checkpoint.manifest import MANIFEST, Manifest, candidates, find_checkpoint
from mpitrain.checkpoint.save import forget_after
from mpitrain.drift import raise_together
from mpitrain.errors import NoProgressError, UsageError
from mpitrain.files import parse_json
from mpitrain.model import linear
from mpitrain.observe.lines import read_lines, step_of
from mpitrain.observe.record import METRICS, STARTS
from mpitrain.place import multiplies_by_library
from mpitrain.run import Run
from mpitrain.runtime.agree import any_rank, attempt_at_root, share, together

MAX_STARTS_WITHOUT_PROGRESS = 3
# Settings of `train` that do not change what is learned, or only by the number of steps, which is compared itself.
FREE_TO_CHANGE = {
    *("device", "threads", "linear", "recompute"),
    *("early_stopping", "max_skipped_steps", "epochs", "max_steps"),
}


def identity_of(run: Run) -> dict[str, Any]:
    """What a resumed run must share with the one before: the model, and what fixes the order of the data."""
    assert run.problem.info is not None
    options = run.config.train
    return {
        "model": run.problem.card.model_dump(),
        "labels": run.problem.label_names,
        "data": run.problem.info.content_hash,
        "batch_size": options.batch_size,
        "micro_batches": options.micro_batches,
        "seed": options.seed,
    }


def resume(run: Run) -> None:
    """Take up the newest usable checkpoint if there is one, and open the run's files (collective)."""
    found = _find_resume(run)
    with together(run.world, "comparing settings"):
        if found is not None:
            _check_identity(found[0], found[1].identity, identity_of(run))
        if run.world.rank == 0:  # before a start in vain changes anything
            refuse_to_start_in_vain(run, found[1].progress.step if found else 0)
    if found is not None:
        place, manifest = found
        take_up_library(run, place)
        fill(run.world, place, manifest, run.stepper.optimizer.slices())
        fill_residuals(run, place, manifest)
        run.stepper.optimizer.set_num_updates(manifest.progress.num_updates)
        run.stepper.optimizer.publish()
        run.stepper.exchange.spread()
        run.progress = manifest.progress
        run.stepper.num_updates = run.progress.num_updates
        run.stepper.loss_scale.value = run.progress.loss_scale
        run.stepper.loss_scale.good_steps = run.progress.good_steps
        run.stepper.skipped_in_a_row = run.progress.skipped_in_a_row
        tensors = f"{len(manifest.tensors)} tensors, {len(manifest.files)} files verified"
        say_what_differs(run, place)
        run.console.say("resume", f"step {run.progress.step} from {place} ({tensors})")
    best_is_here = False
    with together(run.world, "opening the run directory"):
        if run.world.rank == 0:
            nodes, seconds = run.ranks.nodes, time.perf_counter() - run.born
            run.directory.begin(run.progress.step, ranks=len(nodes), nodes=len(set(nodes)), seconds=seconds)
            forget_after(run.directory.checkpoints, run.progress.step)
            best = run.directory.checkpoints / f"step-{max(0, run.progress.best_step):08d}"
            best_is_here = (best / MANIFEST).is_file()
            run.directory.write("config.json", describe_run(run))
    run.is_open, run.seen = True, time.perf_counter()
    if not share(run.world, best_is_here):  # it was not kept, or stayed in another run
        run.progress.best_f1, run.progress.best_step = -1.0, -1


def refuse_to_start_in_vain(run: Run, step: int) -> None:
    """Raise if the last starts have not come further than this one would begin (rank 0 only)."""
    if run.directory.count_start(step) > MAX_STARTS_WITHOUT_PROGRESS:
        raise NoProgressError(
            f"{run.directory.path}: {MAX_STARTS_WITHOUT_PROGRESS} starts in a row have not come to a checkpoint after "
            f"step {step}: do not requeue this job, but see why they failed; "
            f"{run.directory.path / STARTS} counts them: to try again, delete it"
        )


def _find_resume(run: Run) -> tuple[Path, Manifest] | None:
    wanted = run.config.resume
    damaged: list[str] = []
    if wanted == "none":
        _refuse_foreign_checkpoints(run, None)
        return None
    if wanted == "auto":
        found = newest_usable(run.world, run.directory.checkpoints, damaged)
        if found is None:
            _say_what_is_lost(run)
    else:
        found_at = attempt_at_root(
            run.world, "looking for --resume", lambda: str(find_checkpoint(Path(wanted), best=False))
        )
        place = Path(found_at)
        _refuse_foreign_checkpoints(run, place)
        found = (place, verify(run.world, place))
    for line in damaged:
        run.console.warn(f"{line}; falling back to the checkpoint before it")
    return found


def _say_what_is_lost(run: Run) -> None:
    """A start that died before its first save has left steps, too; but nobody shall do a run again unawares."""
    with together(run.world, "looking for steps"):
        file = run.directory.path / METRICS
        if run.world.rank == 0 and file.is_file() and (lines := read_lines(file)[0]):
            run.console.warn(
                f"{file} tells of {step_of(lines[-1])} steps, but {run.directory.checkpoints} holds no checkpoint: the "
                "run begins anew"
            )


def _refuse_foreign_checkpoints(run: Run, resumed: Path | None) -> None:
    """A run directory holds one run: that of the checkpoint it is resumed from, if any (collective)."""
    with together(run.world, "looking for checkpoints"):
        if run.world.rank == 0:
            found = candidates(run.directory.checkpoints)
            if found and (resumed is None or resumed.resolve().parent != found[0].resolve().parent):
                raise UsageError(
                    f"--resume {run.config.resume}: {run.directory.checkpoints} holds checkpoints of another run; "
                    "give another --out, or delete them"
                )


def take_up_library(run: Run, place: Path) -> None:
    """Multiply by the library of the run before, for the same bits, where it matters and is left to us (collective)."""
    then = attempt_at_root(run.world, f"reading {place}", lambda: _described(place)).get("linear")
    if not _uses_library(run) or run.config.train.linear != "auto" or then in (None, linear.in_use()):
        return
    if then == "onednn" and any_rank(run.world, not linear.has_onednn()):
        run.console.warn(f"{place}: fp32 products were made by oneDNN, which torch comes without here")
        return
    linear.use(then)
    run.console.say("linear", f"fp32 products by {linear.NAMES[then]}, as before")


def _uses_library(run: Run) -> bool:
    return multiplies_by_library(run.place.transport.device, run.config.train)


def fill_residuals(run: Run, place: Path, manifest: Manifest) -> None:
    """Take up what error feedback still has to send, if ranks and buckets are what they were (collective)."""
    residuals = list(run.stepper.exchange.residuals(run.world.rank))
    if not any_rank(run.world, bool(residuals)):
        if any(piece.kind.startswith("residual-") for entry in manifest.files.values() for piece in entry.pieces):
            run.console.warn(f"{place}: what error feedback had still to send is dropped")
        return
    now = describe_run(run)
    then = attempt_at_root(run.world, f"reading {place}", lambda: _described(place))
    same = all(then.get(key) == now[key] for key in ("mesh", "exchange")) and _comm_of(then) == _comm_of(now)
    if any_rank(run.world, not (same and holds(manifest, residuals))):
        run.console.warn(f"{place}: has no residuals of the same ranks and buckets; error feedback begins anew")
    else:
        fill(run.world, place, manifest, residuals)


def say_what_differs(run: Run, place: Path) -> None:
    """Warn of settings that a resumed run may change, but that somebody may have forgotten to repeat (collective)."""
    with together(run.world, f"reading {place}"):
        if run.world.rank == 0:
            then, now = _described(place), describe_run(run)
            train = {key: value for key, value in now["config"]["train"].items() if key not in FREE_TO_CHANGE}
            sections = (("train", train), ("comm", _comm_of(now)), ("pipeline", now["config"]["pipeline"]))
            for section, settings in sections:
                for key, value in settings.items():
                    before = then["config"][section].get(key, value)  # an older version may not have had it
                    if before != value:
                        then_and_now = ("auto" if each is None else each for each in (before, value))
                        run.console.warn("--{}.{} was {}, is {} from here on".format(section, key, *then_and_now))
            if then["mesh"] == now["mesh"] and then.get("exchange", now["exchange"]) != now["exchange"]:
                run.console.warn(f"gradients were summed by {then['exchange']}, are by {now['exchange']} from here on")
            if then["num_steps"] != now["num_steps"]:
                run.console.warn(f"the run was planned for {then['num_steps']} steps, now for {now['num_steps']}")


def _described(place: Path) -> dict[str, Any]:
    described: dict[str, Any] = parse_json((place / "config.json").read_text(encoding="utf-8"))
    return described


def _comm_of(described: dict[str, Any]) -> dict[str, Any]:
    """Settings of the exchange that change its bits."""
    return {key: value for key, value in described["config"]["comm"].items() if key != "gpu"}


def _check_identity(place: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    then, now = ({**identity, **identity["model"], "model": None} for identity in (then, now))
    differences = [f"{key}: {then.get(key)} then, {now[key]} now" for key in now if then.get(key) != now[key]]
    if differences:
        raise UsageError(
            f"{place}: was written by another run; use its settings, another --out, or --resume none:\n  "
            + "\n  ".join(differences)
        )


def save_checkpoint(run: Run) -> None:
    """Save the present state, and delete what is no longer to be kept then (collective)."""
    progress, stepper = run.progress, run.stepper
    raise_together(run.world, stepper.drift.changed())
    progress.num_updates = stepper.num_updates
    progress.loss_scale, progress.good_steps = stepper.loss_scale.value, stepper.loss_scale.good_steps
    progress.skipped_in_a_row = stepper.skipped_in_a_row
    mesh = run.place.mesh
    # The next backward pass changes these, not only the next update.
    residuals = [replace(each, values=each.values.clone()) for each in stepper.exchange.residuals(run.world.rank)]
    run.saver.save(
        [*stepper.optimizer.slices(once=True), *residuals],
        progress=progress,
        mesh={"data": mesh.num_replicas, "pipe": mesh.num_stages, "tensor": mesh.num_tensor},
        identity=identity_of(run),
        documents={
            "config.json": json.dumps(describe_run(run), indent=1),
            "tokenizer.json": run.problem.tokenizer_json,
        },
        keep=run.config.checkpoint.keep,
        pinned=progress.best_step if run.config.checkpoint.best else -1,
    )


def describe_run(run: Run) -> dict[str, Any]:
    """The config.json that makes a checkpoint usable without its data and its run directory."""
    mesh = run.place.mesh
    return {
        "mpitrain": __version__,
        "config": run.config.model_dump(mode="json"),
        "mesh": {
            "data": mesh.num_replicas,
            "pipe": mesh.num_stages,
            "tensor": mesh.num_tensor,
            "stages": run.place.arrangement.listed(),
        },
        "exchange": run.stepper.exchange.name,
        "linear": linear.in_use() if _uses_library(run) else None,
        "data": str(Path(run.config.data).resolve()) if Path(run.config.data).exists() else run.config.data,
        "shards": str(Path(run.problem.directory or "").resolve()),
        "num_steps": run.num_steps,
        "learning_rate": run.stepper.peak_learning_rate,
        "problem": run.problem.describe(),
    }
