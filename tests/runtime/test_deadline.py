"""The end of a job's time, as the user has it, or a scheduler's commands, which are played here by scripts."""

from __future__ import annotations

import math
import os
import subprocess
import time

import pytest

from mpitrain.runtime.deadline import SCHEDULERS, find_deadline

QSTAT = """Job Id: 17.server
    Job_Name = train
    resources_used.walltime = 00:20:30
    Resource_List.select = 2:ncpus=8:
\tmpiprocs=8
    Resource_List.walltime = 01:00:00
    Variable_List = PBS_O_HOME=/home/me,PBS_O_LANG=C
"""
ANSWERS = [
    ("SLURM_JOB_ID", "squeue", "1-02:03:04\n", 93784),
    ("SLURM_JOB_ID", "squeue", "14:30\n", 870),
    ("SLURM_JOB_ID", "squeue", "UNLIMITED\n", math.inf),
    ("PBS_JOBID", "qstat", QSTAT, 3600 - 1230),
    ("PBS_JOBID", "qstat", "Job Id: 17.server\n    Job_Name = train\n", math.inf),
    ("LSB_JOBID", "bjobs", "1:30 L\n", 5400),
    ("LSB_JOBID", "bjobs", "-\n", math.inf),
    ("FLUX_JOB_ID", "flux", "59.5\n", 59.5),
    ("FLUX_JOB_ID", "flux", "infinity\n", math.inf),
]


@pytest.fixture
def play(tmp_path, monkeypatch):
    """Put a command in place that prints an answer and writes down how it was called."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def put(command: str, answer: str, code: int = 0) -> None:
        (tmp_path / "answer").write_text(answer)
        (tmp_path / command).write_text(
            f'#!/bin/sh\necho "$0 $*" > {tmp_path}/told\ncat {tmp_path}/answer\nexit {code}\n'
        )
        (tmp_path / command).chmod(0o755)

    return put


@pytest.mark.parametrize("variable, command, answer, seconds", ANSWERS)
def test_a_scheduler_is_asked_for_the_job_of_this_program(play, tmp_path, variable, command, answer, seconds):
    play(command, answer)
    deadline, obstacle = find_deadline(None, {variable: "17"})
    assert obstacle == ""
    assert deadline.left() == pytest.approx(seconds, abs=5)
    asked = (tmp_path / "told").read_text()
    assert asked.endswith(" 17\n")
    name = next(each.name for each in SCHEDULERS if each.variable == variable)
    assert deadline.told_by == name


def test_slurm_tells_the_end_without_being_asked(play):
    play("squeue", "0:01")
    deadline, _ = find_deadline(None, {"SLURM_JOB_ID": "17", "SLURM_JOB_END_TIME": str(int(time.time()) + 1000)})
    assert deadline.left() == pytest.approx(1000, abs=5)


@pytest.mark.parametrize("answer, code", [("what?", 0), ("", 1), ("-1:00", 0)])
def test_a_scheduler_that_gives_no_answer_is_no_reason_to_end(play, answer, code):
    play("squeue", answer, code)
    deadline, obstacle = find_deadline(None, {"SLURM_JOB_ID": "17"})
    assert deadline.left() == math.inf
    assert obstacle.startswith("Slurm did not tell the time that is left: ")


def test_nor_is_one_whose_command_is_not_here(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert "squeue" in find_deadline(None, {"SLURM_JOB_ID": "17"})[1]


def test_a_user_s_limit_counts_from_the_start_of_the_program_and_nobody_is_asked(monkeypatch):
    monkeypatch.setattr(subprocess, "run", None)
    deadline, _ = find_deadline(1000.0, {"SLURM_JOB_ID": "17"})
    assert 0 < deadline.left() < 1000.0 - 0.1, "Python and the tests have taken some of it"
    assert find_deadline(0.0, {"SLURM_JOB_ID": "17"})[0].left() == math.inf
    assert find_deadline(None, {})[0].left() == math.inf
