"""`--trace N`: what all ranks did in N steps, in one file for Perfetto and for `report`."""

from __future__ import annotations

import json
import platform
import shlex
from typing import Any

from mpitrain.errors import UsageError
from mpitrain.files import replace_file, user_path
from mpitrain.observe.trace import Trace
from mpitrain.run import Run
from mpitrain.runtime.agree import gather, together
from mpitrain.runtime.clock import offset_to_root

SKIPPED = 2  # steps of a start in which memory and kernels are made


class Tracing:
    """Records the steps of a run that were asked for, then writes them."""

    def __init__(self, run: Run) -> None:
        """Nothing is recorded yet."""
        self._run, self._trace, self._number = run, Trace(), 0

    def begin(self, step: int) -> None:
        """A step, numbered from 1, comes next."""
        self._number += 1
        wanted = SKIPPED < self._number <= SKIPPED + self._run.config.trace
        self._trace.step = step
        self._run.stepper.trace = self._trace if wanted else None

    def end(self) -> None:
        """A step is done, an evaluation may follow; after the last one that was wanted all are written (collective)."""
        self._run.stepper.trace = None
        if self._trace.spans and self._number == SKIPPED + self._run.config.trace:
            self._write()

    def close(self) -> None:
        """Write what has been recorded and not been written yet (collective)."""
        if self._trace.spans:
            self._write()
        elif self._run.config.trace and self._number <= SKIPPED:
            steps = f"the first {SKIPPED} of a start are left out, and this one had {self._number}"
            self._run.console.warn(f"--trace {self._run.config.trace}: no step was recorded; {steps}")

    def _write(self) -> None:
        write(self._run, self._trace)
        self._trace = Trace()


def write(run: Run, trace: Trace) -> None:
    """One file of all ranks, times in us from the first span; no run ends because it cannot be written (collective)."""
    mesh, world = run.place.mesh, run.world
    place = f"replica {mesh.replica}, stage {mesh.stage}" + (f", tensor {mesh.tensor}" if mesh.num_tensor > 1 else "")
    title = f"{place} (rank {world.rank}, {platform.node()})"
    everyone = gather(world, trace.events(world.rank, title, offset_to_root(world)))
    file = run.directory.path / "trace" / "trace.json"
    try:
        with together(world, "writing the trace"):
            if world.rank == 0:
                with user_path("--trace", file):
                    file.parent.mkdir(exist_ok=True)
                    replace_file(file, json.dumps(document(everyone, run)))
    except UsageError as error:
        run.console.warn(str(error))
        return
    report = shlex.join(["python", "-m", "mpitrain", "report", str(run.directory.path)])
    run.console.say("trace", f"{file}: open it at https://ui.perfetto.dev, or: {report}")


def document(everyone: list[list[dict[str, Any]]], run: Run) -> dict[str, Any]:
    """All events, and what `report` has to know of the mesh."""
    events = [event for rank in everyone for event in rank]
    start = min(event["ts"] for event in events if event["ph"] == "X")
    for event in events:
        if event["ph"] == "X":
            event["ts"] -= start
    placement = run.place.arrangement.schedule.placement
    about: dict[str, Any] = {"schedule": run.place.arrangement.schedule.name, "places": placement.places}
    about |= {"tensor": run.place.mesh.num_tensor, "crowded": run.place.transport.patient}
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": about}
