"""A reducer on any exchange; nodes of several sizes."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from communicators import HOSTS, on_hosts

from mpitrain.comm.buffers import Transport
from mpitrain.comm.choice import choose_exchange
from mpitrain.comm.reducer import GradientReducer


@contextmanager
def reducing(
    comm, buckets, algorithm="ring", wire_dtype=None, dtype=torch.float32, error_feedback=False, patient=False
):
    """A reducer and its exchange, closed at the end."""
    hosts = algorithm if algorithm in HOSTS else None
    exchange, _ = choose_exchange(
        comm,
        on_hosts(comm, hosts),
        Transport(patient=patient),
        buckets,
        dtype,
        algorithm="node" if hosts else algorithm,
        wire_dtype=wire_dtype,
        error_feedback=error_feedback,
    )
    exchange.spread()
    reducer = GradientReducer(exchange)
    yield reducer, exchange
    reducer.close()
    exchange.close()


def check_squares(buckets, algorithm):
    """Of a step that is reduced: what is known of its squares is right, and known on a node."""
    for bucket in buckets:
        expected = float(bucket.reduced.double().square().sum())
        assert bucket.squares is not None or algorithm != "node"
        assert bucket.squares is None or abs(bucket.squares - expected) <= 1e-6 * expected
