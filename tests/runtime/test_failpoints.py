"""Fail-points strike where, when and whom they are told to, and nobody else."""

from __future__ import annotations

import errno
import re
from pathlib import Path

import pytest
import torch

from mpitrain.errors import UsageError
from mpitrain.runtime import failpoints


@pytest.fixture
def armed(monkeypatch):
    """Arm rank 1 with a text."""

    def arm(text):
        monkeypatch.setenv(failpoints.VARIABLE, text)
        failpoints.arm(1)

    yield arm
    monkeypatch.delenv(failpoints.VARIABLE)
    failpoints.arm(1)


def visits_that_raise(place):
    found = []
    for visit in (1, 2, 3):
        try:
            failpoints.reach(place)
        except RuntimeError:
            found.append(visit)
    return found


@pytest.mark.parametrize(
    "text, visits",
    [
        ("", []),
        ("forward=raise", [1, 2, 3]),
        ("forward:1=raise", [1, 2, 3]),
        ("forward:*:3=raise", [3]),
        ("forward:1:2=raise", [2]),
        ("forward:0:2=raise", []),
        ("backward=raise", []),
        ("backward=raise,forward:1:1=raise", [1]),
    ],
)
def test_rank_and_visit_are_told_apart(armed, text, visits):
    armed(text)
    assert visits_that_raise("forward") == visits


def test_values_are_spoilt(armed):
    armed("gradient:1:1=nan,update:1:1=flip")
    values = torch.ones(2, 3)
    failpoints.reach("gradient", lambda: values)
    assert values.isnan().sum() == 1
    failpoints.reach("gradient", lambda: pytest.fail("asked for in vain"))
    values = torch.ones(2, 3)
    failpoints.reach("update", lambda: values)
    changed = values.view(torch.int32) ^ torch.ones(2, 3).view(torch.int32)
    assert changed.flatten().tolist() == [1, 0, 0, 0, 0, 0]


def test_a_full_disk_and_a_nap(armed):
    armed("save.begin=full,data=sleep0.01")
    with pytest.raises(OSError) as caught:
        failpoints.reach("save.begin")
    assert caught.value.errno == errno.ENOSPC
    failpoints.reach("data")


@pytest.mark.parametrize(
    "text", ["forward", "nowhere=kill", "forward=explode", "forward:x=kill", "forward:1:0=kill", "data=sleep1..2"]
)
def test_a_slip_is_told(armed, text):
    with pytest.raises(UsageError, match=f"found '{text}'; .*save.begin.* an action of kill, .*flip"):
        armed(text)


def test_a_place_is_struck_in_one_way_only(armed):
    with pytest.raises(UsageError, match=r"found 'forward:1=raise'; .*each place once"):
        armed("forward=kill,forward:1=raise")


def test_every_place_is_in_the_code_once():
    code = "".join(path.read_text() for path in Path(failpoints.__file__).parents[1].rglob("*.py"))
    assert sorted(re.findall(r'reach\("([a-z.]+)"', code)) == sorted(failpoints.PLACES)
