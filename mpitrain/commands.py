"""What each command does, once all ranks have read the same arguments; it loads what it needs."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpitrain import __version__
from mpitrain.bench import command as bench
from mpitrain.config import Config
from mpitrain.errors import ExitCode, MpitrainError, UsageError, on_all_ranks
from mpitrain.observe.console import Console
from mpitrain.runtime import launch
from mpitrain.runtime.watchdog import Watch

if TYPE_CHECKING:
    from mpitrain.train import RanksLostError


@dataclass
class Job:
    """Who takes part, watched by whom; others than at the start if ranks have been lost since.

    Attributes:
        arguments: of the command.
    """

    world: Any
    watch: Watch
    console: Console
    stop: launch.StopRequest
    arguments: list[str]


def _train(job: Job, options: argparse.Namespace, settings: Config) -> int:
    from mpitrain.runtime.survive import can_survive
    from mpitrain.train import RanksLostError, train

    if settings.runtime.on_failure == "shrink" and not can_survive():  # the same launcher has started all ranks
        raise on_all_ranks(
            UsageError(
                "--runtime.on_failure shrink: needs Open MPI 5, started with mpirun --with-ft ulfm; without it a job "
                "ends when a rank dies, and goes on from its last checkpoint when it is started again"
            )
        )
    job.console.say("mpitrain", __version__)
    again, num_ranks, born = settings, job.world.size, launch.birth()
    while True:
        try:
            code, directory = train(job.world, again, job.console, job.stop, born)
            break
        except RanksLostError as loss:
            again, born = _go_on_without(job, settings, loss), loss.run.seen
    _say_what_next(job, settings, num_ranks, code, directory)
    return code


def _go_on_without(job: Job, settings: Config, loss: RanksLostError) -> Config:
    """Make a smaller job of the ranks that are left, as many as make whole replicas; its settings (collective).

    Raises:
        MpitrainError: no replica is whole.
        RanksLostError: none was lost.
    """
    from mpitrain.runtime.survive import survivors

    asked, directory, pipeline = settings.mesh, loss.run.directory, settings.pipeline
    given = asked.pipe or pipeline.layers or pipeline.schedule.endswith(".csv")
    replica = (loss.run.place.mesh.num_stages if given else 1) * (asked.tensor or 1)
    num_before = job.world.size
    launch.die_unless_done_in(launch.patience(job.watch.hang_timeout))  # nobody watches while the world is made anew
    job.watch.abandon()
    job.world, lost = survivors(job.world, replica)
    if not lost:  # it was something else
        raise loss
    job.watch = Watch(job.world, job.watch.alarm, job.watch.hang_timeout, survives=True)
    launch.die_unless_done_in(0)
    job.console = Console(job.world.rank == 0, level=settings.log.level)
    gone = f"rank(s) {', '.join(map(str, lost))} of {num_before} are lost"
    if job.world.size < replica:
        error = MpitrainError(f"{gone}, and {job.world.size} left are less than a replica of {replica} needs")
        if job.world.rank == 0:
            loss.run.write_exit(error.code, str(error))
        raise on_all_ranks(error)
    job.console.warn(f"{gone}; {job.world.size} go on from the last checkpoint")
    smaller = asked.model_copy(update={"data": None})
    return settings.model_copy(update={"mesh": smaller, "resume": "auto", "out": directory.path})


def _say_what_next(job: Job, settings: Config, num_ranks: int, code: int, directory: Path) -> None:
    say = job.console.say_whole
    if code == ExitCode.STOPPED:
        launcher = f"mpirun -np {num_ranks} " if num_ranks > 1 else ""
        told = [*job.arguments, *([] if settings.out else ["--out", str(directory)])]
        told += [] if settings.resume == "auto" else ["--resume", "auto"]  # the last one counts
        say("stopped", f"cleanly; to go on: {launcher}python -m mpitrain {shlex.join(told)}")
        return
    run, exported = (shlex.quote(str(path)) for path in (directory, directory / "exported"))
    say("next", f"python -m mpitrain evaluate --checkpoint {run}")
    say("", f"echo 'Maria Jordan flew to Paris .' | python -m mpitrain predict --checkpoint {run} -")
    say("", f"python -m mpitrain export --checkpoint {run} --out {exported}")


def _prepare(job: Job, options: argparse.Namespace, settings: Config) -> int:
    from mpitrain.problem import prepare_files

    directory = prepare_files(job.world, settings, options.files, job.console)
    _show(job, directory)
    job.console.say("shards", f"{directory}; to train on them: --data {shlex.quote(str(directory))}")
    return ExitCode.DONE


def _evaluate(job: Job, options: argparse.Namespace, settings: Config) -> int:
    from mpitrain.evaluate import evaluate_checkpoint

    evaluate_checkpoint(job.world, settings, _needed(options.checkpoint), job.console)
    return ExitCode.DONE


def _predict(job: Job, options: argparse.Namespace, settings: Config) -> int:
    from mpitrain.predict import open_input, predict
    from mpitrain.restore import open_checkpoint, restore_stage

    directory = _needed(options.checkpoint)
    sentences = open_input(job.world, options.input, options.format)  # before anything is loaded
    trained = open_checkpoint(job.world, directory, job.console)
    place, executor = restore_stage(job.world, settings, trained, job.console)
    number = predict(
        executor,
        place,
        trained.problem,
        sentences,
        output=settings.out,
        output_format=options.to,
    )
    job.console.say("tagged", f"{number:,} sentences")
    place.close()
    return ExitCode.DONE


def _export(job: Job, options: argparse.Namespace, settings: Config) -> int:
    from mpitrain.export import export
    from mpitrain.restore import open_checkpoint

    place = _needed(options.checkpoint)
    out = settings.out or Path("exported")
    export(job.world, open_checkpoint(job.world, place, job.console), out)
    job.console.say("exported", f"{out}: load it with AutoModelForTokenClassification.from_pretrained({str(out)!r})")
    return ExitCode.DONE


def _inspect(job: Job, options: argparse.Namespace, settings: Config) -> int:
    place = options.directory or options.checkpoint
    if place is None:
        raise on_all_ranks(UsageError("inspect needs a directory: of shards, of a run, or a checkpoint"))
    _show(job, place)
    return ExitCode.DONE


def _doctor(job: Job, options: argparse.Namespace, settings: Config) -> int:
    from mpitrain.doctor.command import HANG_TIMEOUT, doctor

    if "hang_timeout" not in settings.runtime.model_fields_set:
        job.watch.hang_timeout = HANG_TIMEOUT
    return doctor(job.world, settings, job.console, as_json=options.json)


def _plan(job: Job, options: argparse.Namespace, settings: Config) -> int:
    from mpitrain.plan import plan

    told = {"show_schedule": options.show_schedule, "fields": options.fields}
    plan(job.world, settings, job.console, num_ranks=options.ranks or job.world.size, **told)
    return ExitCode.DONE


def _job(job: Job, options: argparse.Namespace, settings: Config) -> int:
    from mpitrain.job import write_script
    from mpitrain.runtime.agree import together
    from mpitrain.runtime.launch import library_version

    with together(job.world, "writing the job script"):
        if job.world.rank == 0 and (told := write_script(options, settings, options.fields, library_version())):
            job.console.say_whole("job", told)
    return ExitCode.DONE


def _report(job: Job, options: argparse.Namespace, settings: Config) -> int:
    from mpitrain.report.command import report

    runs = options.runs
    report(job.world, runs, settings.out or (runs[0] / "report" if len(runs) == 1 else Path("report")), job.console)
    return ExitCode.DONE


def _show(job: Job, place: Path) -> None:
    """What is in a directory, on rank 0 (collective); damage is an error after what there is was shown."""
    from mpitrain.describe import describe
    from mpitrain.runtime.agree import together
    from mpitrain.runtime.notes import State

    with together(job.world, f"inspecting {place}", State.LISTENING):  # output may go to a pager
        if job.world.rank == 0:
            content, damage = describe(place)
            job.console.show(content)
            if damage is not None:
                raise damage


def _needed(checkpoint: Path | None) -> Path:
    if checkpoint is None:  # arguments are the same on all ranks
        raise on_all_ranks(UsageError("--checkpoint DIR is needed: a run directory or one checkpoint"))
    return checkpoint


Handler = Callable[[Job, argparse.Namespace, Config], int]
HANDLERS: dict[str, Handler] = {
    "train": _train,
    "prepare": _prepare,
    "evaluate": _evaluate,
    "predict": _predict,
    "export": _export,
    "inspect": _inspect,
    "doctor": _doctor,
    "plan": _plan,
    "job": _job,
    "report": _report,
    "bench": lambda job, options, settings: bench.run(job.world, options, settings, job.console),
}
