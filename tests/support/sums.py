"""Every way of ours to sum over ranks, numbers that are hard to sum, and what the sum may be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from communicators import HOSTS, on_hosts

from mpitrain.comm import ring
from mpitrain.comm.buckets import Bucket
from mpitrain.comm.buffers import Transport
from mpitrain.comm.choice import choose_exchange


@dataclass(frozen=True)
class Way:
    """How tensors are summed.

    Attributes:
        name: all_reduce, or the algorithm of an exchange: reduce-scatter, then owners write, then all-gather.
        dtype: of what is summed; exchanges sum fp32.
        wire: dtype on the way, if another.
        hosts: a key of HOSTS; all ranks share memory if None.
    """

    name: str
    dtype: torch.dtype = torch.float32
    wire: torch.dtype | None = None
    hosts: str | None = None

    def __str__(self) -> str:
        return "-".join(
            str(word).removeprefix("torch.") for word in (self.name, self.hosts, self.dtype, self.wire) if word
        )

    def num_wired(self, num_ranks: int) -> int:
        """How often a number is rounded to the wire's dtype at most."""
        if self.wire is None:
            return 0
        if self.name == "node":
            return len(set(map(HOSTS[self.hosts], range(num_ranks)))) - 1 if self.hosts else 0
        return num_ranks if self.name == "all_reduce" else num_ranks - 1  # the former gathers in that dtype too


BF16 = torch.bfloat16
SHARES = [0.2, *[0.15] * 4, *[0.2 / 3] * 3]  # of 0.0, -0.0, 1.0, denormals, infinities and nan
WAYS = [
    *(Way("all_reduce", dtype) for dtype in (torch.float32, torch.float16, BF16)),
    Way("all_reduce", wire=BF16),
    Way("ring"),
    Way("ring", wire=BF16),
    Way("native"),
    Way("tree"),
    Way("node"),
    *(Way("node", wire=wire, hosts=hosts) for hosts in HOSTS for wire in (None, BF16)),
]


def sum_by(way: Way, comm: Any, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The sums over ranks, whole on every rank (collective)."""
    transport = Transport(patient=True)
    if way.name == "all_reduce":
        sums = [tensor.clone() for tensor in values]
        for tensor in sums:
            ring.AllReduce(comm, tensor, transport, way.wire)()
        return sums
    buckets = [Bucket([("values", torch.nn.Parameter(torch.zeros(len(tensor))))]) for tensor in values]
    how: dict[str, Any] = {"reproducible": True} if way.name == "tree" else {"algorithm": way.name}
    axis = on_hosts(comm, way.hosts)
    exchange, _ = choose_exchange(comm, axis, transport, buckets, torch.float32, wire_dtype=way.wire, **how)
    for bucket, tensor in zip(buckets, values, strict=True):
        bucket.gradients[: len(tensor)] = tensor
    for number in range(len(buckets)):
        exchange.reduce(number)
    comm.Barrier()  # as the vote of a step
    for piece in (piece for bucket in buckets for piece in bucket.pieces):
        piece.weights.copy_(piece.gradients)
    exchange.spread()
    sums = [bucket.weights[: len(tensor)].clone() for bucket, tensor in zip(buckets, values, strict=True)]
    exchange.close()
    return sums


@cache
def hard_numbers(rank: int, length: int, dtype: torch.dtype, wire: torch.dtype | None) -> torch.Tensor:
    """A rank's [length] numbers: of many sizes, cancelling, denormal, -0.0, too large, infinite and not numbers."""
    common = np.random.Generator(np.random.Philox(key=[length, 1 << 32]))
    own = np.random.Generator(np.random.Philox(key=[length, rank]))
    narrow = torch.finfo(wire or dtype)
    least = narrow.smallest_normal * narrow.eps  # whole multiples of it, up to 8 * 15, are exact
    plain = own.standard_normal(length) * 10.0 ** own.integers(-3, 4, length)
    cancelling = (-1.0) ** rank * 1000 * common.standard_normal(length) + own.standard_normal(length)
    denormal = own.integers(-15, 16, length) * least
    minus_zero = np.full(length, -0.0)
    too_large = np.full(length, 0.75 * torch.finfo(dtype).max)
    special = own.choice([0.0, -0.0, 1.0, least, -least, np.inf, -np.inf, np.nan], length, p=SHARES)
    kinds = common.integers(0, 6, length)
    return torch.from_numpy(np.choose(kinds, [plain, cancelling, denormal, minus_zero, too_large, special])).to(dtype)


def complaint(found: torch.Tensor, terms: Sequence[torch.Tensor], way: Way) -> str:
    """What is wrong with a sum, if anything.

    In whatever order k numbers are added, each takes part in at most k - 1 additions. Each of those, and each rounding
    to the wire's dtype, is off by a factor of at most 1 + eps / 2 (Higham, "Accuracy and stability of numerical
    algorithms", 2002, section 4.2). Sums of denormals are exact, and what lies beyond the largest number is infinite.
    """
    exact = torch.stack([term.double() for term in terms])
    expected, num_terms = exact.sum(0), len(terms)
    growth = (1 + torch.finfo(way.dtype).eps / 2) ** (num_terms - 1)
    growth *= (1 + torch.finfo(way.wire or way.dtype).eps / 2) ** way.num_wired(num_terms)
    bound = (growth - 1) * exact.abs().sum(0)
    rounded, values = expected.to(way.dtype).double(), found.double()
    right = torch.where(rounded.isfinite(), (values - expected).abs() <= bound, values == rounded)
    right |= rounded.isnan() & values.isnan()
    right &= values.signbit() | values.isnan() | ~exact.signbit().all(0)
    wrong = (~right).nonzero().flatten().tolist()
    if not wrong:
        return ""
    first = wrong[0]
    return (
        f"{way}: {len(wrong)} of {len(found)} wrong, the first at {first}: {values[first]} for {expected[first]} "
        f"+- {bound[first]}, the sum of {exact[:, first].tolist()}"
    )
