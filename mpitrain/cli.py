"""The command line: the one place that says COMM_WORLD, and where errors become exit codes."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mpitrain import __version__, config
from mpitrain.bench import command as bench
from mpitrain.errors import ExitCode, MpitrainError, UsageError, on_all_ranks
from mpitrain.runtime import launch

if TYPE_CHECKING:
    from mpitrain.config import Config
    from mpitrain.observe.console import Console
    from mpitrain.runtime.watchdog import Watch

COMMANDS = {
    "train": "train, evaluate, save (the default)",
    "prepare": "turn tagged text into HDF5 shards",
    "evaluate": "score a checkpoint on the dev and test splits",
    "predict": "tag a file, or standard input, with a checkpoint",
    "export": "write a checkpoint as a directory that transformers loads",
    "inspect": "show what is in a shard directory or a checkpoint",
    "plan": "show what each stage would hold, and the schedule of the pipeline",
    "report": "show where the time of a traced run went, and draw its pipeline",
    "bench": "time our all-reduce beside MPI's own and gloo's, training steps, or their parts",
}
OWN_FLAGS = {"--config", "--checkpoint", "--format", "--to", "--ranks", "--show-schedule", *bench.FLAGS}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; `python -m mpitrain {self.prog.rpartition(' ')[2]} --help` shows how")


def command_parser(command: str) -> _Parser:
    """The arguments that belong to one command; all others are configuration fields."""
    parser = _Parser(prog=f"mpitrain {command}", description=COMMANDS[command], allow_abbrev=False, add_help=False)
    parser.add_argument("--config", type=Path, metavar="FILE.toml", help="configuration file")
    if command == "prepare":
        parser.add_argument("files", nargs="*", metavar="FILE", help="train, dev and test text, instead of --data")
    if command in ("evaluate", "predict", "export"):
        parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="a run directory or one checkpoint")
    if command == "report":
        parser.add_argument("directory", type=Path, metavar="DIR", help="a run that was trained with --trace N")
    if command == "inspect":
        parser.add_argument("directory", nargs="?", type=Path, metavar="DIR", help="shards, run or checkpoint")
        parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="the same as DIR")
    if command == "predict":
        parser.add_argument("input", metavar="INPUT", help="CoNLL or plain text (one sentence a line); - is stdin")
        parser.add_argument("--format", choices=["auto", "conll", "text"], default="auto", help="of the input")
        parser.add_argument("--to", choices=["conll", "jsonl"], default="conll", help="of the output")
    if command == "plan":
        parser.add_argument(
            "--ranks", type=bench.count, metavar="N", help="of the job; those that are here if not given"
        )
        parser.add_argument("--show-schedule", action="store_true", help="draw it; with --out also as PNG and SVG")
    if command == "bench":
        bench.add_arguments(parser)
    return parser


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """A command's own arguments, and the configuration's flags, each of which takes one value."""
    own: list[str] = []
    fields: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("--") or argument.partition("=")[0] in OWN_FLAGS:
            own.append(argument)
        else:
            fields += [argument] if "=" in argument else [argument, *islice(rest, 1)]
    return own, fields


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run a command on all ranks and leave with the documented exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    sys.stdout = sys.stdout or Path(os.devnull).open("w")  # noqa: SIM115, it is None where it was closed (`>&-`)
    command = arguments.pop(0) if arguments and not arguments[0].startswith("-") else "train"
    if command not in COMMANDS or {"-h", "--help", "--version"} & set(arguments):
        sys.exit(answer_without_mpi(command, arguments))
    stop = launch.StopRequest()
    if command == "train":
        stop.listen()  # from the first moment: a signal while libraries load must not kill the job
    launch.die_unless_done_in(launch.SECONDS_TO_START)
    try:
        world = launch.start()
    except UsageError as error:
        if launch.announced(launch.RANK_VARIABLES) in (None, 0):
            print(f"error: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(error.code)
    try:
        from mpitrain.runtime.watchdog import Watch

        watch = Watch(world, lambda error: launch.abort(world, error, None))
        launch.die_unless_done_in(0)
        code = run(world, command, arguments, stop, watch)
        launch.die_unless_done_in(max(watch.hang_timeout, launch.SECONDS_TO_LEAVE) if watch.hang_timeout else 0)
        watch.end()
    except BaseException as error:  # SystemExit too: the other ranks would wait for this one
        launch.abort(world, error, error.__traceback__)
    launch.finish(world, code)


def answer_without_mpi(command: str, arguments: list[str]) -> int:
    """Help and version need no MPI; under a launcher only the first rank speaks."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--help | head` is no error
    known = command in COMMANDS
    if launch.announced(launch.RANK_VARIABLES) in (None, 0):
        if not known:
            print(f"error: no command {command!r}; commands are: {', '.join(COMMANDS)}", file=sys.stderr)  # noqa: T201
        elif "--version" in arguments:
            print(f"mpitrain {__version__}")  # noqa: T201
        else:
            print_help(command)
    return ExitCode.DONE if known else ExitCode.USAGE


