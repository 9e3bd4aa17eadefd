"""The wheel holds the program and its shelves, and trains where nothing else of the project is."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from typing import Any

import pytest
from launching import BIN, clean_environment

ROOT = Path(__file__).resolve().parent.parent
SITE_PACKAGES = Path(sysconfig.get_path("purelib"))
QUICK = ("--model", "bert-tiny", "--train.max_steps", "2", "--train.batch_size", "8")


def run(*arguments: str | Path, cwd: Path, timeout: float = 300, **environment: str) -> Any:
    """Run without a PYTHONPATH, which could lead back to the checkout."""
    kept = {name: value for name, value in clean_environment(**environment).items() if name != "PYTHONPATH"}
    return subprocess.run(arguments, cwd=cwd, env=kept, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel with the hatchling of this environment: isolation would need a network."""
    place = tmp_path_factory.mktemp("wheel")
    done = run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", place, ROOT, cwd=place)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(place.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment that holds the wheel alone.

    Its dependencies are this environment's, by a .pth file: installing torch anew would take minutes and a network.
    Such a file adds a folder to the path, but the .pth files in that folder, editable installs, do not count.
    """
    place = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True, timeout=120)
    bin_folder = place / "bin"
    pip = [sys.executable, "-m", "pip", f"--python={bin_folder / 'python'}"]
    done = run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=place)
    assert done.returncode == 0, done.stdout + done.stderr
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    (place / "lib" / version / "site-packages" / "dependencies.pth").write_text(f"{SITE_PACKAGES}\n", encoding="utf-8")
    return bin_folder


def test_the_wheel_holds_one_package_with_its_shelves_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"mpitrain"}
    for shelf, pattern in [("models", "*.toml"), ("data", "*.toml"), ("data/sample", "*.conll"), ("jobs", "*.sh")]:
        for file in (ROOT / shelf).glob(pattern):
            assert f"mpitrain/_shelves/{shelf}/{file.name}" in names
    allowed = {".py", ".toml", ".conll", ".md", ".sh", ".typed", ".css", ".html"}
    assert {"mpitrain/report/page.css", "mpitrain/report/page.html"} <= set(names)
    assert {Path(name).suffix for name in names if ".dist-info/" not in name} <= allowed
    assert not [name for name in names if "test_" in name or "/tests/" in name]
    assert len([name for name in names if name.endswith("licenses/LICENSE")]) == 1


def test_the_wheel_trains_from_an_empty_directory(installed, tmp_path):
    # mpi4py looks for MPI in its own environment, then where the system does.
    libraries = os.pathsep.join([f"{sys.prefix}/lib", *os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)])
    empty = tmp_path / "empty"
    empty.mkdir()
    here = {"LD_LIBRARY_PATH": libraries, "MPITRAIN_CACHE": str(tmp_path / "cache")}
    origin = run(installed / "python", "-c", "import mpitrain; print(mpitrain.__file__)", cwd=empty)
    assert Path(origin.stdout.strip()).is_relative_to(installed.parent), origin.stdout + origin.stderr
    done = run(BIN / "mpirun", "-np", "2", installed / "mpitrain", *QUICK, "--out", "trained", cwd=empty, **here)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert len((empty / "trained" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) == 2
    assert [path.name for path in empty.iterdir()] == ["trained"]


def test_help_needs_no_mpi_and_training_says_how_to_get_one(installed, tmp_path):
    nowhere = {"MPI4PY_LIBMPI": "/nowhere/libmpi.so"}
    told = run(installed / "mpitrain", "--help", cwd=tmp_path, **nowhere)
    assert told.returncode == 0, told.stderr
    assert "--train.learning_rate" in told.stdout
    refused = run(installed / "mpitrain", cwd=tmp_path, **nowhere)
    assert refused.returncode == 64, refused.stdout + refused.stderr
    assert "no MPI library can be loaded" in refused.stderr
