"""The command line: the one place that says COMM_WORLD, and where errors become exit codes."""

from __future__ import annotations

import argparse
import os
import platform
import signal
import sys
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from mpitrain import __version__, config
from mpitrain import job as jobs
from mpitrain.bench import command as bench
from mpitrain.errors import ExitCode, MpitrainError, UsageError
from mpitrain.runtime import launch
from mpitrain.runtime.library import StartError

if TYPE_CHECKING:
    from mpitrain.commands import Job
    from mpitrain.config import Config

COMMANDS = {
    "train": "train, evaluate, save (the default)",
    "prepare": "turn tagged text into HDF5 shards",
    "evaluate": "score a checkpoint on the dev and test splits",
    "predict": "tag a file, or standard input, with a checkpoint",
    "export": "write a checkpoint as a directory that transformers loads",
    "inspect": "show what is in a shard directory or a checkpoint",
    "doctor": "check MPI, cores, memory, GPUs, files and network, before a long run",
    "plan": "list the meshes for so many ranks, the fastest first, with memory, time and node-hours",
    "job": "write a batch script for Slurm, PBS, LSF or Flux that trains until done",
    "report": "write a page about one or several runs, with their curves, scores and cost",
    "bench": "time our all-reduce beside MPI's own and gloo's, training steps, or their parts",
}
OWN_FLAGS = {"--config", "--checkpoint", "--format", "--to", "--ranks", "--show-schedule", "--json"}
OWN_FLAGS |= {*bench.FLAGS, *jobs.FLAGS}


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
        parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories; the page goes to --out")
    if command == "inspect":
        parser.add_argument("directory", nargs="?", type=Path, metavar="DIR", help="shards, run or checkpoint")
        parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="the same as DIR")
    if command == "predict":
        parser.add_argument("input", metavar="INPUT", help="CoNLL or plain text (one sentence a line); - is stdin")
        parser.add_argument("--format", choices=["auto", "conll", "text"], default="auto", help="of the input")
        parser.add_argument("--to", choices=["conll", "jsonl"], default="conll", help="of the output")
    if command == "doctor":
        parser.add_argument("--json", action="store_true", help="one document, for a ticket, on standard output")
    if command == "plan":
        parser.add_argument(
            "--ranks", type=bench.count, metavar="N", help="of the job; those that are here if not given"
        )
        parser.add_argument("--show-schedule", action="store_true", help="draw it; with --out also as PNG and SVG")
    if command == "job":
        jobs.add_arguments(parser, bench.count)
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
        world = launch.start(wary=command == "doctor")
    except StartError as error:
        refuse(error, command, arguments)
    try:
        from mpitrain.commands import Job
        from mpitrain.observe.console import Console
        from mpitrain.runtime.watchdog import Watch

        watch = Watch(world, lambda error: launch.abort(world, error, None))
        launch.die_unless_done_in(0)
        to_stderr = command == "predict" or "--json" in arguments  # whose results are on standard output
        job = Job(world, watch, Console(world.rank == 0, to_stderr=to_stderr), stop, arguments)
        code = run(job, command)
        launch.die_unless_done_in(launch.patience(job.watch.hang_timeout))
        job.watch.end()
    except BaseException as error:  # SystemExit too: the other ranks would wait for this one
        launch.abort(world, error, error.__traceback__)
    launch.finish(job.world, code)


def refuse(error: StartError, command: str, arguments: list[str]) -> NoReturn:
    """Leave before ranks know of each other: the launcher's first rank speaks for all, and a node's for the node."""
    if launch.announced(launch.RANK_VARIABLES) not in (None, 0):
        if error.of_node and launch.announced(launch.LOCAL_RANK_VARIABLES) == 0:
            print(f"error on {platform.node()}: {error}", file=sys.stderr)  # noqa: T201
        time.sleep(launch.SECONDS_FOR_THE_FIRST)
    elif command == "doctor":
        from mpitrain.doctor.report import report_refusal

        report_refusal(error, error.part, as_json="--json" in arguments)
    else:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
    sys.exit(error.code)


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


def run(job: Job, command: str) -> int:
    """A command's exit code, the same on all ranks; errors that not all ranks share end the job instead."""
    from mpitrain.commands import HANDLERS
    from mpitrain.runtime import failpoints
    from mpitrain.runtime.agree import attempt, require_same
    from mpitrain.runtime.identity import program
    from mpitrain.runtime.notes import State, note

    world = job.world
    try:
        attempt(world, "reading the environment", lambda: failpoints.arm(world.rank))
        options, settings = attempt(world, "reading the configuration", lambda: _read_arguments(command, job.arguments))
        told = {"command": command, **vars(options), **config.flat(settings.model_dump(mode="json"), "--")}
        require_same(world, "settings", {key: str(value) for key, value in told.items()})
        if command != "doctor":  # which tells it as one of its findings
            require_same(world, "the program", attempt(world, "looking at the program", program))
        job.watch.hang_timeout = settings.runtime.hang_timeout
        job.console.level = settings.log.level
        job.watch.survives = settings.runtime.on_failure == "shrink"
        note(b"loading libraries", state=State.WORKING)
        failpoints.reach("start")
        return HANDLERS[command](job, options, settings)
    except MpitrainError as error:
        if not error.agreed:
            raise
        if job.world.rank == 0:
            job.console.stop_steps()
            print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return error.code


def _read_arguments(command: str, arguments: list[str]) -> tuple[argparse.Namespace, Config]:
    own, fields = split_arguments(arguments)
    options = command_parser(command).parse_args(own)
    if command in ("job", "plan"):
        options.fields = fields
    return options, config.load(fields, options.config)
