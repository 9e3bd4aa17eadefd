"""`pytest -m gpu` runs the tests marked gpu itself, at each number of ranks, under mpirun."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from launching import mpirun

pytestmark = pytest.mark.gpu

TESTS = Path(__file__).parent


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_gpu_suite_passes_on(ranks: int, tmp_path: Path) -> None:
    assert torch.cuda.is_available(), f"no GPU here that torch {torch.__version__} can use: nothing was tested"
    pytest_options = ("--only-mpi", "-m", "gpu", "-p", "no:cacheprovider")
    done = mpirun(ranks, "-m", "pytest", *pytest_options, str(TESTS), cwd=tmp_path, timeout=540)
    summary = done.stdout.strip().splitlines()[-1:] or [""]
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    assert " passed" in summary[0], summary
    assert "skipped" not in summary[0], summary
