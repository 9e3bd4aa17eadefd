"""What the checks stand on: ranks, hosts, cores, device; and how each of them asks all ranks."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from mpitrain.comm import gpu
from mpitrain.comm.buffers import Transport
from mpitrain.config import Config
from mpitrain.errors import ExitCode, MpitrainError, code_of, error_of, on_all_ranks
from mpitrain.runtime.agree import Comm, collect
from mpitrain.runtime.device import (
    Cores,
    choose_device,
    keep_freed_memory,
    node_of_each_rank,
    place_on_node,
    share_cores,
)
from mpitrain.runtime.notes import State, note


@dataclass(frozen=True)
class Ground:
    """The same on all ranks, but for device and transport.

    Attributes:
        hosts: name of each rank's.
        nodes: the lowest rank on each rank's node.
        why: tensors of a GPU reach MPI as they do.
    """

    comm: Comm
    config: Config
    hosts: list[str]
    nodes: list[int]
    cores: Cores
    device: torch.device
    transport: Transport
    why: str

    @property
    def leaders(self) -> list[int]:
        """The lowest rank of each node."""
        return sorted(set(self.nodes))

    def members(self, leader: int) -> list[int]:
        """Ranks of a node."""
        return [rank for rank, node in enumerate(self.nodes) if node == leader]


def survey(comm: Comm, config: Config) -> Ground:
    """As a training would find it (collective); a GPU that is asked for and not there is left to a check."""
    keep_freed_memory()  # fresh pages would be timed too
    hosts, nodes = collect(comm, platform.node()), node_of_each_rank(comm)
    cores = share_cores(comm, config.train.threads)
    device = choose_device(comm, "cpu" if config.train.device == "cpu" else "auto")
    direct, why = gpu.decide(comm, device, config.comm.gpu) if device.type == "cuda" else (True, "")
    one_host = place_on_node(comm)[1] == comm.size
    transport = Transport(device, direct, patient=cores.crowded, one_host=one_host)
    return Ground(comm, config, hosts, nodes, cores, device, transport, why)


def everywhere(comm: Comm, what: str, measure: Callable[[], Any]) -> list[Any]:
    """The JSON value that each rank measures, which must not need the others, on every rank (collective).

    Raises:
        MpitrainError: a rank could not, for whatever reason; on all ranks, with the first one's.
    """
    note(what.encode(), state=State.WORKING)
    try:
        mine = [measure(), "", ExitCode.DONE]
    except Exception as error:  # whatever it is, the others shall not wait
        kind = "" if isinstance(error, MpitrainError) else f"{type(error).__name__}: "
        mine = [None, f"{kind}{error}", code_of(error)]
    found = collect(comm, mine)
    for rank, (_, why, code) in enumerate(found):
        if why:
            raise on_all_ranks(error_of(code, f"rank {rank}, while {what}: {why}"))
    return [value for value, *_ in found]
