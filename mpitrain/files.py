"""Files that others rely on: hashed, durable, and never led out of their directory by a name."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import secrets
import tomllib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import xxhash
from pydantic import StringConstraints

from mpitrain.errors import MpitrainError, UsageError

PIECE = 1 << 22  # bytes that are hashed and written at a time

# No separators, so no name leads out of the directory; no leading dot, so neither "." nor ".." is a name.
FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$", max_length=128)]


@contextmanager
def user_path(flag: str, path: Path) -> Iterator[None]:
    """What the operating system refuses to do with a path of the user's becomes a UsageError that names the flag."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"{flag} {path}: {error.strerror}; give a path that can be written") from None


@contextmanager
def can_be_written(place: Path, otherwise: str = "see to the disk, then start again") -> Iterator[None]:
    """A full disk, a quota or a directory that has vanished is nobody's bug: an MpitrainError that says so."""
    try:
        yield
    except OSError as error:
        raise MpitrainError(f"{place}: cannot be written: {error.strerror or error}; {otherwise}") from error


class Digest(NamedTuple):
    """What tells a file's bytes from others, in hex.

    Attributes:
        sha256: which nobody can make another file for.
        xxh3: of 128 bits, as fast as memory: enough against damage.
    """

    sha256: str
    xxh3: str

    @classmethod
    def of(cls, parts: Iterable[Any]) -> Digest:
        """Of bytes that come in parts."""
        sha256, xxh3 = hashlib.sha256(), xxhash.xxh3_128()
        for part in parts:
            sha256.update(part)
            xxh3.update(part)
        return cls(sha256.hexdigest(), xxh3.hexdigest())


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    found = hashlib.sha256()
    for part in parts_of(path):
        found.update(part)
    return found.hexdigest()


def file_sum(path: Path) -> str:
    """xxh3 of 128 bits of a file's bytes, in hex; too fast for a thread that reads ahead to be of use."""
    found, buffer = xxhash.xxh3_128(), memoryview(bytearray(PIECE))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            found.update(buffer[:size])
    return found.hexdigest()


def parts_of(path: Path) -> Iterator[memoryview]:
    """A file's bytes, each part good until the next is asked for; that is read meanwhile."""
    buffers = [bytearray(PIECE), bytearray(PIECE)]
    with path.open("rb", buffering=0) as file, ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(file.readinto, buffers[0])
        while size := ahead.result():
            buffers.reverse()
            ahead = reader.submit(file.readinto, buffers[0])
            yield memoryview(buffers[1])[:size]


class Sink(io.FileIO):
    """A file that HDF5 writes: HDF5 may crash the process when a write fails, so failures are kept for `check`."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        """Take all of it, or nothing any more."""
        left = memoryview(data).cast("B")
        try:
            while left and self.error is None:
                left = left[super().write(left) :]
        except OSError as error:
            self.error = error
        return len(data)

    def truncate(self, size: int | None = None) -> int:
        """Of use at the end, when HDF5 knows the size."""
        try:
            return super().truncate(size)
        except OSError as error:
            self.error = self.error or error
            return size or 0

    def check(self) -> None:
        """Raise the first failure, if any: to be called when HDF5 has closed the file."""
        if self.error is not None:
            raise self.error


class Image(io.RawIOBase):
    """A file in memory, for HDF5 to write; the memory is kept, because fresh pages are slow to touch."""

    def __init__(self) -> None:
        """An empty file."""
        self._memory = bytearray()
        self._size = self._at = 0

    def reserve(self, num_bytes: int) -> None:
        """Forget what there is, and have room for so many; more are taken as they are written, which is slower."""
        self._size = self._at = 0
        if num_bytes > len(self._memory):
            self._memory = bytearray(num_bytes)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a place in the file."""
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        """The place in the file."""
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Read from there on."""
        found = memoryview(self._memory)[self._at : min(self._size, self._at + len(buffer))]
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)

    def write(self, data: Any) -> int:
        """Write from there on."""
        end = self._at + len(data)
        if end > len(self._memory) or self._at > self._size:
            self.truncate(max(self._at, self._size))
            self._memory.extend(bytes(max(0, end - len(self._memory))))
        # By NumPy, which lets other threads go on meanwhile.
        np.frombuffer(self._memory, np.uint8)[self._at : end] = np.frombuffer(data, np.uint8)
        self._at, self._size = end, max(self._size, end)
        return len(data)

    def truncate(self, size: int | None = None) -> int:
        """End the file there."""
        size = self._at if size is None else size
        self._memory.extend(bytes(max(0, size - len(self._memory))))
        if size > self._size:
            self._memory[self._size : size] = bytes(size - self._size)
        self._size = size
        return size

    def store(self, path: Path) -> Digest:
        """Write it to a file that may not have reached the disk then."""
        with path.open("wb") as file:
            return Digest.of(self._write_to(file))

    def _write_to(self, file: io.BufferedWriter) -> Iterator[memoryview]:
        whole = memoryview(self._memory)[: self._size]
        for start in range(0, len(whole), PIECE):
            part = whole[start : start + PIECE]
            file.write(part)
            yield part


def parse_json(text: str) -> Any:
    """What JSON says; a ValueError also where it is nested too deeply to be read."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse_toml(text: str) -> dict[str, Any]:
    """The same for TOML; its errors are TOMLDecodeError."""
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise tomllib.TOMLDecodeError("it is nested too deeply") from None


def seal(text: str) -> str:
    """JSON whose first field `seal` is empty, with the sha256 of it in that field."""
    return text.replace('"seal": ""', f'"seal": "{hashlib.sha256(text.encode()).hexdigest()}"', 1)


def is_sealed(raw: bytes) -> bool:
    """Whether a text is to the byte what `seal` has made."""
    found = re.search(rb'"seal": "([0-9a-f]{64})"', raw)
    if found is None:
        return False
    return hashlib.sha256(raw.replace(found[0], b'"seal": ""', 1)).hexdigest() == found[1].decode()


def sync(path: Path) -> None:
    """Have a file's or directory's content reach the disk: a rename alone is atomic, but not durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def forget_cached(path: Path) -> None:
    """Have the next reader ask the disk, if the system minds the advice; of what has reached it."""
    with path.open("rb") as file, suppress(OSError):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def write_durably(path: Path, text: str) -> None:
    """Write a whole file and have it reach the disk."""
    path.write_text(text, encoding="utf-8")
    sync(path)


def replace_file(path: Path, text: str) -> None:
    """Write a file aside, then put it in place, so that readers see the old or the new one, never half."""
    _written_aside(path, text).replace(path)


def create_file(path: Path, text: str) -> None:
    """The same, but whoever has put one in place before is left as he is."""
    aside = _written_aside(path, text)
    try:
        path.hardlink_to(aside)
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        aside.replace(path)
    aside.unlink(missing_ok=True)


def _written_aside(path: Path, text: str) -> Path:
    aside = path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")  # ranks of two nodes may have one number
    write_durably(aside, text)
    return aside
