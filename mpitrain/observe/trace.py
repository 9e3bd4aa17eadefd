"""What one rank did and when, as spans of time; nothing is recorded unless somebody asks."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

MAIN, REDUCER = 0, 1  # threads
THREADS = {MAIN: "main", REDUCER: "reducer"}
now = time.perf_counter_ns  # of all processes of one host the same (clock_gettime(2), CLOCK_MONOTONIC)


@dataclass
class Trace:
    """Spans of some steps: name, category, thread, start and stop in ns of `now`, and what else there is to tell."""

    step: int = 0
    spans: list[tuple[str, str, int, int, int, dict[str, Any]]] = field(default_factory=list)

    def add(self, name: str, category: str, began: int, thread: int = MAIN, **details: Any) -> None:
        """From `began` until now."""
        self.spans.append((name, category, thread, began, now(), {"step": self.step, **details}))

    def events(self, rank: int, title: str, offset: int) -> list[dict[str, Any]]:
        """In the Trace Event Format of Chrome, which Perfetto opens.

        Args:
            rank: of the world; a process to Perfetto.
            title: of this rank.
            offset: ns from this rank's clock to everyone's.
        """
        facts = [("process_name", 0, {"name": title}), ("process_sort_index", 0, {"sort_index": rank})]
        facts += [("thread_name", thread, {"name": name}) for thread, name in THREADS.items()]
        found: list[dict[str, Any]] = [
            {"name": name, "ph": "M", "pid": rank, "tid": thread, "args": details} for name, thread, details in facts
        ]
        for name, category, thread, began, stopped, details in self.spans:
            times = {"ts": (began + offset) / 1e3, "dur": (stopped - began) / 1e3}  # in us
            found.append(
                {"name": name, "cat": category, "ph": "X", "pid": rank, "tid": thread, **times, "args": details}
            )
        return found
