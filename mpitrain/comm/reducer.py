"""Gradients summed over the data axis, bucket by bucket, while backward still runs.

Autograd hooks take every gradient into its bucket and count them; a bucket in which those of all micro-batches are is
handed to a thread, which reduces it by an exchange that has a communicator of its own, so that its messages never meet
the pipeline's. (An exchange that would gain nothing by this gets all buckets after the last micro-batch.) A ring needs
additions between its messages, hence a thread rather than non-blocking calls alone. Every rank hands buckets over in
the same order, whatever the order of its hooks, and a replica without micro-batches joins in with zeros.

Where sums have to be reproducible, micro-batches are added up by a tree, and travel after the last one.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from functools import partial

import torch

from mpitrain.comm.exchange import Exchange
from mpitrain.comm.tree import TreeSum
from mpitrain.observe.trace import REDUCER, Trace, now
from mpitrain.runtime.failpoints import reach


class GradientReducer:
    """The thread that reduces; `close` ends it."""

    def __init__(
        self,
        exchange: Exchange,
        *,
        reproducible: bool = False,
        sum_shared: Callable[[torch.Tensor], None] = lambda gradients: None,
    ) -> None:
        """Watch the gradients of the buckets that the exchange has adopted.

        Args:
            exchange: sums over replicas.
            reproducible: by a tree.
            sum_shared: sums a shared bucket's gradients over the tensor group, in place.
        """
        self._exchange = exchange
        self._sum_shared = sum_shared
        self._tree = TreeSum() if reproducible else None
        self._eager = not reproducible and exchange.overlapped
        self._missing: list[int] = []
        self._num_released = 0
        self._todo: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        for number, bucket in enumerate(exchange.buckets):
            for index, member in enumerate(bucket.members):
                hook = partial(self._arrived, number, index)
                member.parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
        self.trace: Trace | None = None
        self.seconds = 0.0  # that the thread has spent on the buckets of this step
        self._thread = threading.Thread(target=self._work, name="gradient-reducer", daemon=True)
        self._thread.start()

    def start_step(self, num_micro_batches: int) -> None:
        """Forget the last step's gradients; each is final once so many have arrived."""
        self._begin()
        # One more for shared ones, which `finish` sums over the tensor group first.
        self._missing = [len(bucket.members) * num_micro_batches + bucket.shared for bucket in self._exchange.buckets]
        self._num_released = 0
        self.seconds = 0.0

    def end_micro_batch(self) -> None:
        """The gradients of a micro-batch are complete."""
        if self._tree is not None:
            for bucket in self._exchange.buckets:
                bucket.complete()
            self._tree.add([bucket.gradients for bucket in self._exchange.buckets])
            self._begin()

    def finish(self) -> None:
        """Return once this rank's part of every bucket holds the sum over replicas."""
        if self._tree is not None:
            for bucket, total in zip(self._exchange.buckets, self._tree.take() or [], strict=False):
                bucket.complete()
                bucket.gradients.copy_(total)
        shared = [bucket for bucket in self._exchange.buckets if bucket.shared]  # the last one, if any
        self._release(len(self._exchange.buckets) - len(shared))
        for bucket in shared:
            bucket.complete()
            self._sum_shared(bucket.gradients)
        self._release(len(self._exchange.buckets))
        for _ in self._exchange.buckets:
            error = self._done.get()
            if error is not None:
                raise error

    def close(self) -> None:
        """End the thread."""
        self._todo.put(None)
        self._thread.join()

    def _begin(self) -> None:
        for bucket in self._exchange.buckets:
            bucket.begin()

    def _arrived(self, number: int, index: int, parameter: torch.Tensor) -> None:
        if parameter.grad is None:  # put off in this backward pass (`linear.postponed`)
            return
        reach("gradient", lambda: _values(parameter.grad))
        self._exchange.buckets[number].take(index)
        if not self._eager:
            return
        self._missing[number] -= 1
        ready = self._num_released
        while ready < len(self._missing) and self._missing[ready] == 0:
            ready += 1
        self._release(ready)

    def _release(self, stop: int) -> None:
        for number in range(self._num_released, stop):
            self._exchange.buckets[number].complete()
            self._todo.put(number)
        self._num_released = max(self._num_released, stop)

    def _work(self) -> None:
        if self._exchange.transport.device.type == "cuda":
            torch.cuda.set_device(self._exchange.transport.device)  # the current device is a property of the thread
        while (number := self._todo.get()) is not None:
            try:
                began = now()
                self._exchange.reduce(number)
                self.seconds += (now() - began) / 1e9
                if self.trace is not None:
                    self.trace.add(f"reduce bucket {number}", "reduce", began, REDUCER)
                self._done.put(None)
            except BaseException as error:
                self._done.put(error)


def _values(gradient: torch.Tensor | None) -> torch.Tensor | None:
    return gradient._values() if gradient is not None and gradient.is_sparse else gradient
