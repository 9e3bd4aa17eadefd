"""`mpitrain bench allreduce`: our ways of summing gradients against MPI's own and gloo's, taking turns in one run.

The time of a turn is that of its slowest rank. All contenders meet the same state of the machine, because each repeat
runs all of them, in an order drawn anew. Every contender begins with a tensor on each rank and ends when each rank can
read the sum: in memory of its own, or (`node`) each slice where its owner has summed it, in memory that all share.
Before any timing the sum is checked. Only the node algorithm sums fp32 gradients in the bf16 table too.
"""

from __future__ import annotations

import platform
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.table import Table

from mpitrain.bench.facts import describe_machine, write
from mpitrain.comm import native, ring
from mpitrain.comm.buckets import Bucket
from mpitrain.comm.buffers import Transport
from mpitrain.comm.choice import choose_exchange
from mpitrain.comm.exchange import Exchange
from mpitrain.errors import UsageError, on_all_ranks
from mpitrain.files import user_path
from mpitrain.observe.console import Console
from mpitrain.runtime.agree import Comm, collect, share, together
from mpitrain.runtime.device import place_on_node, share_cores
from mpitrain.runtime.notes import note

WARM_UP = 3
SHORT, MOST_CALLS = 1 << 22, 16  # bytes that a turn sums, though in several calls, as a training step does with buckets
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RATIOS = [("node", "MPI"), ("ring", "MPI"), ("node", "gloo")]


@dataclass(frozen=True)
class Contender:
    """A way to sum: what each rank brings, what brings about the sum, and what puts it in one piece to be checked."""

    values: torch.Tensor
    run: Callable[[], Any]
    whole_sum: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Row:
    """One contender at one size: quartiles over the repeats, in seconds."""

    dtype: str
    bytes: int
    contender: str
    lower: float
    median: float
    upper: float


def bench_allreduce(comm: Comm, console: Console, *, sizes: Sequence[int], repeats: int, out: Path | None) -> None:
    """Measure, print tables, and write `allreduce-<ranks>.json` and `.png` into `out` (collective).

    Args:
        comm: the ranks that take part.
        console: speaks on rank 0.
        sizes: bytes of the tensor that every rank brings.
        repeats: timed turns of each contender at each size.
        out: a directory, or None to write nothing.
    """
    with together(comm, "making --out"):
        if comm.rank == 0 and out is not None:
            with user_path("--out", out):
                out.mkdir(parents=True, exist_ok=True)
    cores = share_cores(comm, None)
    facts = describe_machine(comm, cores.num_threads) | {"repeats": repeats, "warm_up": WARM_UP}
    console.say("bench", f"{comm.size} rank(s) on {facts['cores']} cores, {facts['mpi']}, {repeats} turns each")
    transport = Transport(patient=cores.crowded, one_host=place_on_node(comm)[1] == comm.size)
    rows: list[Row] = []
    with _gloo(comm, console):
        for dtype in DTYPES:
            for size in sorted(sizes, reverse=True):  # what does not fit into memory should be known at once
                began = perf_counter()
                rows += _measure(comm, transport, dtype, size, repeats)
                console.say("timed", f"{dtype}, {size >> 10:,} KiB: {perf_counter() - began:.1f} s in all")
            for table in tables_of([row for row in rows if row.dtype == dtype]):
                console.show(table)
    with together(comm, "writing results"):
        if comm.rank == 0 and out is not None:
            rows.sort(key=lambda row: row.bytes)
            document = facts | {"seconds": [asdict(row) for row in rows]}
            write(out, f"allreduce-{comm.size}", document, console, lambda file: draw(file, facts, rows))


