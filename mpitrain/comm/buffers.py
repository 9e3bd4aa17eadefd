"""A tensor as an MPI buffer: the one place that knows how CPU and GPU tensors reach MPI.

GPU tensors are staged through pinned host memory, unless MPI is known to be CUDA-aware; then MPI gets the device
pointer. Bytes travel, never numbers: MPI has no bf16, and sums are made by torch.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from mpi4py import MPI

from mpitrain.errors import UsageError, on_all_ranks
from mpitrain.runtime.agree import Comm, collect

CPU = torch.device("cpu")
MAX_MESSAGE = 1 << 30  # bytes; Open MPI 5.0 refuses messages of more than 2^31
SHORTEST_NAP, LONGEST_NAP = 20e-6, 1e-3  # seconds between two looks at pending requests


def memory(tensor: torch.Tensor) -> Any:
    """The bytes of a contiguous tensor as a buffer for MPI, on the host or (CUDA-aware MPI only) on the device."""
    assert tensor.is_contiguous()
    return MPI.buffer.fromaddress(tensor.data_ptr(), tensor.numel() * tensor.element_size())


def cuda_aware(comm: Comm) -> bool:
    """Whether every rank's MPI takes device pointers: MPITRAIN_GPU_AWARE=0|1, else what the library says (collective).

    Raises:
        UsageError: MPITRAIN_GPU_AWARE is neither 0 nor 1 on some rank.
    """
    forced = os.environ.get("MPITRAIN_GPU_AWARE", "")
    answers = collect(comm, forced if forced else str(int(_library_says_aware())))
    wrong = [answer for answer in answers if answer not in ("0", "1")]
    if wrong:
        raise on_all_ranks(UsageError(f"MPITRAIN_GPU_AWARE is {wrong[0]!r}; 0 (staged) or 1 (direct) would work"))
    return all(answer == "1" for answer in answers)


def _library_says_aware() -> bool:
    library = ctypes.CDLL(MPI.__file__)
    query = getattr(library, "MPIX_Query_cuda_support", None)
    return bool(query()) if query is not None else False


@dataclass(frozen=True)
class Transport:
    """How this rank's tensors travel: device, direct or staged, and how to wait.

    Attributes:
        patient: sleep between looks at what is awaited, because ranks outnumber cores or other threads compute.
    """

    device: torch.device = CPU
    direct: bool = False
    patient: bool = False

    @property
    def staged(self) -> bool:
        """Whether tensors are copied through host memory."""
        return self.device.type == "cuda" and not self.direct

    def host(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor itself, or a fresh pinned buffer of its shape if it has to be staged."""
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) if self.staged else tensor

    def synchronize(self) -> None:
        """Before MPI touches device memory, kernels that read or write it must be done: MPI knows no streams."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def send(self, comm: Comm, tensor: torch.Tensor, rank: int, tag: int) -> Parcel:
        """Start sending; the parcel keeps the memory alive until it is waited for."""
        tensor = tensor.contiguous()
        host = self.host(tensor)
        if host is not tensor:
            host.copy_(tensor)
        self.synchronize()
        requests = [comm.Isend([part, MPI.BYTE], rank, tag) for part in messages(host)]
        return Parcel(self, tensor, host, requests)

    def post(self, comm: Comm, shape: tuple[int, ...], dtype: torch.dtype, rank: int, tag: int) -> Parcel:
        """Start receiving a tensor whose shape and dtype both sides know."""
        tensor = torch.empty(shape, dtype=dtype, device=self.device)
        host = self.host(tensor)
        self.synchronize()
        requests = [comm.Irecv([part, MPI.BYTE], rank, tag) for part in messages(host)]
        return Parcel(self, tensor, host, requests)

    def wait(self, requests: list[MPI.Request]) -> None:
        """Wait for requests: spinning where this rank has a core for itself, else with naps."""
        if self.patient:
            self.wait_until(lambda: MPI.Request.Testall(requests))
        else:
            MPI.Request.Waitall(requests)

    def wait_until(self, done: Callable[[], bool]) -> None:
        """Return once `done()`: spinning, or with naps."""
        began = time.perf_counter()
        while not done():
            # In proportion to the wait so far: an eighth too late at most, and a long wait costs others no time.
            nap = (time.perf_counter() - began) / 8
            if self.patient:
                time.sleep(min(max(nap, SHORTEST_NAP), LONGEST_NAP))
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
