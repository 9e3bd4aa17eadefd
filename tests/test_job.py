"""`mpitrain job`: what it fills in, and what it refuses."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from launching import mpitrain

from mpitrain.job import family
from mpitrain.shelf import shelves

ASKED = ("--nodes", "3", "--ranks-per-node", "4", "--cores-per-rank", "8", "--time", "1-02:00:00")
MORE = ("--gpus-per-node", "4", "--account", "chem-07", "--queue", "gpu.long", "--mpi", "intel")
# As the schedulers' manuals have it: 12 ranks on 3 nodes, 8 cores a rank, 26 hours.
DIRECTIVES = {
    "slurm": """--job-name=mpitrain --nodes=3 --ntasks-per-node=4 --cpus-per-task=8 --gpus-per-node=4 --account=chem-07
        --partition=gpu.long --time=26:00:00 --signal=B:USR1@180 --requeue --open-mode=append --output=%x-%j.out""",
    "pbs": """-N mpitrain -l select=3:ncpus=32:mpiprocs=4:ompthreads=8:ngpus=4 -l place=scatter -A chem-07 -q gpu.long
        -l walltime=26:00:00 -j oe -V""",
    "lsf": """-J mpitrain -n 12 -R "span[ptile=4] affinity[core(8)]" -gpu "num=4" -P chem-07 -q gpu.long -W 26:00
        -wa USR1 -wt 3 -Q 75 -o mpitrain-%J.lsf""",
    "flux": """--job-name=mpitrain --nodes=3 --nslots=12 --cores-per-slot=8 --gpus-per-slot=1 --bank=chem-07
        --queue=gpu.long --time-limit=93600s --signal=USR1@180s --output=mpitrain-{{id}}.out""",
}
SENTINELS = {"slurm": "#SBATCH ", "pbs": "#PBS ", "lsf": "#BSUB ", "flux": "#flux: "}
EACH = pytest.mark.parametrize("scheduler", DIRECTIVES)


def job(scheduler: str, *arguments: str, cwd: Path, ranks: int = 0, **environment: str) -> Any:
    return mpitrain(ranks, "job", "--scheduler", scheduler, *arguments, cwd=cwd, **environment)


def directives(scheduler: str, text: str) -> list[str]:
    """The words of all directives that are in use, before the first command."""
    lines = text[: text.index("\nset -euo")].splitlines()
    found = [line.removeprefix(sentinel) for line in lines if line.startswith(sentinel := SENTINELS[scheduler])]
    return [word for line in found for word in shlex.split(line, comments=scheduler == "flux")]


def variables(text: str, *names: str) -> list[list[str]]:
    """What a shell makes of the site part's variables."""
    lines = re.search(r"\npython=(.|\n)*?(?=\n\n)", text)
    assert lines
    show = "".join(f"printf '%s\\0' \"${{{name}[@]}}\"; printf '\\1'; " for name in names)
    done = subprocess.run(["bash", "-c", f"{lines[0]}\n{show}"], capture_output=True, text=True, timeout=20, check=True)
    return [part.split("\0")[:-1] for part in done.stdout.split("\1")[:-1]]


