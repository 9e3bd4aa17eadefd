"""The script that `mpitrain job` writes, under a real Slurm of two virtual nodes."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from examining import assert_same_checkpoint
from launching import mpitrain
from slurm import Slurm, obstacle
from tiny import exit_of, make_tiny, metrics_of

from mpitrain.runtime.launch import library_version

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]
ROOT = Path(__file__).resolve().parents[2]
NUM_STEPS = 70
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL")
# A step takes a second before the first requeue: 70 are more than a minute.
SLOW_AT_FIRST = '[ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] || export MPITRAIN_FAILPOINT=update=sleep1\n'


@dataclass
class Site:
    """A folder to submit from, and the Slurm to submit to."""

    slurm: Slurm
    place: Path
    flags: list[str]

    def write(self, name: str, *flags: str, limit: str = "00:30:00") -> Path:
        """Have `mpitrain job` write a script for 2 ranks on each of 2 nodes."""
        told = ("--scheduler", "slurm", "--nodes", "2", "--ranks-per-node", "2", "--time", limit, "--script", name)
        done = mpitrain(0, "job", *told, *self.flags, *flags, cwd=self.place)
        assert done.returncode == 0, done.stdout + done.stderr
        return self.place / name

    def submit(self, script: Path) -> str:
        found = os.environ.get("PYTHONPATH", "")
        environment = {"MPITRAIN_CACHE": str(self.place / "cache"), "PYTHONPATH": f"{ROOT}:{found}"}
        return self.slurm.submit(script, cwd=self.place, **environment)

    def output(self, job: str) -> str:
        file = self.place / f"mpitrain-{job}.out"
        return file.read_text() if file.exists() else ""

    def wait(self, job: str, until: Callable[[dict[str, str]], bool], seconds: float = 600) -> dict[str, str]:
        limit = time.monotonic() + seconds
        while not until(found := self.slurm.job(job)):
            assert time.monotonic() < limit, f"{found}\n{self.output(job)[-6000:]}"
            time.sleep(0.5)
        return found

    def end(self, job: str) -> dict[str, str]:
        """What Slurm knows of a job that is over."""
        return self.wait(job, lambda found: found["JobState"] in OVER)


def data_of(run: Path) -> str:
    return str(json.loads((run / "config.json").read_text())["config"]["data"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Any:
    if found := obstacle():
        pytest.skip(f"reason: {found}")
    if "MPICH" not in library_version():
        pytest.skip("reason: Debian's srun has no PMIx, which this MPI needs")
    place = tmp_path_factory.mktemp("site")
    flags = [*make_tiny(place), "--train.max_steps", str(NUM_STEPS), "--train.epochs", "3"]
    prepared = mpitrain(0, "prepare", *flags, "--out", "shards of mine", cwd=place)
    assert prepared.returncode == 0, prepared.stdout + prepared.stderr
    flags[flags.index("--data") + 1] = "shards of mine"
    with Slurm(2) as slurm:
        yield Site(slurm, place, flags)


def test_a_job_that_hits_its_time_limit_is_requeued_and_ends_with_the_bits_of_one_that_does_not(site):
    script = site.write("limited.sh", "--out", "limited run", limit="00:01:00")
    disk = site.place / "disk of a node"
    text = script.read_text().replace("local_disk= ", f"local_disk='{disk}' ", 1)
    script.write_text(text.replace("set -euo pipefail\n", f"set -euo pipefail\n{SLOW_AT_FIRST}", 1))
    limited, reference = site.submit(script), site.submit(site.write("reference.sh", "--out", "reference"))
    for job in (limited, reference):
        found = site.end(job)
        assert (found["JobState"], found["ExitCode"]) == ("COMPLETED", "0:0"), site.output(job)
    assert int(site.slurm.job(limited)["Restarts"]) >= 1
    assert site.slurm.job(reference)["Restarts"] == "0"
    output = site.output(limited)
    assert "job script: mpitrain has left with code 75\n" in output and "\nresume   step" in output
    assert output.endswith("job script: mpitrain has left with code 0\n")
    assert "4 rank(s), 2 on this node" in output, "MPI took the two nodes for one"
    (copy,) = disk.iterdir()
    assert data_of(site.place / "limited run") == str(copy) and data_of(site.place / "reference") == "shards of mine"
    assert {file.name for file in copy.iterdir()} == {file.name for file in (site.place / "shards of mine").iterdir()}
    run, other = site.place / "limited run", site.place / "reference"
    assert [line["step"] for line in metrics_of(run)] == list(range(1, NUM_STEPS + 1))
    assert_same_checkpoint(run, other)
    assert (run / "eval.json").read_bytes() == (other / "eval.json").read_bytes()


def test_a_job_with_a_mistake_is_not_requeued(site):
    script = site.write("wrong.sh", "--out", "wrong", "--mesh.data", "2")
    text = script.read_text()
    assert text.count("--mesh.data 2") == 1
    script.write_text(text.replace("--mesh.data 2", "--mesh.data 3"))  # by hand: `job` would not
    job = site.submit(script)
    found = site.end(job)
    assert (found["JobState"], found["ExitCode"], found["Restarts"]) == ("FAILED", "64:0", "0"), site.output(job)
    assert "3 data x 1 pipe x 1 tensor = 3, but there are 4 ranks" in site.output(job)


def test_a_job_that_is_cancelled_stays_so(site):
    script = site.write("cancelled.sh", "--out", "cancelled")
    script.write_text(script.read_text().replace("set -euo pipefail\n", f"set -euo pipefail\n{SLOW_AT_FIRST}", 1))
    job = site.submit(script)
    site.wait(job, lambda found: len(metrics_of(site.place / "cancelled")) > 1)
    site.slurm.ask("scancel", job)
    found = site.end(job)
    site.wait(job, lambda found: not site.slurm.ask("squeue", "--noheader"))
    found = site.slurm.job(job)
    assert (found["JobState"], found["Restarts"]) == ("CANCELLED", "0"), site.output(job)


def test_a_signal_by_hand_saves_and_comes_back(site):
    script = site.write("asked.sh", "--out", "asked")
    script.write_text(script.read_text().replace("set -euo pipefail\n", f"set -euo pipefail\n{SLOW_AT_FIRST}", 1))
    job = site.submit(script)
    site.wait(job, lambda found: len(metrics_of(site.place / "asked")) > 1)
    site.slurm.ask("scancel", "--batch", "--signal=USR1", job)
    site.wait(job, lambda found: found["Restarts"] == "1")
    assert exit_of(site.place / "asked")["reason"] == "stopped by SIGUSR1"
    assert site.end(job)["JobState"] == "COMPLETED", site.output(job)
