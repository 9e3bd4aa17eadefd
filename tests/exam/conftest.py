"""The exam's table: each case, what was injected, what came of it, and how long it took.

Without ROUNDS in the environment (`make exam` sets it) a quick part is done: every place of a save (case 2), and a
quarter of what else a case does with other parameters.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

ROWS = pytest.StashKey[list[tuple[int, str, str, float]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "case(number): of the exam; what is injected is the test's parameters")
    config.stash[ROWS] = []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "ROUNDS" in os.environ:
        return
    keep, leave, seen = [], [], Counter[str]()
    for item in items:
        case, name = item.get_closest_marker("case"), item.nodeid.partition("[")[0]
        (keep if case is None or case.args[0] == 2 or seen[name] % 4 == 0 else leave).append(item)
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


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = sorted(config.stash.get(ROWS, []), key=lambda row: row[0])
    if rows:
        terminalreporter.write_sep("=", "exam")
        width = max(len(injected) for _, injected, *_ in rows)
        for number, injected, found, seconds in rows:
            terminalreporter.write_line(f"{number:4}  {injected:<{width}}  {seconds:6.1f} s  {found}")


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
