"""`plan` shows what each stage would hold, for ranks that are not there, and draws the schedule."""

from __future__ import annotations

import re

import pytest
from launching import mpitrain

SHAPE = ("--ranks", "8", "--mesh.pipe", "4", "--model", "bert-base-cased", "--train.micro_batches", "8")


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_plan_of_a_job_is_shown_without_it(tmp_path, ranks):
    flags = ("--pipeline.schedule", "zb-v", "--pipeline.balance", "measured")
    done = mpitrain(ranks, "plan", *SHAPE, *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "a plan splits the model by estimated cost" in done.stdout + done.stderr
    assert done.stdout.count("8 rank(s) = 2 data x 4 pipe") == 1
    assert "zb-v, up to 4 micro-batches a replica and step" in done.stdout
    sizes = [int(size.replace(",", "")) for size in re.findall(r"^\d .*?  +([\d,]{9,})", done.stdout, re.MULTILINE)]
    assert len(sizes) == 4
    assert sum(sizes) == 107_726_601, "of bert-base-cased with nine labels"
    assert list(tmp_path.iterdir()) == []


def test_the_schedule_is_drawn_on_the_terminal_and_into_files(tmp_path):
    flags = (*SHAPE, "--pipeline.schedule", "zb-h1", "--show-schedule", "--out", "drawn")
    done = mpitrain(1, "plan", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = re.findall(r"^stage (\d)  ([0-3a-dA-D.]+)$", done.stdout, re.MULTILINE)
    assert [stage for stage, _ in lines] == ["0", "1", "2", "3"]
    for _, line in lines:
        assert set("0123abcdABCD") <= set(line)
    assert (tmp_path / "drawn" / "schedule.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "drawn" / "schedule.svg").read_text()


def test_what_does_not_fit_is_said(tmp_path):
    done = mpitrain(1, "plan", "--ranks", "4", "--mesh.pipe", "3", cwd=tmp_path)
    assert done.returncode == 64
    assert "3 pipe x 1 tensor = 3, but there are 4 ranks" in done.stderr