def _measure(comm: Comm, transport: Transport, dtype: str, size: int, repeats: int) -> list[Row]:
    values = torch.empty(size // DTYPES[dtype].itemsize, dtype=DTYPES[dtype])
    with contenders(comm, transport, values) as found:
        for name, contender in found.items():
            _check(comm, name, contender)
        names = list(found)
        seconds = np.empty((repeats, len(names)))
        generator = np.random.default_rng(0)  # the same on all ranks
        for repeat in range(-WARM_UP, repeats):
            for number in generator.permutation(len(names)):
                elapsed = _seconds(comm, found[names[number]])
                if repeat >= 0:
                    seconds[repeat, number] = elapsed
    quartiles = np.percentile(seconds, [25, 50, 75], axis=0).T.tolist()
    return [Row(dtype, size, name, *found) for name, found in zip(names, quartiles, strict=True)]


def _seconds(comm: Comm, contender: Contender) -> float:
    """How long a call took on the slowest rank; a turn is several calls if they are short."""
    note(b"timing")
    num_bytes = contender.values.numel() * contender.values.itemsize
    num_calls = max(1, min(MOST_CALLS, SHORT // num_bytes))
    contender.values.fill_(1 / comm.size)  # or sums of sums of sums would overflow
    comm.Barrier()
    began = perf_counter()
    for _ in range(num_calls):
        contender.run()
    elapsed = perf_counter() - began
    return float(max(collect(comm, elapsed))) / num_calls


def _check(comm: Comm, name: str, contender: Contender) -> None:
    right = is_right(comm, contender)
    with together(comm, f"checking {name}"):
        if not right:
            raise RuntimeError(f"{name} summed {contender.values.numel():,} elements wrongly")


def is_right(comm: Comm, contender: Contender) -> bool:
    """Whether this rank finds the right sum (collective)."""
    whole = torch.arange(contender.values.numel(), device=contender.values.device).remainder_(7)
    factors = [2, *(1 - 2 * (rank % 2) for rank in range(1, comm.size))]  # neighbours' sums are -1 to 2: exact in bf16
    contender.values.copy_(whole * factors[comm.rank])
    contender.run()
    found = contender.whole_sum()
    return torch.equal(found, (whole * sum(factors)).to(found.dtype))


@contextmanager
def contenders(
    comm: Comm, transport: Transport, values: torch.Tensor, *, node: bool = True
) -> Iterator[dict[str, Contender]]:
    """By name: `node`, `ring` and `native` are ours, ring16 has bf16 on the wire (collective).

    The node algorithm's input is in the window, where training produces it. On a GPU there are rings alone.

    Raises:
        UsageError: `node` is wanted, and there is no room in shared memory.
    """

    def in_place(reduce: Callable[[], Any]) -> Contender:
        return Contender(values, reduce, lambda: values)

    found: dict[str, Contender] = {}
    with _node_exchange(comm, transport, values) if node else nullcontext() as shared:
        if shared is not None:
            found["node"] = _by_node(comm, *shared, values.numel())
        found["ring"] = in_place(ring.AllReduce(comm, values, transport))
        if values.dtype == torch.float32:
            found["ring16"] = in_place(ring.AllReduce(comm, values, transport, torch.bfloat16))
        if values.dtype == torch.float32 and values.device.type == "cpu":
            found["native"] = in_place(lambda: _by_native(comm, values, transport))
            found["MPI"] = in_place(lambda: native.all_reduce(comm, values))
        if dist.is_initialized():
            found["gloo"] = in_place(lambda: dist.all_reduce(values))
        yield found


@contextmanager
def _node_exchange(comm: Comm, transport: Transport, values: torch.Tensor) -> Iterator[tuple[Exchange, Bucket]]:
    bucket = Bucket([("values", torch.nn.Parameter(torch.zeros(values.shape, dtype=values.dtype)))])
    try:
        exchange, _ = choose_exchange(comm, comm, transport, [bucket], values.dtype, algorithm="node", overlapped=False)
    except UsageError as error:
        size = values.nbytes >> 10
        raise on_all_ranks(UsageError(f"--kib {size}: smaller sizes would work ({error})")) from None
    exchange.wants_squares = False  # others are not asked for a norm either
    yield exchange, bucket
    exchange.close()


def _by_node(comm: Comm, exchange: Exchange, bucket: Bucket, size: int) -> Contender:
    def publish() -> torch.Tensor:
        for piece in bucket.pieces:
            piece.weights.copy_(piece.gradients)
        exchange.spread()
        return bucket.weights[:size]  # a bucket ends with padding

    def run() -> None:
        exchange.reduce(0)
        spread()

    # Between hosts weights are sent, not sums; on one host sums can be read where they are.
    spread = publish if _num_hosts(comm) > 1 else exchange.spread
    return Contender(bucket.gradients[:size], run, publish)


def _by_native(comm: Comm, values: torch.Tensor, transport: Transport) -> None:
    native.reduce_scatter(comm, values, transport)
    native.all_gather(comm, values, transport)


@contextmanager
def _gloo(comm: Comm, console: Console) -> Iterator[None]:
    """torch.distributed's process group over the same ranks, where gloo can be had (collective)."""
    host = platform.node() if _num_hosts(comm) > 1 else "localhost"
    where = share(comm, f"tcp://{host}:{_free_port()}" if comm.rank == 0 else "")
    wait = timedelta(seconds=60)
    try:
        with together(comm, "starting gloo"):
            try:
                dist.init_process_group("gloo", init_method=where, world_size=comm.size, rank=comm.rank, timeout=wait)
            except Exception as error:
                raise UsageError(f"no gloo to compare with: {error}") from None
    except UsageError as error:
        console.warn(str(error))
        if dist.is_initialized():  # here, but not on some other rank
            dist.destroy_process_group()
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def _num_hosts(comm: Comm) -> int:
    return len(set(collect(comm, platform.node())))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def tables_of(rows: Sequence[Row]) -> list[Table]:
    """Milliseconds by size with the worst spread, half the distance of the quartiles; and the ratios that matter."""
    names = list(dict.fromkeys(row.contender for row in rows))
    ratios = [(one, other) for one, other in RATIOS if {one, other} <= set(names)]
    times = _table(f"{rows[0].dtype}: a call on the slowest rank in ms, median; ± the worst spread", *names, "±")
    quotients = _table(f"{rows[0].dtype}: ratios of medians", *(f"{one}/{other}" for one, other in ratios))
    for size in sorted({row.bytes for row in rows}):
        found = {row.contender: row for row in rows if row.bytes == size}
        spread = max((row.upper - row.lower) / row.median / 2 for row in found.values())
        times.add_row(f"{size >> 10:,}", *(f"{1e3 * row.median:.3g}" for row in found.values()), f"{spread:.0%}")
        cells = (f"{found[one].median / found[other].median:.2f}" for one, other in ratios)
        quotients.add_row(f"{size >> 10:,}", *cells)
    return [times, quotients]


def _table(title: str, *columns: str) -> Table:
    table = Table(box=None, pad_edge=False, title=title, title_justify="left", header_style="bold")
    for name in ("KiB", *columns):
        table.add_column(name, justify="right", no_wrap=True)
    return table


def draw(file: Path, facts: dict[str, Any], rows: Sequence[Row]) -> None:
    """Time by size, a line per contender with its quartiles, a panel per dtype."""
    from matplotlib.figure import Figure

    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    figure = Figure(figsize=(5 * len(dtypes), 4), layout="constrained")
    panels = figure.subplots(1, len(dtypes), sharey=True, squeeze=False)[0]
    color = {name: f"C{number}" for number, name in enumerate(dict.fromkeys(row.contender for row in rows))}
    for dtype, panel in zip(dtypes, panels, strict=True):
        for name in dict.fromkeys(row.contender for row in rows if row.dtype == dtype):
            line = [row for row in rows if (row.dtype, row.contender) == (dtype, name)]
            sizes = [row.bytes / 2**20 for row in line]
            lower, median, upper = np.array([[row.lower, row.median, row.upper] for row in line]).T * 1e3
            panel.plot(sizes, median, marker="o", markersize=3, color=color[name], label=name)
            panel.fill_between(sizes, lower, upper, alpha=0.2, color=color[name])
        panel.set(xscale="log", yscale="log", title=dtype, xlabel="MiB on each rank")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("ms, slowest rank")
    panels[0].legend(frameon=False)
    figure.suptitle(f"all-reduce, {facts['ranks']} ranks, {facts['cores']} cores, {facts['mpi']}", fontsize=10)
    figure.savefig(file, dpi=150)
