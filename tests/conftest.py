"""One suite for any number of ranks.

Plain `pytest` runs the serial tests and, through test_under_mpirun.py, the tests marked `mpi` at several numbers of
ranks. `mpirun -np N python -m pytest --with-mpi` runs everything that fits N ranks. Under more than one rank a failure
ends the run on all ranks at once: the others would wait in the next collective call for ever.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent / "support"))
signal.signal(signal.SIGINT, signal.default_int_handler)  # `make test &` has it ignored, by whatever is started, too


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Only rank 0 reports; the others speak up when something fails."""
    config.addinivalue_line("markers", "gpu: needs a GPU (make test-gpu)")
    config.addinivalue_line("markers", "hosts: needs emulated hosts, and so root (make test-hosts)")
    config.addinivalue_line("markers", "slurm: needs Slurm's programs, and root to start them (make test-slurm)")
    config.addinivalue_line("markers", "browser: needs Chromium (make test-browser)")
    if _with_mpi(config) and _world().rank > 0:
        reporter = config.pluginmanager.getplugin("terminalreporter")
        reporter._tw._file = Path(os.devnull).open("w")  # noqa: SIM115 - open for as long as the process lives


@pytest.fixture(scope="session", autouse=True)
def _library_of_the_program() -> None:
    """What makes fp32 products here makes them in tests too."""
    from mpitrain.model import linear

    linear.use(linear.suits_maker())


def _with_mpi(config: pytest.Config) -> bool:
    return bool(config.getoption("--with-mpi") or config.getoption("--only-mpi"))


def _world() -> Any:
    from mpi4py import MPI

    return MPI.COMM_WORLD


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out, rather than skip, what another run of the suite covers; so that a skip always means something."""
    ranks = _world().size if _with_mpi(config) else 0
    keep, leave = [], []
    for item in items:
        mark = item.get_closest_marker("mpi")
        smallest, largest = (mark.kwargs.get(key, ranks) for key in ("min_size", "max_size")) if mark else (0, 0)
        fits = mark is None or (ranks > 0 and smallest <= ranks <= largest)
        asked = config.getoption("-m") or ""
        special = ("gpu", "hosts", "slurm", "browser")
        opted = all(name in asked for name in special if item.get_closest_marker(name) is not None)
        alone = ranks == 0 or (ranks == 1 and not config.getoption("--only-mpi"))
        wanted = fits and (mark is not None or alone) and opted
        (keep if wanted else leave).append(item)
    items[:] = keep
    config.hook.pytest_deselected(items=leave)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """A failure on one rank ends the run on all ranks, with that rank's traceback."""
    outcome = yield
    report = outcome.get_result()
    if report.failed and _with_mpi(item.config) and _world().size > 1:
        world = _world()
        text = f"\n[rank {world.rank} of {world.size}] FAILED {item.nodeid} ({report.when})\n{report.longreprtext}\n"
        os.write(2, text.encode())
        world.Abort(1)


@pytest.hookimpl(hookwrapper=True)
def pytest_sessionfinish(session: pytest.Session) -> Iterator[None]:
    """In CI a test that was skipped without a stated reason is a failure."""
    yield
    reporter = session.config.pluginmanager.getplugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if reporter and os.environ.get("CI") else []
    silent = [report.nodeid for report in skipped if "reason:" not in str(report.longrepr)]
    if silent:
        reporter.write_line(f"skipped without 'reason: ...': {', '.join(silent)}", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture
def comm() -> Iterator[Any]:
    """A duplicate of the world, so that a test's messages meet no one else's."""
    duplicate = _world().Dup()
    yield duplicate
    duplicate.Barrier()
    duplicate.Free()


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Results depend on the number of threads; ranks share the cores."""
    import torch

    torch.set_num_threads(1)