def print_help(command: str) -> None:
    """Commands, the arguments of this one, and every configuration field."""
    lines = ["usage: python -m mpitrain [COMMAND] [ARGUMENTS] [--FIELD VALUE ...]", "", "commands:"]
    lines += [f"  {name:<10}{text}" for name, text in COMMANDS.items()]
    print("\n".join(lines), end="\n\n")  # noqa: T201
    print(command_parser(command).format_help(), config.help_text(), sep="\n")  # noqa: T201


def run(world: Any, command: str, arguments: list[str], stop: launch.StopRequest, watch: Watch) -> int:
    """A command's exit code, the same on all ranks; errors that not all ranks share end the job instead."""
    from mpitrain.observe.console import Console
    from mpitrain.runtime import failpoints
    from mpitrain.runtime.agree import attempt, require_same
    from mpitrain.runtime.identity import program
    from mpitrain.runtime.notes import State, note

    console = Console(world.rank == 0, to_stderr=command == "predict")
    try:
        attempt(world, "reading the environment", lambda: failpoints.arm(world.rank))
        options, settings = attempt(world, "reading the configuration", lambda: _read_arguments(command, arguments))
        told = {"command": command, **vars(options), **flat(settings.model_dump(mode="json"))}
        require_same(world, "settings", {key: str(value) for key, value in told.items()})
        require_same(world, "the program", attempt(world, "looking at the program", program))
        watch.hang_timeout = settings.runtime.hang_timeout
        note(b"loading libraries", state=State.WORKING)
        failpoints.reach("start")
        if command == "train":
            return _train(world, arguments, settings, console, stop)
        return HANDLERS[command](world, options, settings, console)
    except MpitrainError as error:
        if not error.agreed:
            raise
        if world.rank == 0:
            console.stop_steps()
            print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return error.code


