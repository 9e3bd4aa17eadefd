"""`mpitrain job`: a batch script of the shelf with its site part filled in, so that one command line is a whole job.

The script stays what it is on the shelf: what is asked for replaces the values of lines that are there already, and
lines for which nothing is asked are left as they are, or put out of use.
"""

from __future__ import annotations

import argparse
import math
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from mpitrain.config import Config, flags_of
from mpitrain.errors import UsageError
from mpitrain.files import user_path
from mpitrain.runtime.library import family_of
from mpitrain.sections import seconds_of
from mpitrain.shelf import shelves

FLAGS = {"--scheduler", "--nodes", "--ranks-per-node", "--cores-per-rank", "--gpus-per-node", "--time"}
FLAGS |= {"--account", "--queue", "--partition", "--mpi", "--script"}
KNOWN = {"slurm": ("mpich", "intel", "openmpi", "cray"), "lsf": ("mpich", "intel", "openmpi", "spectrum")}
KNOWN["pbs"] = KNOWN["slurm"]  # families whose launcher the script has; Flux starts them all by its own
SUBMIT = {"slurm": "sbatch {}", "pbs": "qsub {}", "lsf": "bsub < {}", "flux": "flux batch {}"}
FAMILIES = {"Intel MPI": "intel", "Open MPI": "openmpi", "Cray MPICH": "cray", "Spectrum MPI": "spectrum"}
OF_THE_SCRIPT = ("--data", "--out")  # fields that have lines of their own there
PRINTED = Path("-")
SECONDS_TO_STOP = 180  # between USR1 and the end, in jobs that are long enough


def add_arguments(parser: argparse.ArgumentParser, count: Callable[[str], int]) -> None:
    """What is asked of the scheduler; `count` reads whole numbers above 0."""
    parser.add_argument("--scheduler", choices=SUBMIT, required=True, help="whose script")
    parser.add_argument("--nodes", type=count, required=True, metavar="N", help="of the job")
    parser.add_argument("--ranks-per-node", type=count, required=True, metavar="N", help="on each of them")
    parser.add_argument("--cores-per-rank", type=count, default=1, metavar="N", help="and its threads (default: 1)")
    parser.add_argument(
        "--gpus-per-node",
        type=lambda text: None if text == "0" else count(text),
        metavar="N",
        help="of its ranks (default: 0)",
    )
    parser.add_argument("--time", type=_seconds, required=True, metavar="[D-]HH:MM:SS", help="of each start of the job")
    parser.add_argument("--account", type=_word, metavar="NAME", help="project that pays")
    parser.add_argument("--queue", "--partition", type=_word, metavar="NAME", help="to wait in")
    families = ("mpich", *FAMILIES.values())
    parser.add_argument("--mpi", choices=families, help="whose launcher starts the ranks (default: that of this MPI)")
    parser.add_argument(
        "--script", type=Path, default=PRINTED, metavar="FILE", help="write it there (default: -, print it)"
    )


def _seconds(text: str) -> int:
    # Schedulers differ in what `30` and `2:00` mean.
    if not re.fullmatch(r"(\d+-)?\d+:\d\d:\d\d", text) or not (seconds := int(seconds_of(text))):
        raise argparse.ArgumentTypeError(f"found {text!r}; hours:minutes:seconds such as 02:00:00 would work")
    return seconds


def _word(text: str) -> str:
    if not re.fullmatch(r"\w[\w.@:/+,-]*", text, re.ASCII):  # no scheduler quotes in its directives as a shell does
        raise argparse.ArgumentTypeError(f"found {text!r}; a name of letters, digits and . _ @ : / + , - would work")
    return text


