"""A reducer on any exchange; nodes of several sizes, as far as the ranks of one machine go."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from communicators import HOSTS

from mpitrain.comm.buffers import Transport
from mpitrain.comm.choice import choose_exchange
from mpitrain.comm.node import NodeExchange
from mpitrain.comm.reducer import GradientReducer

@contextmanager
def reducing(comm, buckets, algorithm="ring", wire_dtype=None, dtype=torch.float32, error_feedback=False):
    """A reducer and its exchange, closed at the end."""
    if algorithm in HOSTS:
        node = comm.Split(HOSTS[algorithm](comm.rank))
        exchange = NodeExchange(
            comm, node, Transport(), buckets, dtype, wire_dtype=wire_dtype, error_feedback=error_feedback
        )
    else:
        exchange, _ = choose_exchange(
            comm,
            comm,
            Transport(),
            buckets,
            dtype,
            algorithm=algorithm,
            wire_dtype=wire_dtype,
            error_feedback=error_feedback,
        )
    exchange.spread()
    reducer = GradientReducer(exchange)
    yield reducer, exchange
    reducer.close()
    exchange.close()
