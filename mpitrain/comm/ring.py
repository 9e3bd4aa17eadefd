"""Our own reduce-scatter, all-gather and all-reduce: a ring of point-to-point messages.

With k ranks the flat tensor is cut into k chunks (part i of n over k; chunks may be empty). In reduce-scatter each
rank passes a partial sum to its right neighbour k - 1 times, so that rank r ends with the whole sum of chunk r; in
all-gather finished chunks go round the same way. Each rank sends 2 (k - 1) / k of the tensor, which is the minimum
(Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009, section 3).

    chunk sent by rank r at hop h:   reduce-scatter r - h - 1,   all-gather r - h      (modulo k)

A chunk is summed once, by hops in a fixed order, then copied: every rank holds the same bits.
"""

from __future__ import annotations

import torch
from mpi4py import MPI

from mpitrain.comm.buffers import MAX_MESSAGE, Transport, memory
from mpitrain.runtime.agree import Comm
from mpitrain.split import part

TAG = 7


def all_reduce(comm: Comm, flat: torch.Tensor, transport: Transport, wire_dtype: torch.dtype | None = None) -> None:
    """Sum a flat contiguous tensor over all ranks in place, the same bits everywhere (collective).

    Args:
        flat: [n] fp32, fp16, bf16 or any dtype that torch adds; n may be 0 or less than the number of ranks.
        wire_dtype: dtype of partial sums on the way, if not the tensor's own.

    Raises:
        ValueError: the tensor is not flat and contiguous.
    """
    reduce_scatter(comm, flat, transport, wire_dtype)
    all_gather(comm, flat, transport)


def reduce_scatter(comm: Comm, flat: torch.Tensor, transport: Transport, wire_dtype: torch.dtype | None = None) -> None:
    """Leave the sum over ranks in this rank's chunk, `part(rank, n, size)`; others are overwritten (collective)."""
    _check(flat)
    if comm.size == 1:
        return
    host = transport.host(flat)
    if host is not flat:
        host.copy_(flat)
    chunks = _chunks(comm, host)
    longest = chunks[0].numel()
    wire = wire_dtype or host.dtype
    arrived = torch.empty(longest, dtype=wire, device=host.device)
    leaving = torch.empty(longest if wire != host.dtype else 0, dtype=wire, device=host.device)
    for hop in range(comm.size - 1):
        outgoing = chunks[(comm.rank - hop - 1) % comm.size]
        if wire != host.dtype:
            outgoing = leaving[: outgoing.numel()].copy_(outgoing)
        target = chunks[(comm.rank - hop - 2) % comm.size]
        incoming = arrived[: target.numel()]
        _shift(comm, outgoing, incoming, transport)
        target += incoming
    if host is not flat:
        own = slice(*part(comm.rank, flat.numel(), comm.size))
        flat[own].copy_(host[own])


def all_gather(comm: Comm, flat: torch.Tensor, transport: Transport) -> None:
    """Fill every chunk from the rank that owns it (collective)."""
    _check(flat)
    if comm.size == 1:
        return
    host = transport.host(flat)
    if host is not flat:
        own = slice(*part(comm.rank, flat.numel(), comm.size))
        host[own].copy_(flat[own])
    chunks = _chunks(comm, host)
    for hop in range(comm.size - 1):
        _shift(comm, chunks[(comm.rank - hop) % comm.size], chunks[(comm.rank - hop - 1) % comm.size], transport)
    if host is not flat:
        flat.copy_(host)


def _check(flat: torch.Tensor) -> None:
    if flat.dim() != 1 or not flat.is_contiguous():
        raise ValueError(f"a ring takes a flat contiguous tensor, found shape {tuple(flat.shape)}")


def _chunks(comm: Comm, host: torch.Tensor) -> list[torch.Tensor]:
    return [host[slice(*part(index, host.numel(), comm.size))] for index in range(comm.size)]


def _shift(comm: Comm, outgoing: torch.Tensor, incoming: torch.Tensor, transport: Transport) -> None:
    """Send to the right, receive from the left; receives are posted first, so nothing rests on eager sends."""
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    transport.synchronize()
    to, of = memory(incoming), memory(outgoing)
    requests = [comm.Irecv([to[a : a + MAX_MESSAGE], MPI.BYTE], left, TAG) for a in range(0, len(to), MAX_MESSAGE)]
    requests += [comm.Isend([of[a : a + MAX_MESSAGE], MPI.BYTE], right, TAG) for a in range(0, len(of), MAX_MESSAGE)]
    transport.wait(requests)
