"""What saves cost a training, and loading by the time of reading the bytes alone.

    mpirun -np 2 python tests/benchmarks/checkpoints.py [--model bert-base-cased] [--folder DIR] [--turns 7] [--steps 8]

Turns alternate: some steps alone; a save that is waited for; a save that goes on beside as many steps. Of the last are
told the stall, in which nothing is trained, and all that steps took longer for it. Then, with files dropped from the
page cache and with files in it: reading all bytes, and verifying and loading the checkpoint. All times are those of the
slowest rank.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter

from mpitrain.runtime import launch

world = launch.start()

from mpitrain import config  # noqa: E402 - MPI comes first
from mpitrain.bench.step import Workload  # noqa: E402
from mpitrain.checkpoint.load import fill, verify  # noqa: E402
from mpitrain.checkpoint.manifest import Progress  # noqa: E402
from mpitrain.checkpoint.saver import Saver  # noqa: E402
from mpitrain.observe.console import Console  # noqa: E402
from mpitrain.runtime.agree import collect, share  # noqa: E402


def timed(work: Callable[[], object]) -> float:
    """Seconds of the slowest rank."""
    world.Barrier()
    began = perf_counter()
    work()
    world.Barrier()
    return float(max(collect(world, perf_counter() - began)))


def save(saver: Saver, work: Workload, step: int) -> None:
    saver.save(
        work.stepper.optimizer.slices(once=True),
        progress=Progress(step=step),
        mesh={},
        identity={},
        documents={},
        keep=1,
    )


def read_all(place: Path) -> None:
    for path in sorted(place.iterdir())[world.rank :: world.size]:
        with path.open("rb", buffering=0) as file:
            buffer = bytearray(1 << 22)
            while file.readinto(buffer):
                pass


def drop_from_cache(place: Path) -> None:
    for path in place.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def describe(seconds: list[float]) -> str:
    low, _, high = quantiles(seconds, n=4)
    return f"{median(seconds):7.3f} s  ({low:.3f} to {high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="bert-base-cased")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    folder = Path(share(world, tempfile.mkdtemp(prefix="checkpoints-", dir=options.folder) if world.rank == 0 else ""))
    settings = config.load(["--model", options.model, "--train.precision", "bf16"])
    console = Console(world.rank == 0)
    work = Workload.of_random_tokens(world, settings, console, None, num_steps=10**6)
    for name in ("at-once", "beside"):
        (folder / name).mkdir(exist_ok=True)
    at_once = Saver(world, folder / "at-once", asynchronous=False)
    beside = Saver(world, folder / "beside", asynchronous=True)
    found: dict[str, list[float]] = {name: [] for name in ("steps alone", "save, waited for", "stall", "longer by")}
    for turn in range(options.turns + 1):  # the first one warms up
        alone = timed(lambda: work.run(options.steps))
        waited = timed(lambda turn=turn: save(at_once, work, turn))
        beside.take_seconds()

        def both(turn: int = turn) -> None:
            save(beside, work, turn)
            work.run(options.steps, beside)
            beside.finish()

        together = timed(both)
        stall = max(collect(world, beside.take_seconds()))
        if turn:
            for name, seconds in zip(found, (alone, waited, stall, together - alone), strict=True):
                found[name].append(seconds)
    place = folder / "beside" / f"step-{options.turns:08d}"
    size = sum(path.stat().st_size for path in place.iterdir())
    console.say("size", f"{size / 2**30:.2f} GiB on {world.size} ranks")
    for name, seconds in found.items():
        console.say("", f"{name:<18}{describe(seconds)}")
    ratios = (a / b for a, b in zip(found["stall"], found["save, waited for"], strict=True))
    console.say("", f"{'stall / waited':<18}{median(ratios):7.3f}")
    slices = list(work.stepper.optimizer.slices())

    def load() -> None:
        fill(world, place, verify(world, place), slices)

    for name, prepare in (("from disk", drop_from_cache), ("from cache", lambda place: None)):
        times: dict[str, list[float]] = {"read": [], "load": []}
        for _ in range(options.turns):
            for kind, action in (("read", lambda: read_all(place)), ("load", load)):
                prepare(place)
                times[kind].append(timed(action))
        for kind, seconds in times.items():
            console.say("", f"{kind + ' ' + name:<18}{describe(seconds)}")
        ratios = (a / b for a, b in zip(times["load"], times["read"], strict=True))
        console.say("", f"{'load / read':<18}{median(ratios):7.3f}")
    at_once.close()
    beside.close()
    work.close()
    world.Barrier()
    if world.rank == 0:
        shutil.rmtree(folder)


main()
