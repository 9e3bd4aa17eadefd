"""`mpitrain bench train`: how near a training step comes to the fastest product of matrices, and where its time goes.

Model FLOP utilisation (Chowdhery et al., "PaLM", 2022, appendix B, without the term of attention): 6 x parameters
outside of the embeddings x real tokens per second, by the FLOP per second of the fastest product of this dtype that
torch makes here, on the same ranks and threads at the same time. Products and steps take turns.
"""

from __future__ import annotations

import os
import resource
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from rich.table import Table
from torch.profiler import ProfilerActivity, profile, record_function

from mpitrain.bench.facts import describe_machine, write
from mpitrain.bench.step import WARM_UP, Turn, Workload
from mpitrain.config import Config
from mpitrain.model import linear
from mpitrain.model.bert import parameter_shapes
from mpitrain.model.card import ModelCard
from mpitrain.model.dropout import KeyedDropout
from mpitrain.observe.console import Console
from mpitrain.place import DTYPES
from mpitrain.runtime.agree import Comm, collect, together

ROWS = (512, 1024, 2048)  # of the products that are timed
PROFILED_STEPS = 2
# Where time of operators goes: by the innermost of these names that an operator is, or is called by.
PARTS = {
    "attention": ("_PackedAttention", "_PackedAttentionBackward"),
    "linear": ("aten::linear", "aten::addmm", "aten::mm", "AddmmBackward0", "_Linear", "_LinearBackward"),
    "activation": ("aten::gelu", "GeluBackward0", "aten::relu", "ReluBackward0"),
    "norm": ("aten::layer_norm", "NativeLayerNormBackward0"),
    "dropout": ("dropout", "_AddKept", "_AddKeptBackward"),
    "embedding": ("aten::embedding", "EmbeddingBackward0"),
    "loss": ("aten::cross_entropy_loss", "NllLossBackward0", "LogSoftmaxBackward0"),
    "gradients to buckets": ("torch::autograd::AccumulateGrad",),
}
PART_OF = {name: part for part, names in PARTS.items() for name in names}
OPTIMIZER, COMMUNICATION, DATA, OTHER = "optimizer", "communication", "data", "other"


def bench_train(
    comm: Comm, config: Config, console: Console, *, lengths: Path | None, repeats: int, steps: int
) -> None:
    """Time `repeats` turns of `steps` steps and of products; write `train-<ranks>.json`, .png to `--out` (collective).

    Args:
        comm: all ranks.
        config: model, mesh, batch, precision as in training; `data` does not matter.
        console: speaks on rank 0.
        lengths: as in `bench_step`.
        repeats: turns.
        steps: of a turn.
    """
    work = Workload.of_random_tokens(
        comm, config, console, lengths, num_steps=WARM_UP + repeats * steps + PROFILED_STEPS
    )
    card, device = work.problem.card, work.place.transport.device
    products = Products(card, DTYPES[config.train.precision], device)
    turns: list[Turn] = []
    for _ in range(repeats):
        products.turn(comm)
        turns.append(work.run(steps))
    peak = products.rate()
    tokens_per_second = float(np.median([turn.tokens / turn.seconds for turn in turns]))
    shapes = parameter_shapes(card, len(work.problem.label_names))
    num_weights = sum(prod(shape) for name, shape in shapes.items() if ".embeddings." not in name)
    model = 6 * num_weights * tokens_per_second
    memory = collect(comm, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10)
    parts = _parts(comm, work, turns, steps)
    figures = {
        "tokens_per_second": tokens_per_second,
        "model_flop_per_second": model,
        "product_flop_per_second": peak,
        "utilisation": model / peak,
        "seconds_of_a_step": parts,
        "peak_memory": memory,
    }
    facts = describe_machine(comm, torch.get_num_threads())
    console.show(table_of(figures))
    with together(comm, "writing results"):
        if comm.rank == 0 and config.out is not None:
            document = facts | work.describe(turns, steps) | figures
            write(config.out, f"train-{comm.size}", document, console, lambda file: draw(file, document))
    work.close()


class Products:
    """Products of the shapes of a model's linear layers, by each library that there is."""

    def __init__(self, card: ModelCard, dtype: torch.dtype, device: torch.device) -> None:
        """Make factors; each shape is timed for itself."""
        self._device = device
        sizes = [(card.hidden_size, card.intermediate_size), (2048, 2048)]
        self._factors = [
            (torch.randn(rows, inputs).to(device, dtype), torch.randn(outputs, inputs).to(device, dtype))
            for inputs, outputs in sizes
            for rows in ROWS
        ]
        choice = dtype == torch.float32 and device.type == "cpu" and linear.has_onednn()
        self._libraries = linear.LIBRARIES if choice else (linear.in_use(),)
        self._rates: dict[tuple[int, str], list[float]] = defaultdict(list)

    def turn(self, comm: Comm) -> None:
        """Time every shape by every library, on all ranks together: they may have to share cores (collective)."""
        before = linear.in_use()
        for number, (x, weight) in enumerate(self._factors):
            for library in self._libraries:
                linear.use(library)
                self._once(x, weight)
                comm.Barrier()
                began = perf_counter()
                self._once(x, weight)
                comm.Barrier()
                flop = 2 * x.numel() * len(weight) * comm.size
                self._rates[number, library].append(flop / (perf_counter() - began))
        linear.use(before)

    def _once(self, x: torch.Tensor, weight: torch.Tensor) -> None:
        linear.product(x, weight)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def rate(self) -> float:
        """FLOP per second of all ranks in the fastest, a median over turns; rank 0's clock counts."""
        return max(float(np.median(rates)) for rates in self._rates.values())


