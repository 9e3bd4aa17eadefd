"""Where a name such as `bert-mini` is looked up: the path given, the shelf in the package, the checkout."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from mpitrain.errors import UsageError

PACKAGE = Path(__file__).resolve().parent


def shelves(kind: str) -> list[Path]:
    """Folders that hold things of `kind` ("models", "data", "jobs"), nearest first."""
    return [place for place in (PACKAGE / "_shelves" / kind, PACKAGE.parent / kind) if place.is_dir()]


def find(kind: str, name: str) -> Path:
    """The file or folder that `name` means.

    Raises:
        UsageError: nothing has that name; the message lists the names there are.
    """
    for candidate in [Path(name), *(place / f"{name}.toml" for place in shelves(kind))]:
        with suppress(OSError):  # a name can be too long for the system
            if candidate.exists():
                return candidate
    names = sorted({file.stem for place in shelves(kind) for file in place.glob("*.toml")})
    raise UsageError(
        f"{name[:200]!r} is no file or folder, nor a name on the shelf of {kind}; names there are: {', '.join(names)}"
    )
