"""From facts to findings, for how fast messages and products are, and whether sums are right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from mpitrain.doctor.findings import Finding, bad, ok, warn
from mpitrain.errors import ExitCode

NAMES = {"cpu": "cores", "cuda": "GPUs"}
UNLIKE = 4  # times as slow as the median is no chance
LAGGARD = 2  # times as slow as the median of equal machines
# Seconds and bytes a second beyond which a link is not what it should be.
BOUNDS = {"node link": (100e-6, 5e8), "network link": (200e-6, 1e9)}
ADVICE = {
    "node link": "see whether other jobs run there; and that MPI uses shared memory in a node",
    "network link": "see that MPI uses the fast network (ucx_info -d, fi_info -l), not TCP",
}


def judge_links(check: str, links: Sequence[Mapping[str, Any]], hosts: Sequence[str], *, crowded: bool) -> Finding:
    """Whether messages are right, and none of the links is slow.

    Args:
        check: one of BOUNDS.
        links: ranks [2], latency in seconds, bandwidth in bytes a second, and right: what came is what was sent.
        hosts: of each rank.
        crowded: ranks outnumber cores, so that times say little.
    """
    facts = {"links": [dict(link) for link in links]}
    if not links:
        return ok(check, "no such pair of ranks in this job", facts)

    def named(link: Mapping[str, Any]) -> str:
        first, second = link["ranks"]
        return f"between rank {first} ({hosts[first]}) and {second} ({hosts[second]})"

    for link in links:
        if not link["right"]:
            found = f"other bytes have come than were sent {named(link)}"
            return bad(check, found, "tell whoever runs this machine", facts, ExitCode.FAULT)
    slowest = min(links, key=lambda link: link["bandwidth"])
    found = f"{1e6 * max(link['latency'] for link in links):.1f} us, {slowest['bandwidth'] / 1e9:.2f} GB/s"
    found += f", the worst of {len(links)} pairs" if len(links) > 1 else ""
    if crowded:
        return ok(check, f"{found}, while ranks take turns on cores", facts)
    usual = median(link["bandwidth"] for link in links)
    if slowest["bandwidth"] * UNLIKE < usual:
        found = f"{slowest['bandwidth'] / 1e9:.2f} GB/s {named(slowest)}, {usual / 1e9:.2f} elsewhere"
        return warn(check, found, "leave that node out, and tell whoever runs it", facts)
    latency, bandwidth = BOUNDS[check]
    if slowest["bandwidth"] < bandwidth or median(link["latency"] for link in links) > latency:
        return warn(check, found, ADVICE[check], facts)
    return ok(check, found, facts)


def judge_sums(names: Sequence[str], sizes: Sequence[int], wrong: Sequence[str], untried: str) -> Finding:
    """Whether our own exchanges sum as MPI does, which is to say rightly.

    Args:
        names: of the exchanges, MPI's own among them.
        sizes: elements of what was summed.
        wrong: what was summed wrongly, in words.
        untried: why one of them could not be tried.
    """
    facts = {"exchanges": list(names), "sizes": list(sizes), "wrong": list(wrong), "untried": untried}
    if wrong:
        found = f"wrong: {', '.join(wrong[:3])}{', ...' if len(wrong) > 3 else ''}"
        advice = "do not train here; with --json this is a report for a ticket"
        return bad("sums", found, advice, facts, ExitCode.FAULT)
    found = f"{', '.join(names)}: right on {sizes[0]:,} to {sizes[-1]:,} elements"
    if untried:
        return warn("sums", found, f"the node exchange was not tried: {untried}", facts)
    return ok("sums", found, facts)


def judge_products(
    dtype: str, rates: Mapping[str, Sequence[tuple[float, float]]], hosts: Sequence[str], times_fp32: float | None
) -> Finding:
    """How fast matrices are multiplied, and whether a rank lags behind.

    Args:
        dtype: of the factors.
        rates: FLOP a second of each rank, on average, and of its quickest product; all at once; by kind of device.
        hosts: of each rank.
        times_fp32: how many times as fast it is as fp32, on the device that trains.
    """
    check, facts = f"{dtype} products", {"flop_per_second": {kind: list(each) for kind, each in rates.items()}}
    told = [f"{sum(mean for mean, _ in each) / 1e9:,.0f} GFLOP/s on {NAMES[kind]}" for kind, each in rates.items()]
    found = f"{', '.join(told)}, all {len(hosts)} rank(s) at once"
    found += f"; {times_fp32:.1f} times as fast as fp32" if times_fp32 is not None else ""
    for each in rates.values():
        best = [quickest for _, quickest in each]
        if min(best) * LAGGARD < median(best):
            rank = best.index(min(best))
            lag = f"rank {rank} on {hosts[rank]} multiplies at {min(best) / median(best):.2f} of the usual rate"
            return warn(check, lag, "see what else runs there, and whether it is hot: the others wait for it", facts)
    return ok(check, found, facts)