def _parts(comm: Comm, work: Workload, turns: list[Turn], steps: int) -> dict[str, float]:
    """Seconds of a step by part, means over ranks: those of the passes are shared out as in a profile of some steps."""
    seconds = {name: float(np.median([turn.parts[name] / steps for turn in turns])) for name in turns[0].parts}
    with _profiled() as found:
        passes = work.run(PROFILED_STEPS).parts["forward_backward"]
    everyone = collect(comm, found)
    shares = {name: sum(rank.get(name, 0.0) for rank in everyone) / comm.size / passes for name in PARTS}
    if work.place.transport.device.type == "cuda":  # its kernels run by themselves: operators here only start them
        shares = {}
    shares[OTHER] = max(0.0, 1 - sum(shares.values()))
    parts = {name: seconds["forward_backward"] * share for name, share in shares.items()}
    communication = seconds["reduce"] + seconds["pipeline_wait"] + seconds["gather"]
    update = seconds["update"] - seconds["gather"]
    return parts | {OPTIMIZER: update, DATA: seconds["data"], COMMUNICATION: communication}


@contextmanager
def _profiled() -> Iterator[dict[str, float]]:
    """Seconds of this thread's operators by part, once the block has ended."""
    found: dict[str, float] = defaultdict(float)
    profiler = profile(activities=[ProfilerActivity.CPU])
    with _silent():
        profiler.start()
    mask = record_function("dropout")(KeyedDropout.mask)  # or NumPy's draws would be nobody's
    try:
        with record_function(__name__), patch.object(KeyedDropout, "mask", mask):
            yield found
    finally:
        with _silent():
            profiler.stop()
    events = profiler.events()  # type: ignore[no-untyped-call]
    threads = {event.thread for event in events if event.name == __name__}  # not the one that sums gradients
    for event in events:
        part = _part_of(event) if event.thread in threads else None
        if part is not None:
            found[part] += event.self_cpu_time_total * 1e-6


def _part_of(event: Any) -> str | None:
    while event is not None:
        name = event.name.removeprefix("autograd::engine::evaluate_function: ")
        if name in PART_OF:
            return PART_OF[name]
        event = event.cpu_parent
    return None


@contextmanager
def _silent() -> Iterator[None]:
    """No standard error: the profiler's library announces itself there."""
    sys.stderr.flush()
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def table_of(figures: dict[str, Any]) -> Table:
    """Parts of a step, and what they come to."""
    table = Table(box=None, pad_edge=False, title="a step by its parts, mean of the ranks", title_justify="left")
    table.add_column("")
    table.add_column("ms", justify="right")
    table.add_column("%", justify="right")
    parts = figures["seconds_of_a_step"]
    for name, seconds in parts.items():
        table.add_row(name, f"{1e3 * seconds:,.1f}", f"{seconds / sum(parts.values()):.1%}")
    model, peak = (figures[f"{name}_flop_per_second"] / 1e9 for name in ("model", "product"))
    table.caption = (
        f"{figures['tokens_per_second']:,.0f} tokens/s: {model:,.0f} GFLOP/s, {figures['utilisation']:.2f} of the "
        f"{peak:,.0f} GFLOP/s that products reach; peak memory of a rank {max(figures['peak_memory']) / 2**30:.2f} GiB"
    )
    table.caption_justify = "left"
    return table


def draw(file: Path, document: dict[str, Any]) -> None:
    """One bar per part, and what the step would take if it were products alone."""
    from matplotlib.figure import Figure

    parts = document["seconds_of_a_step"]
    names, ms = list(parts), [1e3 * seconds for seconds in parts.values()]
    figure = Figure(figsize=(7, 4), layout="constrained")
    panel = figure.subplots()
    bars = panel.barh(names, ms, color=["C0" if name == "linear" else "C1" for name in names])
    panel.bar_label(bars, [f"{value:.1f}" for value in ms], padding=3, fontsize=8)
    bound = sum(ms) * document["utilisation"]
    panel.axvline(bound, color="0.5", linestyle=":")
    panel.text(bound, len(names) - 1, " products alone", color="0.4", fontsize=8, va="center")
    panel.invert_yaxis()
    panel.set_xlabel("ms of a step")
    panel.margins(x=0.12)
    train = document["config"]["train"]
    title = (
        f"{document['config']['model']}, batch {train['batch_size']}, {train['precision']}, {document['ranks']} rank(s)"
    )
    figure.suptitle(f"{title}: {document['utilisation']:.2f} of the fastest product", fontsize=10)
    figure.savefig(file, dpi=150)