def flat(table: dict[str, Any], prefix: str = "--") -> dict[str, Any]:
    """A table of tables by their dotted flags."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _read_arguments(command: str, arguments: list[str]) -> tuple[argparse.Namespace, Config]:
    own, fields = split_arguments(arguments)
    options = command_parser(command).parse_args(own)
    return options, config.load(fields, options.config)


def _train(world: Any, arguments: list[str], settings: Config, console: Console, stop: launch.StopRequest) -> int:
    from mpitrain.train import train

    console.say("mpitrain", __version__)
    code, directory = train(world, settings, console, stop)
    if code == ExitCode.STOPPED:
        launcher = f"mpirun -np {world.size} " if world.size > 1 else ""
        told = [*arguments, *([] if settings.out else ["--out", str(directory)])]
        told += [] if settings.resume == "auto" else ["--resume", "auto"]  # the last one counts
        console.say("stopped", f"cleanly; to go on: {launcher}python -m mpitrain {shlex.join(told)}")
        return code
    console.say("next", f"python -m mpitrain evaluate --checkpoint {directory}")
    console.say("", f"echo 'Maria Jordan flew to Paris .' | python -m mpitrain predict --checkpoint {directory} -")
    console.say("", f"python -m mpitrain export --checkpoint {directory} --out {directory / 'exported'}")
    return code


def _prepare(world: Any, options: argparse.Namespace, settings: Config, console: Console) -> int:
    from mpitrain.problem import prepare_files

    directory = prepare_files(world, settings, options.files, console)
    show(world, console, directory)
    console.say("shards", f"{directory}; to train on them: --data {shlex.quote(str(directory))}")
    return ExitCode.DONE


def _evaluate(world: Any, options: argparse.Namespace, settings: Config, console: Console) -> int:
    from mpitrain.evaluate import evaluate_checkpoint

    evaluate_checkpoint(world, settings, _needed(options.checkpoint), console)
    return ExitCode.DONE


def _predict(world: Any, options: argparse.Namespace, settings: Config, console: Console) -> int:
    from mpitrain.predict import open_input, predict
    from mpitrain.restore import open_checkpoint, restore_stage

    directory = _needed(options.checkpoint)
    sentences = open_input(world, options.input, options.format)  # before anything is loaded
    trained = open_checkpoint(world, directory, console)
    place, executor = restore_stage(world, settings, trained, console)
    number = predict(
        executor,
        place,
        trained.problem,
        sentences,
        output=settings.out,
        output_format=options.to,
    )
    console.say("tagged", f"{number:,} sentences")
    place.close()
    return ExitCode.DONE


def _export(world: Any, options: argparse.Namespace, settings: Config, console: Console) -> int:
    from mpitrain.export import export
    from mpitrain.restore import open_checkpoint

    place = _needed(options.checkpoint)
    out = settings.out or Path("exported")
    export(world, open_checkpoint(world, place, console), out)
    console.say("exported", f"{out}: load it with AutoModelForTokenClassification.from_pretrained({str(out)!r})")
    return ExitCode.DONE


def _inspect(world: Any, options: argparse.Namespace, settings: Config, console: Console) -> int:
    place = options.directory or options.checkpoint
    if place is None:
        raise on_all_ranks(UsageError("inspect needs a directory: of shards, of a run, or a checkpoint"))
    show(world, console, place)
    return ExitCode.DONE


def _plan(world: Any, options: argparse.Namespace, settings: Config, console: Console) -> int:
    from mpitrain.plan import plan

    plan(world, settings, console, num_ranks=options.ranks or world.size, show_schedule=options.show_schedule)
    return ExitCode.DONE


def _report(world: Any, options: argparse.Namespace, settings: Config, console: Console) -> int:
    from mpitrain.report import report

    report(world, options.directory, settings.out or options.directory / "trace", console)
    return ExitCode.DONE


def show(world: Any, console: Console, place: Path) -> None:
    """What is in a directory, on rank 0 (collective); damage is an error after what there is was shown."""
    from mpitrain.describe import describe
    from mpitrain.runtime.agree import together
    from mpitrain.runtime.notes import State

    with together(world, f"inspecting {place}", State.LISTENING):  # output may go to a pager
        if world.rank == 0:
            content, damage = describe(place)
            console.show(content)
            if damage is not None:
                raise damage


def _needed(checkpoint: Path | None) -> Path:
    if checkpoint is None:  # arguments are the same on all ranks
        raise on_all_ranks(UsageError("--checkpoint DIR is needed: a run directory or one checkpoint"))
    return checkpoint


Handler = Callable[[Any, argparse.Namespace, "Config", "Console"], int]
HANDLERS: dict[str, Handler] = {
    "prepare": _prepare,
    "evaluate": _evaluate,
    "predict": _predict,
    "export": _export,
    "inspect": _inspect,
    "plan": _plan,
    "report": _report,
    "bench": bench.run,
}
