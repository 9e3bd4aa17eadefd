"""The exam's table: each case, what was injected, what came of it, and how long it took.

Without ROUNDS in the environment (`make exam` sets it) a quick part is done, on two ranks mostly: every place of a save
(case 2), and a sixth of what else a case does with other parameters. The whole exam fails if a case was not visited.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mpitrain.runtime.launch import library_version

ROWS = pytest.StashKey[list[tuple[int | str, str, str, float]]]()
NO_PARAMETERS = SimpleNamespace(params={})
CASES = {
    1: "a rank or mpirun killed at a random instant",
    2: "killed at each stage of a save",
    3: "one rank alone fails",
    4: "the same numbers on any mesh",
    5: "stopped at every kind of step, and twice",
    6: "damaged checkpoints and shards",
    7: "a bad pointer to the latest checkpoint",
    8: "half a save, a copied checkpoint",
    9: "signals in any phase, twice",
    10: "NaN and Inf on one rank",
    11: "exact evaluation",
    12: "checkpoints on another mesh",
    13: "a save beside the training",
    14: "a rank that hangs",
    15: "replicas that drift apart",
    16: "no space left",
    17: "what is kept",
    18: "ranks that disagree at the start",
    19: "a directory that not all ranks see",
    20: "the order of the data",
    21: "shards that cannot be right",
    22: "prepare killed, and twice at a time",
    23: "a cold cache, and many who fill it",
    24: "sums of zero, odd and long tensors",
    25: "sends that nothing buffers",
    26: "a fault at every start",
    27: "the end of the job's time",
    28: "no memory for one rank",
    29: "the launcher dies, the output closes",
    30: "a wrong launch",
    31: "two jobs, one directory",
    32: "a directory that is read-only, or vanishes",
    33: "a slow rank",
    34: "no worker processes",
    35: "quirks of tagged text, and random input",
    36: "long sentences and words",
    37: "scores as seqeval has them",
    38: "labels of pieces",
    39: "pickles",
    40: "names that lead elsewhere",
    41: "HDF5 traps",
    42: "going on without ranks that died",
}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "case(number): of the exam; what is injected is the test's parameters")
    config.addinivalue_line("markers", "whole: not in the quick part of the exam")
    config.addinivalue_line("markers", "ulfm: needs an MPI that goes on when ranks die, as Open MPI can")
    config.stash[ROWS] = []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    keep, leave, seen = [], [], Counter[str]()
    whole, can_lose_ranks = "ROUNDS" in os.environ, "Open MPI" in library_version()
    for item in items:
        case, name = item.get_closest_marker("case"), item.nodeid.partition("[")[0]
        large = item.get_closest_marker("whole") or getattr(item, "callspec", NO_PARAMETERS).params.get("ranks", 2) != 2
        if (item.get_closest_marker("ulfm") and not can_lose_ranks) or (large and not whole):
            leave.append(item)
            continue
        (keep if whole or case is None or case.args[0] == 2 or seen[name] % 6 == 0 else leave).append(item)
        seen[name] += 1
    items[:] = keep
    config.hook.pytest_deselected(items=leave)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    outcome = yield
    report = outcome.get_result()
    case = item.get_closest_marker("case")
    if case is not None and report.when == "call":
        told = dict(report.user_properties)
        injected = str(told.get("injected", item.name))
        found = str(told.get("outcome", "")) if report.passed else report.outcome.upper()
        item.config.stash[ROWS].append((case.args[0], injected, found, report.duration))


@pytest.hookimpl(hookwrapper=True)
def pytest_sessionfinish(session: pytest.Session) -> Iterator[None]:
    """The whole exam has to come to all cases."""
    yield
    missing = sorted(CASES.keys() - {row[0] for row in session.config.stash.get(ROWS, [])})
    if is_whole(session.config) and missing:
        reporter = session.config.pluginmanager.getplugin("terminalreporter")
        reporter.write_line(f"cases that were not visited: {', '.join(map(str, missing))}", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def is_whole(config: pytest.Config) -> bool:
    """Whether nothing of it was left out by whoever has started it."""
    asked = [Path(argument).resolve() for argument in config.args]
    return "ROUNDS" in os.environ and asked == [Path(__file__).parent] and not config.option.keyword


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = sorted(config.stash.get(ROWS, []), key=lambda row: (isinstance(row[0], str), row[0]))
    if not rows:
        return
    terminalreporter.write_sep("=", "exam")
    width = max(len(injected) for _, injected, *_ in rows)
    for number, injected, found, seconds in rows:
        terminalreporter.write_line(f"{number:>4}  {injected:<{width}}  {seconds:6.1f} s  {found}")
    terminalreporter.write_sep("=", "exam, by case: how often, how many came out right, seconds at most")
    for number, of_case in groupby(rows, key=lambda row: row[0]):
        found = list(of_case)
        right = sum(row[2] != "FAILED" for row in found)
        title = CASES[number] if isinstance(number, int) else "known bugs, put in, are caught"
        terminalreporter.write_line(
            f"{number:>4}  {title:<45} {len(found):5} {right:5} {max(row[3] for row in found):8.1f}"
        )


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The training that nobody interrupts."""
    from examining import Exam

    return Exam(tmp_path_factory.mktemp("exam"))


@pytest.fixture
def told(record_property: Any) -> Any:
    """Call it with what was injected and what came of it."""

    def tell(injected: str, outcome: str) -> None:
        record_property("injected", injected)
        record_property("outcome", outcome)

    return tell
