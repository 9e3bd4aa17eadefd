"""How fast messages and products are, and whether our own exchanges sum rightly."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from itertools import product

import torch

from mpitrain.bench.allreduce import contenders, is_right
from mpitrain.comm.buffers import Transport
from mpitrain.comm.pingpong import neighbours, ping_pong
from mpitrain.doctor.findings import Finding
from mpitrain.doctor.ground import Ground, everywhere
from mpitrain.doctor.judge_speed import judge_links, judge_products, judge_sums
from mpitrain.errors import UsageError
from mpitrain.model import linear
from mpitrain.place import DTYPES
from mpitrain.runtime.agree import collect
from mpitrain.runtime.notes import note

ODD_SIZES = (1, 3, 1023, 65_537, 1_000_003)  # elements
SECONDS = 0.4  # of products, at least
SIDE = {"cpu": 1024, "cuda": 4096}  # of square factors


def check_links(ground: Ground) -> list[Finding]:
    """Messages between the ends of each node, and between neighbouring nodes (collective)."""
    members = [ground.members(leader) for leader in ground.leaders]
    inside = [[(ranks[0], ranks[-1]) for ranks in members if len(ranks) > 1]]
    found = []
    for check, rounds in (("node link", inside), ("network link", neighbours(ground.leaders))):
        links = [link for pairs in rounds for link in ping_pong(ground.comm, pairs, ground.transport)]
        found.append(judge_links(check, links, ground.hosts, crowded=ground.cores.crowded))
    return found


def check_sums(ground: Ground) -> list[Finding]:
    """Our own exchanges beside MPI's, in memory of the host, and of the GPUs if they train (collective)."""
    wrong: list[str] = []
    names: dict[str, None] = {}
    shares = True
    for size, dtype in product(ODD_SIZES, ("fp32", "bf16")):
        try:
            wrong += _wrong_sums(ground, torch.empty(size, dtype=DTYPES[dtype]), names, node=shares)
        except UsageError as error:  # of those who have no room to share
            if not error.agreed or not shares:
                raise
            shares = False
            wrong += _wrong_sums(ground, torch.empty(size, dtype=DTYPES[dtype]), names, node=False)
        if ground.device.type == "cuda":
            values = torch.empty(size, dtype=DTYPES[dtype], device=ground.device)
            wrong += _wrong_sums(ground, values, names, node=False)
    return [judge_sums(list(names), ODD_SIZES, wrong, "" if shares else "shared memory has too little room")]


def _wrong_sums(ground: Ground, values: torch.Tensor, names: dict[str, None], *, node: bool) -> list[str]:
    """Exchanges that sum wrongly, with size and rank; `names` are those that were tried (collective)."""
    on_host = values.device.type == "cpu"
    transport = replace(ground.transport, device=values.device, direct=True) if on_host else ground.transport
    wrong = []
    with contenders(ground.comm, transport, values, node=node) as found:
        for name, contender in found.items():
            where = name if on_host else f"{name} on GPUs"
            note(f"sum of {len(values)} elements by {where}".encode())
            right = collect(ground.comm, is_right(ground.comm, contender))
            names[where] = None
            dtype = str(values.dtype).removeprefix("torch.")
            wrong += [f"{where}, {len(values):,} of {dtype} on rank {right.index(False)}"] if not all(right) else []
    return wrong


def check_products(ground: Ground) -> list[Finding]:
    """Products of matrices by all ranks at once: they may have to share cores (collective)."""
    linear.use(linear.suits_maker())
    kinds = ["cpu", "cuda"] if ground.device.type == "cuda" else ["cpu"]
    found, fp32 = [], 0.0
    for dtype in ("fp32", "bf16"):
        rates = {
            kind: everywhere(ground.comm, f"multiplying in {dtype} on {kind}", partial(_rate, ground, kind, dtype))
            for kind in kinds
        }
        together = sum(mean for mean, _ in rates[kinds[-1]])
        times_fp32 = together / fp32 if fp32 else None
        fp32 = fp32 or together
        found.append(judge_products(dtype, rates, ground.hosts, times_fp32))
    return found


def _rate(ground: Ground, kind: str, dtype: str) -> tuple[float, float]:
    """FLOP a second of this rank, on average and of the quickest product."""
    device = ground.device if kind == "cuda" else torch.device("cpu")
    one, other = (torch.ones(SIDE[kind], SIDE[kind], dtype=DTYPES[dtype], device=device) for _ in range(2))
    transport = Transport(device)
    seconds: list[float] = []
    while len(seconds) < 2 or sum(seconds[1:]) < SECONDS:  # the first one compiles, and warms up
        began = time.perf_counter()
        linear.product(one, other)
        transport.synchronize()
        seconds.append(time.perf_counter() - began)
    flop, (_, *timed) = 2 * SIDE[kind] ** 3, seconds
    return flop * len(timed) / sum(timed), flop / min(timed)
