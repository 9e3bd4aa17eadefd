"""What this program is made of: ranks of other code or libraries would compute other numbers, or wait for ever."""

from __future__ import annotations

import hashlib
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from mpitrain import __version__
from mpitrain.runtime.launch import library_version

LIBRARIES = ("torch", "numpy", "mpi4py", "h5py", "tokenizers", "safetensors")


def program() -> dict[str, str]:
    """Names of its parts, each with the version that is here."""
    found = {"mpitrain": f"{__version__} ({code_hash()[:12]})", "Python": platform.python_version()}
    return found | {name: _version(name) for name in LIBRARIES} | {"the MPI library": library_version()}


def code_hash(package: Path = Path(__file__).parents[1]) -> str:
    """sha256 of the names and contents of all modules, in hex."""
    found = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        found.update(f"{file.relative_to(package)}\0".encode())
        found.update(file.read_bytes())
    return found.hexdigest()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # it may have been put there by hand
        return "unknown"
