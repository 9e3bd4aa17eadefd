"""A tensor as an MPI buffer: the one place that knows how CPU and GPU tensors reach MPI.

GPU tensors are staged through pinned host memory, unless MPI is known to take device memory (`comm.gpu`). Bytes travel,
never numbers: MPI has no bf16, and sums are made by torch.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from mpi4py import MPI

from mpitrain.runtime.agree import Comm

CPU = torch.device("cpu")
MAX_MESSAGE = 1 << 30  # bytes; Open MPI 5.0 refuses messages of more than 2^31
SHORTEST_NAP, LONGEST_NAP = 20e-6, 1e-3  # seconds between two looks at pending requests
YIELDING = 200e-6  # seconds, a few naps as the kernel rounds them: what comes sooner is seen at once


def memory(tensor: torch.Tensor) -> Any:
    """The bytes of a contiguous tensor as a buffer for MPI, on the host or (CUDA-aware MPI only) on the device."""
    assert tensor.is_contiguous()
    return MPI.buffer.fromaddress(tensor.data_ptr(), tensor.numel() * tensor.element_size())


@dataclass(frozen=True)
class Transport:
    """How this rank's tensors travel: device, direct or staged, and how to wait.

    Attributes:
        direct: MPI gets the tensors' own memory; by default that of CPU tensors only.
        patient: ranks outnumber cores, on some node: sleep between looks at what takes long. The same on all ranks.
        background: another thread of this rank computes meanwhile: sleep from the first look on.
        one_host: all ranks share memory, so that messages are copied by the ranks' own cores. The same on all ranks.
        yielding: seconds for which who is patient only yields its core between looks; then it sleeps.
    """

    device: torch.device = CPU
    direct: bool | None = None
    patient: bool = False
    background: bool = False
    one_host: bool = False
    yielding: float = YIELDING

    @property
    def staged(self) -> bool:
        """Whether tensors are copied through host memory; on a CPU only if a test says so."""
        return self.device.type == "cuda" if self.direct is None else not self.direct

    def pinned(self, size: int | tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Host memory to and from which a device copies by itself; torch keeps it for reuse, as pinning is slow."""
        return torch.empty(size, dtype=dtype, pin_memory=self.device.type == "cuda")

    def host(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor itself, or a buffer of its shape if it has to be staged."""
        return self.pinned(tuple(tensor.shape), tensor.dtype) if self.staged else tensor

    def synchronize(self) -> None:
        """Before MPI touches device memory, kernels that read or write it must be done: MPI knows no streams."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def mark(self) -> torch.cuda.Event | None:
        """An event after all that was started so far on the current stream; None on a CPU, where it is done."""
        return torch.cuda.current_stream(self.device).record_event() if self.device.type == "cuda" else None

    def send(self, comm: Comm, tensor: torch.Tensor, rank: int, tag: int) -> Parcel:
        """Start sending; the parcel keeps the memory alive until it is waited for."""
        tensor = tensor.contiguous()
        host = self.host(tensor)
        if host is not tensor:
            host.copy_(tensor, non_blocking=True)
        self.synchronize()
        requests = [comm.Isend([part, MPI.BYTE], rank, tag) for part in messages(host)]
        return Parcel(self, tensor, host, requests)

    def post(self, comm: Comm, shape: tuple[int, ...], dtype: torch.dtype, rank: int, tag: int) -> Parcel:
        """Start receiving a tensor whose shape and dtype both sides know."""
        tensor = torch.empty(shape, dtype=dtype, device=self.device)
        host = self.host(tensor)
        if host is tensor:  # it may lie where kernels still read; of a host buffer torch makes sure that it does not
            self.synchronize()
        requests = [comm.Irecv([part, MPI.BYTE], rank, tag) for part in messages(host)]
        return Parcel(self, tensor, host, requests)

    def wait(self, requests: list[MPI.Request]) -> None:
        """Wait for requests: spinning where this rank has a core for itself, else with naps."""
        if self.patient or self.background:
            self.wait_until(lambda: MPI.Request.Testall(requests))
        else:
            MPI.Request.Waitall(requests)

    def wait_until(self, done: Callable[[], bool]) -> None:
        """Return once `done()`: yielding the core at each look, or with naps in between."""
        began = time.perf_counter()
        while not done():
            waited = time.perf_counter() - began
            if self.background or (self.patient and waited > self.yielding):
                # In proportion to the wait so far: an eighth too late at most, and a long wait costs others no time.
                time.sleep(min(max(waited / 8, SHORTEST_NAP), LONGEST_NAP))
            else:
                os.sched_yield()


@dataclass
class Parcel:
    """A tensor on its way."""

    transport: Transport
    tensor: torch.Tensor
    host: torch.Tensor
    requests: list[MPI.Request]

    def sent(self) -> None:
        """Return once the memory may be used again."""
        self.transport.wait(self.requests)

    def received(self) -> torch.Tensor:
        """The tensor, on the device, once it has come."""
        self.transport.wait(self.requests)
        if self.host is not self.tensor:
            self.tensor.copy_(self.host, non_blocking=True)
        return self.tensor


def messages(tensor: torch.Tensor) -> list[Any]:
    """The tensor's memory in messages of at most MAX_MESSAGE bytes; an empty tensor is one empty message."""
    whole = memory(tensor)
    return [whole[start : start + MAX_MESSAGE] for start in range(0, max(1, len(whole)), MAX_MESSAGE)]
