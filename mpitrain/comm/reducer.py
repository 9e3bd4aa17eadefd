"""Gradients summed over the data axis, bucket by bucket, while backward still runs.

Autograd hooks count the gradients of the last micro-batch; a full bucket is handed to a thread, which reduce-scatters
it on a communicator of its own, so that its messages never meet the pipeline's. A ring needs additions between its
messages, hence a thread rather than non-blocking calls alone. Every rank hands buckets over in the same order,
whatever the order of its hooks, and a replica without micro-batches joins in with zeros.
"""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from mpi4py import MPI

from mpitrain.comm import ring
from mpitrain.comm.buckets import Bucket
from mpitrain.comm.buffers import Transport
from mpitrain.runtime.agree import Comm
from mpitrain.split import part


class GradientReducer:
    """Owns a duplicate of the data axis and the thread that uses it; `close` gives both back."""

    def __init__(
        self,
        data_axis: Comm,
        buckets: list[Bucket],
        transport: Transport,
        *,
        algorithm: str = "ring",
        wire_dtype: torch.dtype | None = None,
    ) -> None:
        """Watch the gradients of `buckets` (collective over the data axis)."""
        self._comm = data_axis.Dup()
        self._transport = transport
        # The thread shares cores with the backward pass: it must never spin.
        self._thread_transport = replace(transport, patient=True)
        self._buckets = buckets
        self._algorithm = algorithm
        self._wire_dtype = wire_dtype
        self._armed = False
        self._missing: list[int] = []
        self._num_released = 0
        self._todo: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        for number, bucket in enumerate(buckets):
            for place in bucket.places:
                hook = partial(self._arrived, number)
                place.parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
        self._thread = threading.Thread(target=self._work, name="gradient-reducer", daemon=True)
        self._thread.start()

    def start_step(self) -> None:
        """Forget the last step's gradients."""
        for bucket in self._buckets:
            bucket.gradients.zero_()
        self._missing = [len(bucket.places) for bucket in self._buckets]
        self._num_released = 0
        self._armed = False

    def arm(self) -> None:
        """The next backward pass is the last of this step: gradients that arrive from now on are final."""
        self._armed = True

    def finish(self) -> float:
        """Return once every bucket's own chunk holds the sum over replicas; seconds spent waiting."""
        began = time.perf_counter()
        self._release(len(self._buckets))
        for _ in self._buckets:
            error = self._done.get()
            if error is not None:
                raise error
        return time.perf_counter() - began

    def gather_weights(self) -> None:
        """Every rank gets every bucket's weights from the owners of their chunks."""
        for bucket in self._buckets:
            if self._algorithm == "native":
                native_all_gather(self._comm, bucket.weights, self._transport)
            else:
                ring.all_gather(self._comm, bucket.weights, self._transport)

    def close(self) -> None:
        """End the thread and free the communicator (collective over the data axis)."""
        self._todo.put(None)
        self._thread.join()
        self._comm.Free()

    def _arrived(self, number: int, _: torch.Tensor) -> None:
        if not self._armed:
            return
        self._missing[number] -= 1
        ready = self._num_released
        while ready < len(self._buckets) and self._missing[ready] == 0:
            ready += 1
        self._release(ready)

    def _release(self, stop: int) -> None:
        for number in range(self._num_released, stop):
            self._todo.put(number)
        self._num_released = max(self._num_released, stop)

    def _work(self) -> None:
        if self._transport.device.type == "cuda":
            torch.cuda.set_device(self._transport.device)  # the current device is a property of the thread
        while (number := self._todo.get()) is not None:
            try:
                self._reduce(self._buckets[number].gradients)
                self._done.put(None)
            except BaseException as error:
                self._done.put(error)

    def _reduce(self, gradients: torch.Tensor) -> None:
        if self._algorithm == "native":
            native_reduce_scatter(self._comm, gradients, self._thread_transport)
        else:
            ring.reduce_scatter(self._comm, gradients, self._thread_transport, self._wire_dtype)


def native_reduce_scatter(comm: Comm, flat: torch.Tensor, transport: Transport) -> None:
    """The same as ring.reduce_scatter by MPI's own collective, to compare with; fp32 only."""
    transport.synchronize()
    values = flat.cpu().numpy()
    start, stop = part(comm.rank, len(values), comm.size)
    own = np.empty(stop - start, np.float32)
    comm.Reduce_scatter(values, own, _sizes(comm, len(values)), MPI.SUM)
    flat[start:stop].copy_(torch.from_numpy(own))


def native_all_gather(comm: Comm, flat: torch.Tensor, transport: Transport) -> None:
    """The same as ring.all_gather by MPI's own collective; any dtype, as bytes."""
    transport.synchronize()
    values = flat.cpu().view(torch.uint8).numpy()
    start, stop = (flat.element_size() * bound for bound in part(comm.rank, len(flat), comm.size))
    sizes = [flat.element_size() * size for size in _sizes(comm, len(flat))]
    everything = np.empty_like(values)
    comm.Allgatherv([values[start:stop].copy(), MPI.BYTE], [everything, sizes, MPI.BYTE])
    flat.view(torch.uint8).copy_(torch.from_numpy(everything))


def _sizes(comm: Comm, total: int) -> list[int]:
    bounds = [part(index, total, comm.size) for index in range(comm.size)]
    return [stop - start for start, stop in bounds]
