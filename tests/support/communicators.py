"""Communicators that are stricter or see other machines than what is here: no buffered sends, hosts of our choice."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from mpi4py import MPI

from mpitrain.comm import choice, exchange, node
from mpitrain.runtime import mesh

# Which host a rank would be on: hosts of equal and of different sizes, as far as the ranks go.
HOSTS: dict[str, Callable[[int], int]] = {
    "hosts of two": lambda rank: rank // 2,
    "one and the rest": lambda r: min(r, 1),
}


class Unbuffered(MPI.Intracomm):
    """A communicator on which MPI may not buffer: a send ends only once its receive is posted."""

    def Isend(self, *arguments):
        return self.Issend(*arguments)


def forbid_buffering(patch: pytest.MonkeyPatch) -> None:
    """From now on what meshes and exchanges make is `Unbuffered`."""
    for module in (mesh, exchange, choice, node):
        patch.setattr(module, "Comm", Unbuffered)


def on_hosts(comm: MPI.Intracomm, hosts: str | None) -> MPI.Intracomm:
    """The same communicator, for which ranks share memory as `HOSTS` says; None leaves it as it is."""
    if hosts is None:
        return comm

    class OnHosts(MPI.Intracomm):
        def Split_type(self, kind, key=0):
            return self.Split(HOSTS[hosts](self.rank), key)

    return OnHosts(comm)