def write_script(options: argparse.Namespace, settings: Config, fields: Sequence[str], library: str) -> str:
    """Print the script, or write it to `--script`; then, what to do with it.

    Args:
        fields: the configuration's flags, as they were given.
        library: name of the MPI library that is in use here.

    Raises:
        UsageError: what is asked for cannot be, or the file is there already.
    """
    if settings.resume != "auto":
        raise UsageError(
            f"--resume {settings.resume}: each start of a job has to go on from its own run; leave it at auto"
        )
    text = fill(options, settings, fields, options.mpi or family(library))
    if options.script == PRINTED:
        sys.stdout.write(text)
        return ""
    with user_path("--script", options.script):
        try:
            with options.script.open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            raise UsageError(f"--script {options.script}: is there already; delete it or give another") from None
    submit = SUBMIT[options.scheduler].format(shlex.quote(str(options.script)))
    return f"{options.script}; look at its first lines, then: {submit}"


def family(library: str) -> str:
    """How the scripts call the one that an MPI library is of; all that they do not know start ranks as MPICH does."""
    return FAMILIES.get(family_of(library), "mpich")


def fill(options: argparse.Namespace, settings: Config, fields: Sequence[str], mpi: str) -> str:
    """The script, as text."""
    _require_mesh(settings, options.nodes, options.ranks_per_node)
    if mpi not in (known := KNOWN.get(options.scheduler, (mpi,))):
        raise UsageError(
            f"--mpi {mpi}: the script for {options.scheduler} starts ranks by {', '.join(known)}; give one"
        )
    out = settings.out or Path("runs") / f"{Path(settings.model).stem}-{Path(settings.data).stem}"
    arguments = ["--config", str(options.config)] if options.config else []
    arguments += [word for flag in flags_of(fields) if flag[0].partition("=")[0] not in OF_THE_SCRIPT for word in flag]
    variables: dict[str, object] = {
        "python=": shlex.quote(sys.executable),
        "mpi=": mpi,
        "data=": shlex.quote(settings.data),
        "run=": shlex.quote(str(out)),
        "arguments=": f"({shlex.join(arguments)})",
    }
    if options.scheduler == "flux":
        del variables["mpi="]  # its own launcher starts all
    text = (shelves("jobs")[0] / f"{options.scheduler}.sh").read_text(encoding="utf-8")
    for start, value in (variables | ASKED[options.scheduler](options, mpi)).items():
        text = _put(text, start, value)
    return text


def _require_mesh(settings: Config, num_nodes: int, per_node: int) -> None:
    """Refuse what no model could train on; `plan` tells whether this one can."""
    asked, num_ranks = settings.mesh.asked, num_nodes * per_node
    product = math.prod(asked.values())
    if num_ranks % product or ({"data", "pipe"} <= asked.keys() and num_ranks != product):  # then tensor is 1
        raise UsageError(
            f"{settings.mesh.flags}: the job has {num_ranks} ranks, of which no such mesh can be made; plan --ranks "
            f"{num_ranks} lists those that can"
        )
    if per_node % asked.get("tensor", 1) and not settings.mesh.tensor_across_nodes:
        raise UsageError(
            f"--mesh.tensor {asked['tensor']}: so many ranks share layers, and a node has {per_node}; a number that "
            "divides those, or --mesh.tensor_across_nodes true, would work"
        )


def _put(text: str, start: str, value: object) -> str:
    """Give the line that begins with `start` another value; a directive without one is put out of use.

    A directive is a whole line, a variable one word, behind which a remark may stand. Directives out of use have one
    more # in front, those of Flux one behind `#flux:`.
    """
    unused = start.replace("#flux: ", "#flux: # ") if start.startswith("#flux") else f"#{start}"
    if value is None:
        return re.sub(f"^{re.escape(start)}", unused, text, flags=re.M)
    rest = ".*" if start.startswith("#") else r"\S*( *(?=#))?"
    pattern = f"^(?:{re.escape(unused)}|{re.escape(start)}){rest}"
    text, number = re.subn(pattern, lambda line: f"{start}{value}{'  ' * line[0].endswith(' ')}", text, flags=re.M)
    assert number == 1, (start, number)
    return text


