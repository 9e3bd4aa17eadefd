"""Named places at which a test may strike, to show what becomes of the job.

They are asked for by MPITRAIN_FAILPOINT=place[:rank[:visit]]=action; several are divided by commas. Without a rank, or
with `*`, every rank is struck; without a visit, every visit of the place is; each rank counts its own visits from 1. A
place that nobody has asked for costs a look into an empty dictionary.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from mpitrain.errors import UsageError
from mpitrain.runtime.launch import let_the_launcher_read

if TYPE_CHECKING:
    from torch import Tensor

    Values = Callable[[], Tensor | None]

VARIABLE = "MPITRAIN_FAILPOINT"
PLACES = {
    "start": "the configuration is agreed on",
    "data": "a thread reads a micro-batch",
    "forward": "a micro-batch begins its forward pass",
    "backward": "a micro-batch begins its backward pass",
    "reduce": "all backward passes are done, and gradients are waited for",
    "gradient": "a micro-batch's gradient of a parameter has come (nan, flip: in it)",
    "update": "all ranks have agreed to update",
    "weight": "a step is done (nan, flip: in a weight)",
    "moment": "a step is done (nan, flip: in a moment of the optimizer)",
    "evaluate": "a split is about to be scored",
    "save.begin": "a save begins",
    "save.copy": "a rank is about to copy what it saves, beside the next step",
    "save.slices": "the directory is there, and a rank is about to write its file",
    "save.hash": "a rank has written its file, which may not have reached the disk",
    "save.manifest": "all files are written, the manifest is not",
    "save.rename": "the manifest is written, the directory has not got its name",
    "save.committed": "the directory has its name, which may not have reached the disk",
    "save.refresh": "the progress of a checkpoint is about to be written anew",
    "save.retain": "a save is done, and old checkpoints are about to go",
    "save.discard": "an old checkpoint has lost its name, and its files are there",
    "end": "training is over, and memory is about to be given back",
}
FORM = re.compile(
    r"(?P<place>[a-z.]+)(:(?P<rank>\d+|\*)(:(?P<visit>[1-9]\d*))?)?=(?P<action>[a-z]+)(?P<value>\d*\.?\d+)?"
)


@dataclass(frozen=True)
class _Strike:
    rank: int | None
    visit: int | None
    action: str
    value: float


_armed: dict[str, _Strike] = {}
_visits: Counter[str] = Counter()
_rank = 0


def arm(rank: int) -> None:
    """Read the variable, on this rank.

    Raises:
        UsageError: it names no place or no action, or cannot be read.
    """
    global _rank  # of this process, as the environment is
    _rank = rank
    _armed.clear()
    _visits.clear()
    for text in filter(None, os.environ.get(VARIABLE, "").split(",")):
        found = FORM.fullmatch(text)
        if (
            not found
            or found["place"] not in PLACES
            or found["place"] in _armed
            or found["action"] not in (*ACTIONS, *SPOILS)
        ):
            raise UsageError(
                f"{VARIABLE}: found {text!r}; place[:rank[:visit]]=action would work, each place once, of "
                f"{', '.join(PLACES)} and an action of {', '.join((*ACTIONS, *SPOILS))}"
            )
        where, visit = found["rank"], found["visit"]
        _armed[found["place"]] = _Strike(
            None if where in (None, "*") else int(where),
            int(visit) if visit else None,
            found["action"],
            float(found["value"] or 1),
        )


def reach(place: str, values: Values = lambda: None) -> None:
    """This rank has come to a place; `values` gives what could be spoilt there."""
    if _armed and place in _armed:
        _strike(place, _armed[place], values)


def _strike(place: str, strike: _Strike, values: Values) -> None:
    _visits[place] += 1
    if strike.rank not in (None, _rank) or strike.visit not in (None, _visits[place]):
        return
    with suppress(OSError):
        os.write(2, f"failpoint {place} on rank {_rank}, visit {_visits[place]}: {strike.action}\n".encode())
        let_the_launcher_read(2)
    if strike.action in SPOILS:
        _spoil(strike.action, values())
    else:
        ACTIONS[strike.action](strike.value)


def _spoil(action: str, values: Tensor | None) -> None:
    import torch  # only now: who asks for help does not wait for it

    if values is None or not values.numel():
        raise UsageError(f"{VARIABLE}: there are no values here to {action}")
    first = values.detach().view(-1)[:1]
    if action == "nan":
        first.fill_(torch.nan)
    else:
        first.view(torch.uint8)[0] ^= 1  # the lowest bit of the mantissa, as bytes begin with the lowest


def _kill(value: float) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def _raise(value: float) -> NoReturn:
    raise RuntimeError("a fail-point struck")


def _work(value: float) -> None:
    limit = time.monotonic() + value
    while time.monotonic() < limit:
        pass


def _fill_disk(value: float) -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


ACTIONS: dict[str, Callable[[float], object]] = {
    "kill": _kill,
    "raise": _raise,
    "sleep": time.sleep,  # for so many seconds: sleep0.05
    "stop": lambda value: os.kill(os.getpid(), signal.SIGSTOP),
    "ask": lambda value: os.kill(os.getpid(), signal.SIGUSR1),  # for a checkpoint and an end
    "leave": lambda value: sys.exit(3),
    "vanish": lambda value: os._exit(3),
    "full": _fill_disk,
    # While Python's lock is held, so that no other thread of this rank gets a turn.
    "hold": lambda value: ctypes.PyDLL(None).sleep(int(value)),
    "work": _work,
}
SPOILS = ("nan", "flip")
