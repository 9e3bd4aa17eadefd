"""Plain `pytest` runs the multi-rank tests itself, at each number of ranks, under mpirun."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from launching import mpirun

TESTS = Path(__file__).parent


@pytest.mark.timeout(960)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_suite_passes_on(ranks: int, tmp_path: Path) -> None:
    done = mpirun(ranks, "-m", "pytest", "--only-mpi", "-p", "no:cacheprovider", str(TESTS), cwd=tmp_path, timeout=900)
    summary = done.stdout.strip().splitlines()[-1:] or [""]
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    assert " passed" in summary[0], summary
    if os.environ.get("CI"):
        assert "skipped" not in summary[0], done.stdout[-3000:]
    print(f"{ranks} ranks: {summary[0]}")
