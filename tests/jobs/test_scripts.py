"""The scripts of the shelf, each played against stand-ins of its scheduler's commands."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from launching import mpitrain
from stand_ins import ROOT, Act
from tiny import exit_of, make_tiny, metrics_of

SCHEDULERS = ["slurm", "pbs", "lsf", "flux"]
# What the launchers' manuals want for 4 ranks on 2 nodes, one core each; and for one process on each node.
PLAIN = (["mpiexec", "-n", "4", "-ppn", "2"], ["mpiexec", "-n", "2", "-ppn", "1"])
OPEN_MPI = (
    ["mpirun", "-np", "4", "--map-by", "ppr:2:node:PE=1"],
    ["mpirun", "-np", "2", "--map-by", "ppr:1:node"],
)
SRUN = ["srun", "--kill-on-bad-exit=1", "--cpu-bind=cores", "--cpus-per-task=1"]
SRUN_ONCE = ["srun", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--mpi=none"]
JSRUN = ["jsrun", "--nrs", "2", "--rs_per_host", "1", "--cpu_per_rs", "ALL_CPUS", "--gpu_per_rs", "ALL_GPUS"]
LAUNCHERS = {
    ("slurm", "mpich"): ([*SRUN, "--mpi=pmi2"], SRUN_ONCE),
    ("slurm", "openmpi"): ([*SRUN, "--mpi=pmix"], SRUN_ONCE),
    ("slurm", "cray"): (SRUN, SRUN_ONCE),
    ("pbs", "mpich"): ([*PLAIN[0], "-bind-to", "core:1"], PLAIN[1]),
    ("pbs", "intel"): PLAIN,
    ("pbs", "openmpi"): OPEN_MPI,
    ("pbs", "cray"): (
        ["mpiexec", "-n", "4", "--ppn", "2", "--depth", "1", "--cpu-bind", "depth"],
        ["mpiexec", "-n", "2", "--ppn", "1"],
    ),
    ("lsf", "mpich"): ([*PLAIN[0], "-bind-to", "core:1"], PLAIN[1]),
    ("lsf", "intel"): PLAIN,
    ("lsf", "openmpi"): OPEN_MPI,
    ("lsf", "spectrum"): ([*JSRUN, "--tasks_per_rs", "2", "--bind", "packed:1"], [*JSRUN, "--tasks_per_rs", "1"]),
    ("flux", ""): (
        ["flux", "run", "--nodes=2", "--ntasks=4", "--cores-per-task=1", "-o", "cpu-affinity=per-task"],
        ["flux", "exec"],
    ),
}
SITES = pytest.mark.parametrize("scheduler, mpi", LAUNCHERS)
EACH = pytest.mark.parametrize("scheduler", SCHEDULERS)
AWKWARD = ["--model", "a model's card", "$(touch spoilt)", 'two\nlines "quoted"', "*", ""]
QUOTED = "(--model 'a model'\\''s card' '$(touch spoilt)' 'two\nlines \"quoted\"' '*' '')"


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 60) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit
        time.sleep(0.02)


def test_below_the_site_part_all_scripts_are_the_same():
    bodies = {
        (ROOT / "jobs" / f"{name}.sh").read_text().partition("# ---- the same in every")[2] for name in SCHEDULERS
    }
    assert len(bodies) == 1
    assert len(bodies.pop().splitlines()) > 30


@SITES
def test_ranks_start_as_the_launcher_of_the_mpi_library_has_it(tmp_path, scheduler, mpi):
    act = Act(tmp_path, scheduler)
    done = act.run(act.script(mpi=mpi, data="shards", run="here"))
    assert done.returncode == 0, done.stdout + done.stderr
    program = [str(act.folder / "program"), "-m", "mpitrain", "--data", "shards", "--out", "here"]
    assert act.asked() == [[*LAUNCHERS[scheduler, mpi][0], *program]]
    assert act.argv() == [program[1:]] * 4


def test_flux_gives_each_rank_its_gpus(tmp_path):
    act = Act(tmp_path, "flux")
    assert act.run(act.script(gpus="2")).returncode == 0
    assert "--gpus-per-task=2" in act.asked()[0]


@EACH
@pytest.mark.parametrize("code", [75, 0, 64, 65, 66, 70, 93, 1, 137])
def test_75_leads_to_another_start_and_no_other_code_does(tmp_path, scheduler, code):
    act = Act(tmp_path, scheduler)
    script = act.script()
    done = act.run(script, CODE=str(code))
    assert done.returncode == code, done.stdout + done.stderr
    following = act.next_job(script, code)
    assert (following is not None) == (code == 75)
    assert f"job script: mpitrain has left with code {code}\n" in done.stdout + done.stderr
    if following:
        assert Path(following[0]).read_text() == script.read_text()


@EACH
@pytest.mark.parametrize("code, told, found", [(137, 75, 75), (143, 0, 0), (64, 75, 64), (137, "", 137), (1, "x", 1)])
def test_a_code_of_the_launchers_own_gives_way_to_what_the_run_has_told(tmp_path, scheduler, code, told, found):
    act = Act(tmp_path, scheduler)
    script = act.script(run=".")
    (tmp_path / "exit.json").write_text('{\n "code": 75,\n "reason": "of the last start"\n}\n')
    done = act.run(script, CODE=str(code), TOLD=str(told))
    assert done.returncode == found, done.stdout + done.stderr
    assert (act.next_job(script, done.returncode) is not None) == (found == 75)


@pytest.mark.parametrize("scheduler", ["slurm", "pbs", "flux"])
def test_a_start_that_is_refused_is_told_and_the_code_stays(tmp_path, scheduler):
    act = Act(tmp_path, scheduler)
    done = act.run(act.script(), CODE="75", REFUSE="1")
    assert done.returncode == 75
    assert "error: cannot be started again from here" in done.stderr


@EACH
@pytest.mark.parametrize("signals", [1, 3])
def test_usr1_reaches_the_launcher_once_for_each_signal_and_its_own_code_is_what_counts(tmp_path, scheduler, signals):
    act = Act(tmp_path, scheduler)
    script = act.script()
    process = act.begin(script, CODE="75", SIGNALS=str(signals))
    wait_for(lambda: len(list(tmp_path.glob("ready.*"))) == 4, process)
    for number in range(signals):
        assert act.signals() == number
        os.kill(process.pid, signal.SIGUSR1)
        wait_for(lambda sent=number: process.poll() is not None or act.signals() > sent, process)
        time.sleep(0.2)  # a second one would have come by then
    done = act.end(process)
    assert (done.returncode, act.signals()) == (75, signals), done.stdout + done.stderr
    assert act.next_job(script, 75) is not None


@EACH
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_job_that_is_cancelled_asks_for_no_other_start(tmp_path, scheduler, number):
    act = Act(tmp_path, scheduler)
    process = act.begin(act.script(), CODE="75", SIGNALS="1")
    wait_for(lambda: len(list(tmp_path.glob("ready.*"))) == 4, process)
    os.kill(process.pid, number)  # the shell first; its ranks may yet save and leave with 75
    assert process.wait(20) == -number
    os.killpg(process.pid, signal.SIGUSR1)
    act.end(process)
    assert len(act.asked()) == 1


@EACH
def test_words_with_blanks_quotes_and_lines_arrive_as_they_are(tmp_path, scheduler):
    act = Act(tmp_path, scheduler)
    script = act.script(arguments=QUOTED, data="'my shards'", run="'my run'")
    at_submission = ["--train.seed", "1 2"] if scheduler in ("slurm", "flux") else []
    assert act.run(script, *at_submission, CODE="75").returncode == 75
    told = ["-m", "mpitrain", "--data", "my shards", "--out", "my run", *AWKWARD, *at_submission]
    assert act.argv() == [told] * 4
    assert not (tmp_path / "spoilt").exists()
    following = act.next_job(script, 75)
    assert following is not None
    assert following[1:] == (at_submission if scheduler == "flux" else [])  # Slurm keeps them itself


@SITES
def test_shards_are_copied_once_to_each_node_and_read_there(tmp_path, scheduler, mpi):
    act = Act(tmp_path, scheduler)
    shards, disk = tmp_path / "my shards", tmp_path / "local disk"
    (shards / "below").mkdir(parents=True)
    (shards / "dataset.json").write_text("{}")
    (shards / "below" / "train.h5").write_text("sentences")
    script = act.script(mpi=mpi, data="'my shards'", local_disk=f"'{disk}'")
    for start in (1, 2):  # the copy of the first is there at the second, on the same node
        done = act.run(script)
        assert done.returncode == 0, done.stdout + done.stderr
        (copy,) = disk.iterdir()
        assert (copy / "below" / "train.h5").read_text() == "sentences"
        staging, launch = act.asked()[-2:]
        once_per_node = LAUNCHERS[scheduler, mpi][1]
        assert len(act.asked()) == 2 * start
        assert staging[: len(once_per_node) + 1] == [*once_per_node, "bash"]
        assert staging[-2:] == [str(shards), str(copy)]
        assert launch[launch.index("--data") + 1] == str(copy)
    (shards / "dataset.json").write_text('{"other": 1}')
    assert act.run(script).returncode == 0
    assert len(list(disk.iterdir())) == 2, "another dataset of the same name has another copy"


@EACH
def test_what_is_no_prepared_dataset_is_not_copied(tmp_path, scheduler):
    act = Act(tmp_path, scheduler)
    done = act.run(act.script(data="sample", local_disk=f"'{tmp_path}/disk'"))
    assert done.returncode == 64
    assert "error: local_disk is for prepared shards; sample holds none" in done.stdout + done.stderr
    assert act.asked() == []


@EACH
def test_a_copy_that_fails_ends_the_job(tmp_path, scheduler):
    act = Act(tmp_path, scheduler)
    (tmp_path / "dataset.json").write_text("{}")
    (tmp_path / "full").touch()
    script = act.script(data=".", local_disk=f"'{tmp_path}/full'")
    done = act.run(script)
    assert done.returncode == 64
    assert f"error: local_disk: {tmp_path}/full takes no copy" in done.stdout + done.stderr
    assert len(act.asked()) == 1


@EACH
def test_a_training_stopped_by_usr1_goes_on_in_the_next_start_until_it_is_done(tmp_path, scheduler):
    act = Act(tmp_path, scheduler, hosts=("localhost", "localhost"))
    nodes, per_node = ("1", "2") if scheduler in ("pbs", "lsf") else ("2", "1")
    told = ("--nodes", nodes, "--ranks-per-node", per_node, "--time", "00:10:00", "--script", "job.sh")
    flags = [*make_tiny(tmp_path), "--train.max_steps", "12", "--train.epochs", "1", "--out", "a run"]
    written = mpitrain(0, "job", "--scheduler", scheduler, *told, *flags, cwd=tmp_path)
    assert written.returncode == 0, written.stdout + written.stderr
    script, run = tmp_path / "job.sh", tmp_path / "a run"
    here = {"MPITRAIN_CACHE": str(tmp_path / "cache"), "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    process = act.begin(script, **here, MPITRAIN_FAILPOINT="update=sleep0.5")
    wait_for(lambda: len(metrics_of(run)) > 1, process)
    os.kill(process.pid, signal.SIGUSR1)
    done = act.end(process)
    assert done.returncode == 75, done.stdout + done.stderr
    assert exit_of(run)["reason"] == "stopped by SIGUSR1"
    following = act.next_job(script, 75)
    assert following is not None
    act.log.unlink(missing_ok=True)
    done = act.run(Path(following[0]), *following[1:], **here)
    assert "python -m mpitrain evaluate --checkpoint 'a run'\n" in done.stdout + done.stderr
    assert done.returncode == 0, done.stdout + done.stderr
    assert act.next_job(script, 0) is None
    assert [line["step"] for line in metrics_of(run)] == list(range(1, 13))
    assert re.search(r"^resume   step \d+", done.stdout, re.M)
    if scheduler not in ("slurm", "flux"):  # there the stand-in hides whose job it is
        told_by = {"pbs": "PBS", "lsf": "LSF"}[scheduler]
        assert re.search(rf"^time     0:(09|10):\d\d left \({told_by}\)", done.stdout, re.M), done.stdout


def test_the_script_for_one_machine_leaves_with_the_code_of_the_program(tmp_path):
    act = Act(tmp_path, "slurm")
    here = {"PYTHON": str(act.folder / "program"), "RANKS": "3", "RUN": "a run", "CODE": "75"}
    done = act.run(ROOT / "jobs" / "local.sh", "--model", "a card", **here)
    assert done.returncode == 75, done.stderr
    assert act.argv() == [["-m", "mpitrain", "--out", "a run", "--model", "a card"]] * 3
