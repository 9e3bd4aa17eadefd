"""The gradient of an embedding table travels as rows where that is less, and gives what a dense one gives."""

from __future__ import annotations

import pytest
import torch
from communicators import HOSTS
from reducing import check_squares, reducing
from small import small_card, train_small

from mpitrain.comm import ring, rows
from mpitrain.comm.buckets import fill_buckets
from mpitrain.comm.buffers import Transport
from mpitrain.comm.wire import Wire
from mpitrain.split import UNIT, aligned_part

pytestmark = pytest.mark.mpi(min_size=1)
ALGORITHMS = ["ring", "node", "native", *HOSTS]


def sparse_flat(rank: int, num_blocks: int, touched: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A flat tensor that differs from zero in a few blocks of its own, and in block 0 on every rank."""
    generator = torch.Generator().manual_seed(rank)
    blocks = torch.unique(
        torch.cat([torch.zeros(1, dtype=torch.int64), torch.randperm(num_blocks, generator=generator)[:touched]])
    )
    flat = torch.zeros(num_blocks, UNIT)
    flat[blocks] = torch.randn(len(blocks), UNIT, generator=generator)
    return flat.view(-1), blocks


@pytest.mark.parametrize(
    "num_blocks, touched, dense", [(1000, 3, False), (1000, 0, False), (40, 40, True), (1, 1, True)]
)
def test_the_own_chunk_holds_the_sum_and_the_ring_runs_where_it_is_cheaper(comm, num_blocks, touched, dense):
    mine, blocks = sparse_flat(comm.rank, num_blocks, touched + comm.rank % 2 * (touched > 0))
    otherwise = ring.ReduceScatter(comm, mine, Transport())
    arrived = rows.reduce_scatter(comm, mine, blocks, Transport(), None, otherwise)
    own = slice(*aligned_part(comm.rank, num_blocks * UNIT, comm.size))
    expected = sum(sparse_flat(rank, num_blocks, touched + rank % 2 * (touched > 0))[0] for rank in range(comm.size))
    torch.testing.assert_close(mine[own], expected[own], rtol=1e-6, atol=1e-6)
    assert (arrived is None) == (dense and comm.size > 1)
    if arrived is not None:  # what is to be set to zero again
        left = mine.view(-1, UNIT).clone()
        left[torch.cat([blocks, arrived])] = 0
        assert not left.any()


def test_rows_are_rounded_on_the_wire_and_summed_in_fp32(comm):
    flat, block = torch.zeros(1000 * UNIT), torch.zeros(1, dtype=torch.int64)
    flat[:UNIT] = 1.0 if comm.rank else 256.5  # the own value is not rounded: 256.5 is none in bf16
    rows.reduce_scatter(comm, flat, block, Transport(), Wire(torch.bfloat16), lambda: pytest.fail("a ring"))
    if comm.rank == 0:
        assert torch.equal(flat[:UNIT], torch.full((UNIT,), 255.5 + comm.size))


class Table(torch.nn.Module):
    def __init__(self, num_rows: int, width: int) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.zeros(num_rows, width))
        self.other = torch.nn.Parameter(torch.ones(width))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.embedding(tokens, self.table, sparse=True) * self.other


def tokens_of(rank: int, step: int, number: int, num_rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * rank + 10 * step + number)
    return torch.randint(0, num_rows, (7 + rank,), generator=generator)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("num_rows, width", [(997, 64), (11, 128), (50, 24)], ids=["rows", "ring", "no whole blocks"])
def test_every_step_sums_the_rows_of_that_step_alone(comm, algorithm, num_rows, width):
    module = Table(num_rows, width)
    with reducing(comm, buckets := fill_buckets(module, 10**6, ["table"]), algorithm) as (reducer, _):
        for step in range(3):
            reducer.start_step(2)
            for number in range(2):
                if comm.rank != 1 or step != 1:  # a replica without work has no rows
                    module(tokens_of(comm.rank, step, number, num_rows)).sum().backward()
            reducer.finish()
            expected = torch.zeros(num_rows)
            for rank in range(comm.size):
                for number in range(2) if rank != 1 or step != 1 else ():
                    expected += torch.bincount(tokens_of(rank, step, number, num_rows), minlength=num_rows)
            expected = expected[:, None].expand(-1, width).reshape(-1)
            for piece in (piece for piece in buckets[-1].pieces if piece.name == "table"):
                assert torch.equal(piece.gradients, expected[piece.start : piece.stop])
            check_squares(buckets, algorithm)
            comm.Barrier()  # as the vote of a step


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("algorithm", ["ring", "node"])
def test_training_by_rows_gives_the_numbers_of_one_rank(comm, monkeypatch, algorithm):
    from mpi4py import MPI

    card = small_card(hidden_size=64, vocab_size=1997)
    reference = train_small(MPI.COMM_SELF, 1, 1, 10, card=card)
    monkeypatch.setattr(ring.ReduceScatter, "__call__", _only_smaller_than(1997 * 64 // comm.size))
    run = train_small(comm, comm.size, 1, 10, card=card, algorithm=algorithm)
    assert run.losses == pytest.approx(reference.losses, rel=1e-5)
    assert run.grad_norms == pytest.approx(reference.grad_norms, rel=1e-5)


def _only_smaller_than(limit: int):
    """The ring, which must not be given the table, nor a rank's slice of it."""
    run = ring.ReduceScatter.__call__

    def check(self: ring.ReduceScatter) -> None:
        assert self._flat.numel() < limit, "the table travels whole"
        run(self)

    return check
