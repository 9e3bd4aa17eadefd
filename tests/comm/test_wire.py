"""What rounding on the wire loses is measured, and with feedback nothing is lost for good."""

from __future__ import annotations

import math

import pytest
import torch
from reducing import reducing

from mpitrain.comm.buckets import Bucket
from mpitrain.comm.wire import Wire
from mpitrain.runtime.agree import collect

BF16 = torch.bfloat16
VALUE = 1 + 2**-9  # between two numbers of bf16


def test_the_error_is_that_of_rounding():
    flat = torch.full((100,), VALUE)
    wire = Wire(BF16)
    assert torch.equal(wire.round(flat, flat[10:30]).float(), torch.ones(20))
    assert wire.take_squared_error() == pytest.approx(20 * 2.0**-18)
    assert wire.take_squared_error() == 0, "an error is taken once"
    assert wire.round(flat.bfloat16(), flat.bfloat16()).dtype == BF16


@pytest.mark.parametrize("as_rows", [False, True])
def test_with_feedback_what_was_lost_is_sent_later(as_rows):
    wire, exact, sent = Wire(BF16, 256, feedback=True), 0.0, torch.zeros(256)
    for _ in range(64):
        flat, numbers = torch.full((256,), VALUE), torch.tensor([0, 3])
        if as_rows:
            sent.view(4, 64)[numbers] += wire.round_rows(flat.view(4, 64)[numbers], numbers).float()
        else:
            sent[64:128] += wire.round(flat, flat[64:128]).float()
        exact += VALUE
    rows = [0, 3] if as_rows else [1]
    assert (sent.view(4, 64)[rows] - exact).abs().max() < 2**-7, "no more than one rounding, whatever the steps"
    others = [row for row in range(4) if row not in rows]
    assert wire.residual is not None and not wire.residual.view(4, 64)[others].any()


def test_infinities_do_not_stay():
    flat = torch.tensor([math.inf, -math.inf, math.nan, VALUE])
    wire = Wire(BF16, 4, feedback=True)
    assert not wire.round(flat.clone(), flat)[:3].isfinite().any()
    assert wire.residual is not None and wire.residual.isfinite().all()
    wire.take_squared_error()
    wire.round(flat, torch.ones(4))
    assert wire.take_squared_error() == pytest.approx(float(wire.residual.square().sum()))


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("algorithm", ["ring", "hosts of two"])
def test_sums_over_many_steps_lose_nothing_with_feedback(comm, algorithm):
    lost = {}
    for feedback in (False, True):
        module = torch.nn.Linear(40, 40, bias=False)
        bucket = Bucket([("weight", module.weight)])
        with reducing(comm, [bucket], algorithm, BF16, error_feedback=feedback) as (reducer, exchange):
            total, squares = torch.zeros_like(bucket.reduced), 0.0
            for _ in range(32):
                reducer.start_step(1)
                (module.weight.sum() * VALUE).backward()
                reducer.finish()
                total += bucket.reduced
                squares += exchange.take_wire_errors()[0][0]
                comm.Barrier()  # as the vote of a step
            largest = float((total - 32 * comm.size * VALUE).abs().max()) if len(total) else 0.0
            lost[feedback] = max(collect(comm, largest))
            rounded = sum(collect(comm, squares)) > 0
            assert rounded == (algorithm == "ring" or comm.size > 2), "only one host: nothing is sent"
    if rounded:
        assert lost[False] >= 32 * 2**-9
        assert lost[True] <= lost[False] / 4


@pytest.mark.mpi(min_size=1)
def test_residuals_are_named_by_parameter_and_rank(comm):
    first, second = torch.nn.Parameter(torch.zeros(100)), torch.nn.Parameter(torch.zeros(30))
    bucket = Bucket([("first", first), ("second", second)])
    with reducing(comm, [bucket], "ring", BF16, error_feedback=True) as (_, exchange):
        found = [(piece.kind, piece.name, piece.start, piece.stop) for piece in exchange.residuals(comm.rank)]
    kind = f"residual-{comm.rank}"
    expected = [(kind, "first", 0, 100), (kind, "second", 0, 30)]
    assert found == (expected if comm.size > 1 else []), "one rank sends nothing, and loses nothing"
