"""Cores that ranks share, and those of the job that a binding hides."""

from __future__ import annotations

import os
from fractions import Fraction
from itertools import chain

import pytest

from mpitrain.runtime import cores
from mpitrain.runtime.cores import are_crowded, ranges, read_ranges, shares, usable_cores


@pytest.mark.parametrize(
    "masks, each, crowded",
    [
        ([[0, 1], [2, 3]], [2, 2], False),
        ([[0, 1], [0, 1]], [1, 1], False),
        ([[0, 1, 2], [2, 3]], [Fraction(5, 2), Fraction(3, 2)], False),
        ([[0]] * 8, [Fraction(1, 8)] * 8, True),
        ([[0], [0], [1, 2, 3]], [Fraction(1, 2), Fraction(1, 2), 3], True),
    ],
)
def test_a_core_is_shared_by_those_who_have_it(masks, each, crowded):
    assert shares(masks) == each
    assert are_crowded(masks) == crowded


def test_runs_of_cores_are_told_by_their_ends():
    assert (ranges([]), ranges([3]), ranges([0, 1, 2, 5, 8, 9])) == ("", "3", "0-2, 5, 8-9")
    assert (read_ranges("3\n"), read_ranges("0-2,5,8-9\n")) == ((3,), (0, 1, 2, 5, 8, 9))


def test_hardware_threads_of_a_core_belong_together(tmp_path, monkeypatch):
    monkeypatch.setattr(cores, "SIBLINGS", str(tmp_path / "{}"))
    monkeypatch.setattr(cores, "_unbound", lambda: [0, 1, 2, 4, 7])
    for thread, core in enumerate(["0,3", "1,4", "2,5", "0,3", "1,4", "2,5"]):
        (tmp_path / str(thread)).write_text(core + "\n")
    assert usable_cores() == [[0], [1, 4], [2], [7]]  # 3 and 5 are others', and of 7 nothing is told


def test_a_binding_hides_no_core_and_is_left_as_it_was():
    before = os.sched_getaffinity(0)
    everything = usable_cores()
    assert set(chain(*everything)) >= before
    os.sched_setaffinity(0, {min(before)})
    try:
        assert usable_cores() == everything
        assert os.sched_getaffinity(0) == {min(before)}
    finally:
        os.sched_setaffinity(0, before)