def _slurm(asked: argparse.Namespace, mpi: str) -> dict[str, object]:
    return {
        "#SBATCH --nodes=": asked.nodes,
        "#SBATCH --ntasks-per-node=": asked.ranks_per_node,
        "#SBATCH --cpus-per-task=": asked.cores_per_rank,
        "#SBATCH --gpus-per-node=": asked.gpus_per_node,
        "#SBATCH --account=": asked.account,
        "#SBATCH --partition=": asked.queue,
        "#SBATCH --time=": _clock(asked.time),
        "#SBATCH --signal=": f"B:USR1@{_seconds_to_stop(asked.time)}",
    }


def _pbs(asked: argparse.Namespace, mpi: str) -> dict[str, object]:
    cores = asked.ranks_per_node * asked.cores_per_rank
    node = f"ncpus={cores}:mpiprocs={asked.ranks_per_node}:ompthreads={asked.cores_per_rank}"
    node += f":ngpus={asked.gpus_per_node}" if asked.gpus_per_node else ""
    return {
        "#PBS -l select=": f"{asked.nodes}:{node}",
        "#PBS -A ": asked.account,
        "#PBS -q ": asked.queue,
        "#PBS -l walltime=": _clock(asked.time),
    }


def _lsf(asked: argparse.Namespace, mpi: str) -> dict[str, object]:
    by_nodes = mpi == "spectrum"
    place = f'"span[ptile={asked.ranks_per_node}] affinity[core({asked.cores_per_rank})]"'
    hours, minutes = divmod(math.ceil(asked.time / 60), 60)
    return {
        "#BSUB -n ": None if by_nodes else asked.nodes * asked.ranks_per_node,
        "#BSUB -R ": None if by_nodes else place,
        "#BSUB -nnodes ": asked.nodes if by_nodes else None,
        "#BSUB -gpu ": f'"num={asked.gpus_per_node}"' if asked.gpus_per_node and not by_nodes else None,
        "#BSUB -P ": asked.account,
        "#BSUB -q ": asked.queue,
        "#BSUB -W ": f"{hours:02}:{minutes:02}",
        "#BSUB -wt ": max(1, _seconds_to_stop(asked.time) // 60),
        "nodes=": asked.nodes,
        "per_node=": asked.ranks_per_node,
        "cores=": asked.cores_per_rank,
    }


def _flux(asked: argparse.Namespace, mpi: str) -> dict[str, object]:
    ranks, (gpus, left) = asked.nodes * asked.ranks_per_node, divmod(asked.gpus_per_node or 0, asked.ranks_per_node)
    if left:
        raise UsageError(
            f"--gpus-per-node {asked.gpus_per_node}: Flux gives each of the {asked.ranks_per_node} ranks of a node as "
            f"many; a multiple of {asked.ranks_per_node} would work"
        )
    return {
        "#flux: --nodes=": asked.nodes,
        "#flux: --nslots=": ranks,
        "#flux: --cores-per-slot=": asked.cores_per_rank,
        "#flux: --gpus-per-slot=": gpus or None,
        "#flux: --bank=": asked.account,
        "#flux: --queue=": asked.queue,
        "#flux: --time-limit=": f"{asked.time}s",
        "#flux: --signal=": f"USR1@{_seconds_to_stop(asked.time)}s",
        "nodes=": asked.nodes,
        "ranks=": ranks,
        "cores=": asked.cores_per_rank,
        "gpus=": gpus,
    }


ASKED: dict[str, Callable[[argparse.Namespace, str], dict[str, object]]] = {
    "slurm": _slurm,
    "pbs": _pbs,
    "lsf": _lsf,
    "flux": _flux,
}


def _seconds_to_stop(seconds: int) -> int:
    return max(1, min(SECONDS_TO_STOP, seconds // 3))


def _clock(seconds: int) -> str:
    minutes, seconds = divmod(seconds, 60)
    return f"{minutes // 60:02}:{minutes % 60:02}:{seconds:02}"