@EACH
def test_all_that_is_asked_for_stands_in_the_directives(tmp_path, scheduler):
    done = job(scheduler, *ASKED, *MORE, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert directives(scheduler, done.stdout) == shlex.split(DIRECTIVES[scheduler])


@EACH
def test_what_is_not_asked_for_is_out_of_use(tmp_path, scheduler):
    words = directives(scheduler, job(scheduler, *ASKED, cwd=tmp_path).stdout)
    assert not re.search("gpu|PROJECT|QUEUE|nnodes|-A|-P|-q|account|bank", " ".join(words)), words


@EACH
def test_the_rest_of_the_script_is_the_shelf_s(tmp_path, scheduler):
    shelf = (shelves("jobs")[0] / f"{scheduler}.sh").read_text()
    text = job(scheduler, *ASKED, "--out", "run", cwd=tmp_path).stdout
    first = "\n# By the process" if scheduler == "slurm" else "\nesac" if scheduler != "flux" else "\nlaunch="
    assert text.partition(first)[2] == shelf.partition(first)[2] != ""
    assert len(text.splitlines()) == len(shelf.splitlines())


@EACH
def test_values_reach_a_shell_as_they_were_given(tmp_path, scheduler):
    fields = ("--model", "a model's card", "--data", "my\nshards", "--out=my run", "--train.seed=3")
    (tmp_path / "my settings.toml").write_text("[train]\nepochs = 2\n")
    text = job(scheduler, *ASKED, *fields, "--config", "my settings.toml", cwd=tmp_path).stdout
    told = ["--config", "my settings.toml", "--model", "a model's card", "--train.seed=3"]
    assert variables(text, "python", "data", "run", "arguments") == [[sys.executable], ["my\nshards"], ["my run"], told]


def test_a_run_directory_is_named_after_model_and_data_and_the_file_may_tell_them(tmp_path):
    (tmp_path / "my.toml").write_text('model = "bert-tiny"\ndata = "corpora/mine"\n')
    text = job("slurm", *ASKED, "--config", "my.toml", cwd=tmp_path).stdout
    assert variables(text, "data", "run") == [["corpora/mine"], ["runs/bert-tiny-mine"]]


def test_jsrun_s_jobs_ask_for_whole_nodes(tmp_path):
    text = job("lsf", *ASKED, "--mpi", "spectrum", "--gpus-per-node", "4", cwd=tmp_path).stdout
    words = directives("lsf", text)
    assert words[words.index("-nnodes") + 1] == "3"
    assert not {"-n", "-R", "-gpu"} & set(words)


def test_two_queues_may_do_and_no_gpus_are_none(tmp_path):
    done = job("slurm", *ASKED, "--partition", "short,long", "--gpus-per-node", "0", cwd=tmp_path)
    words = directives("slurm", done.stdout)
    assert "--partition=short,long" in words and not any(word.startswith("--gpus") for word in words)


def test_short_jobs_are_warned_in_time(tmp_path):
    short = (*ASKED[:-1], "00:02:30")
    assert "--signal=B:USR1@50" in directives("slurm", job("slurm", *short, cwd=tmp_path).stdout)
    second = (*ASKED[:-1], "00:00:01")
    assert "--signal=B:USR1@1" in directives("slurm", job("slurm", *second, cwd=tmp_path).stdout)
    words = directives("lsf", job("lsf", *short, cwd=tmp_path).stdout)
    assert words[words.index("-W") + 1] == "00:03" and words[words.index("-wt") + 1] == "1"


@pytest.mark.parametrize(
    "library, found",
    [
        ("MPICH 5.0.2", "mpich"),
        ("Open MPI v5.0.11", "openmpi"),
        ("Intel(R) MPI Library 2021.16 for Linux* OS", "intel"),
        ("MPI VERSION : CRAY MPICH version 8.1.32", "cray"),
        ("IBM Spectrum MPI v10.4.0.6, Open MPI ident: 4.0.3rc1", "spectrum"),
        ("MVAPICH 4.0", "mpich"),
    ],
)
def test_the_family_is_that_of_the_library_here(library, found):
    assert family(library) == found


def test_under_a_launcher_one_rank_speaks(tmp_path):
    alone = job("pbs", *ASKED, cwd=tmp_path)
    together = job("pbs", *ASKED, cwd=tmp_path, ranks=2)
    assert (together.returncode, together.stdout) == (0, alone.stdout), together.stderr


def test_a_script_is_written_once_and_says_how_to_submit_it(tmp_path):
    first = job("lsf", *ASKED, "--script", "my job.sh", cwd=tmp_path)
    assert first.returncode == 0
    assert first.stdout == "job      my job.sh; look at its first lines, then: bsub < 'my job.sh'\n"
    text = (tmp_path / "my job.sh").read_text()
    again = job("lsf", *ASKED, "--script", "my job.sh", "--train.seed", "1", cwd=tmp_path)
    assert again.returncode == 64 and "--script my job.sh: is there already" in again.stderr
    assert (tmp_path / "my job.sh").read_text() == text


WRONG = [
    ("slurm", ASKED[2:], "the following arguments are required: --nodes"),
    ("sge", ASKED, "invalid choice: 'sge' .*slurm.*pbs.*lsf.*flux"),
    ("slurm", (*ASKED, "--time", "30"), "--time: found '30'; hours:minutes:seconds such as 02:00:00 would work"),
    ("slurm", (*ASKED, "--time", "00:00:00"), "--time: found '00:00:00'"),
    ("slurm", (*ASKED, "--nodes", "0"), "--nodes: found '0'; a whole number above 0 would work"),
    ("pbs", (*ASKED, "--account", "a b"), "found 'a b'; a name of letters, digits"),
    ("pbs", (*ASKED, "--queue", "-x"), "expected one argument|found '-x'"),
    (
        "pbs",
        (*ASKED, "--mpi", "spectrum"),
        "--mpi spectrum: the script for pbs starts ranks by mpich, intel, openmpi, cray",
    ),
    ("lsf", (*ASKED, "--mpi", "cray"), "--mpi cray: .* spectrum; give one"),
    ("slurm", (*ASKED, "--mesh.pipe", "5"), "--mesh.pipe 5: the job has 12 ranks"),
    ("slurm", (*ASKED, "--mesh.data", "2", "--mesh.pipe", "2", "--mesh.tensor", "2"), "the job has 12 ranks"),
    ("slurm", (*ASKED, "--mesh.data", "2", "--mesh.pipe", "2"), "the job has 12 ranks"),
    ("slurm", (*ASKED, "--mesh.tensor", "6"), "--mesh.tensor 6: so many ranks share layers, and a node has 4"),
    ("slurm", (*ASKED, "--out", ""), "--out: .*a directory would work; found ''"),
    ("lsf", (*ASKED, "--resume", "none"), "--resume none: each start of a job has to go on from its own run"),
    ("flux", (*ASKED, "--gpus-per-node", "6"), "--gpus-per-node 6: .*4 ranks.*a multiple of 4 would work"),
    ("slurm", (*ASKED, "--train.epochs", "x"), "--train.epochs: .*found 'x'"),
    ("slurm", (*ASKED, "--script", "no/such/folder"), "--script no/such/folder: No such file or directory"),
]


@pytest.mark.parametrize("scheduler, arguments, message", WRONG)
def test_a_mistake_is_told_and_nothing_is_printed(tmp_path, scheduler, arguments, message):
    done = job(scheduler, *arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (64, ""), done.stderr
    assert re.search(message, done.stderr, re.S), done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
