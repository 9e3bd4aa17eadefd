"""Where this rank is, written down as it goes: in memory of its own until `attach` gives it some that its node shares.

A note costs about a microsecond. Whoever reads notes must not wait for who writes them: a reader may see half of the
new one and half of the old, which only makes a report less exact.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Any


class State(IntEnum):
    """What counts as progress of a rank, besides its next note."""

    MOVING = 0  # nothing: it goes on at once, or waits for others
    WORKING = 1  # that its process computes: it does something of its own that may take long
    LISTENING = 2  # that it lives: it waits for somebody who is no rank


RECORD = struct.Struct("=6q128s")
STATE, STATE_AT = struct.Struct("=q"), 16
PULSE = struct.Struct("=dq")
PULSE_AT = 192  # a cache line of its own, because a thread of its own writes it
ASKED_AT = 224  # a byte that another rank sets when it calls the roll
SIZE = 256


@dataclass(frozen=True)
class Note:
    """What a rank has written down last.

    Attributes:
        count: of its notes so far.
        micro_batch, peer: -1 if none has to do with it; the peer is the world rank that a message is for or from.
    """

    count: int
    step: int
    state: State
    chunk: int
    micro_batch: int
    peer: int
    text: str

    @property
    def phase(self) -> str:
        """Step and what is done there: the same for ranks that are equally far."""
        return f"step {self.step}, {self.text}" if self.step else self.text

    def __str__(self) -> str:
        found = f" of micro-batch {self.micro_batch}" if self.micro_batch >= 0 else ""
        found += f", chunk {self.chunk}" if self.chunk > 0 else ""
        found += f", with rank {self.peer}" if self.peer >= 0 else ""
        return self.phase + found


_memory: Any = bytearray(SIZE)
_count = 0
_step = 0


def note(text: bytes, micro_batch: int = -1, peer: int = -1, chunk: int = 0, state: State = State.MOVING) -> None:
    """This rank begins something. Main thread only."""
    global _count  # of this process: one rank is where it is
    _count += 1
    RECORD.pack_into(_memory, 0, _count, _step, state, chunk, micro_batch, peer, text)


def wait() -> None:
    """Whatever this rank does, it now waits for others."""
    STATE.pack_into(_memory, STATE_AT, State.MOVING)


def begin_step(number: int) -> None:
    """Notes are of this step from here on; 0 is none."""
    global _step  # as above
    _step = number


def attach(memory: Any) -> None:
    """Write into these SIZE bytes from here on; what has been noted goes along."""
    global _memory  # as above
    memory[:SIZE] = bytes(_memory[:SIZE])
    _memory = memory


def detach() -> None:
    """Write into memory of one's own again."""
    attach(bytearray(SIZE))


def read(memory: Any) -> Note:
    """The note in some rank's memory."""
    count, step, state, chunk, micro_batch, peer, text = RECORD.unpack_from(memory)
    words = text.rstrip(b"\0").decode(errors="replace")
    return Note(count, step, State(state), chunk, micro_batch, peer, words)
