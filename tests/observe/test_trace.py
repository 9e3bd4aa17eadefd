"""Spans of a rank as Perfetto reads them."""

from __future__ import annotations

from mpitrain.observe.trace import REDUCER, Trace, now


def test_spans_become_complete_events_on_everyones_clock():
    trace = Trace(step=7)
    began = now()
    trace.add("forward 3", "compute", began, micro_batch=3)
    trace.step = 8
    trace.add("reduce bucket 0", "reduce", began, REDUCER)
    stopped = now()
    found = trace.events(rank=5, title="here", offset=2_000_000)
    titles = {(event["name"], event["tid"]): event["args"] for event in found if event["ph"] == "M"}
    assert titles["process_name", 0] == {"name": "here"}
    assert titles["thread_name", REDUCER] == {"name": "reducer"}
    first, second = (event for event in found if event["ph"] == "X")
    assert (first["name"], first["cat"], first["pid"], first["tid"]) == ("forward 3", "compute", 5, 0)
    assert first["args"] == {"step": 7, "micro_batch": 3}
    assert (second["tid"], second["args"]) == (REDUCER, {"step": 8})
    assert first["ts"] == (began + 2_000_000) / 1e3
    assert 0 < first["dur"] <= second["dur"] <= (stopped - began) / 1e3
