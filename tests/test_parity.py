"""The result does not depend on the mesh: losses, gradient norms and weights; dropout and clipping are on."""

from __future__ import annotations

import hashlib
import math
from contextlib import suppress
from functools import cache

import pytest
import torch
from communicators import HOSTS
from mpi4py import MPI
from small import small_card, train_small

from mpitrain.comm.buffers import Transport
from mpitrain.pipeline.schedule import SCHEDULES
from mpitrain.runtime.agree import Comm, collect, share

MESHES = {2: [(2, 1), (1, 2)], 3: [(3, 1), (1, 3)], 4: [(2, 2), (1, 4), (4, 1)], 8: [(4, 2), (2, 4)]}
# With ranks that share layers, of which two and four fit the heads of the model.
SHARED = {2: [(1, 1, 2)], 3: [(1, 1, 3)], 4: [(1, 1, 4), (2, 1, 2), (1, 2, 2)], 8: [(2, 2, 2)]}
SIX_HEADS = small_card(hidden_size=48, num_attention_heads=6, intermediate_size=50)
AT = (1, 10, 40)

pytestmark = pytest.mark.mpi(min_size=2)


def meshes_of(comm) -> list[tuple[int, int]]:
    return MESHES.get(comm.size, [])


@cache
def one_rank(num_steps: int, **options):
    """The reference run, on rank 0 alone, for all ranks (collective over the world)."""
    world, found = Comm(MPI.COMM_WORLD), None
    if world.rank == 0:
        with suppress(Exception):  # the others wait for an answer: None, for a failure, fails on all
            found = train_small(MPI.COMM_SELF, 1, 1, num_steps, keep_weights=AT, **options)
    Transport(patient=True).wait([world.Ibarrier()])  # in naps, as cores are few
    return world.bcast(found)


def relative(run, reference, step: int) -> float:
    """Norm of the difference by norm, over all weights of the rank.

    Not by parameter: softmax ignores a shift of all scores, so the true gradient of a key bias is 0, and AdamW makes
    steps of rounding noise there on any mesh.
    """
    expected = {name: reference.weights[step][name][run.shards[name].slices] for name in run.weights[step]}
    difference = sum(float((run.weights[step][name] - expected[name]).double().square().sum()) for name in expected)
    size = sum(float(values.double().square().sum()) for values in expected.values())
    return math.sqrt(difference / size)


def assert_equal_runs(run, reference, tolerance: float) -> None:
    for step in run.weights:
        assert run.losses[step - 1] == pytest.approx(reference.losses[step - 1], rel=tolerance)
        assert run.grad_norms[step - 1] == pytest.approx(reference.grad_norms[step - 1], rel=tolerance)
        assert relative(run, reference, step) < tolerance


def test_any_mesh_gives_the_numbers_of_one_rank(comm):
    reference = one_rank(40)
    assert max(reference.grad_norms) > 0.4, "clipping must be active, or its norm is not tested"
    for data, pipe in meshes_of(comm):
        run = train_small(comm, data, pipe, 40, keep_weights=AT)
        assert_equal_runs(run, reference, 1e-5)


@pytest.mark.parametrize("hosts", [None, "hosts of two"])
def test_ranks_that_share_layers_give_the_numbers_of_one_rank(comm, hosts):
    options = {"card": SIX_HEADS} if comm.size == 3 else {}
    reference = one_rank(40, **options)
    for data, pipe, tensor in SHARED.get(comm.size, []):
        if hosts is None or tensor > 2:  # in messages
            run = train_small(comm, data, pipe, 40, tensor=tensor, keep_weights=AT, hosts=hosts, **options)
            assert_equal_runs(run, reference, 1e-5)


@pytest.mark.mpi(min_size=4, max_size=4)
@pytest.mark.parametrize("algorithm", ["ring", "native"])  # of which a ring runs beside the backward pass
def test_what_ranks_share_is_summed_by_them_before_their_replicas_do(comm, algorithm):
    reference = one_rank(10)
    run = train_small(comm, 2, 1, 10, tensor=2, algorithm=algorithm, keep_weights=AT)
    assert_equal_runs(run, reference, 1e-5)


@pytest.mark.mpi(min_size=4, max_size=4)
@pytest.mark.parametrize("recompute", ["none", "attention", "block"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ranks_that_share_layers_give_the_same_numbers_by_any_schedule(comm, schedule, recompute):
    reference = one_rank(10)
    run = train_small(comm, 1, 2, 10, tensor=2, keep_weights=AT, schedule=schedule, recompute=recompute)
    assert_equal_runs(run, reference, 1e-5)


@pytest.mark.mpi(min_size=2, max_size=4)  # eight ranks say no more of a schedule, and take minutes on few cores
@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if name != "1f1b"])
def test_any_schedule_gives_the_same_numbers(comm, schedule):
    card = small_card().model_copy(update={"num_hidden_layers": 7})  # for four stages of two chunks each
    reference = one_rank(10, card=card)
    for data, pipe in meshes_of(comm):
        if pipe > 1 or schedule == "zb-v":
            run = train_small(comm, data, pipe, 10, keep_weights=AT, schedule=schedule, card=card)
            assert_equal_runs(run, reference, 1e-5)


@pytest.mark.mpi(min_size=2, max_size=4)
@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zb-h1", "zb-v"])
@pytest.mark.parametrize("recompute", ["attention", "block"])
def test_what_is_computed_again_changes_no_bit(comm, recompute, schedule):
    card = small_card().model_copy(update={"num_hidden_layers": 7})
    for data, pipe in meshes_of(comm):
        ways = [{"recompute": how, "schedule": schedule, "card": card} for how in ("none", recompute)]
        kept, again = (train_small(comm, data, pipe, 5, **way) for way in ways)
        assert (again.losses, again.grad_norms) == (kept.losses, kept.grad_norms)


@pytest.mark.mpi(min_size=2, max_size=4)
def test_a_stage_of_the_head_alone_gives_the_same_numbers(comm):
    layers = {2: (4, 0), 3: (2, 2, 0), 4: (0, 3, 1, 0)}[comm.size]
    run = train_small(comm, 1, comm.size, 10, keep_weights=AT[:2], layers=layers)
    reference = one_rank(10)
    assert run.losses == pytest.approx(reference.losses, rel=1e-5)
    assert relative(run, reference, 10) < 1e-5


def test_replicas_are_bit_equal(comm):
    for data, pipe in meshes_of(comm):
        run = train_small(comm, data, pipe, 5, keep_weights=(5,), precision="bf16" if pipe > 1 else "fp32")
        bits = {name: hashlib.sha256(v.numpy().tobytes()).hexdigest() for name, v in run.weights[5].items()}
        seen: dict[str, set[str]] = {}
        for hashes in collect(comm, bits):
            for name, value in hashes.items():
                seen.setdefault(name, set()).add(value)
        assert all(len(values) == 1 for values in seen.values())


@pytest.mark.parametrize("algorithm, hosts", [("ring", None), ("native", None), *(("auto", name) for name in HOSTS)])
def test_every_way_to_sum_gives_the_numbers_of_one_rank(comm, algorithm, hosts):
    reference = one_rank(10)
    run = train_small(comm, comm.size, 1, 10, algorithm=algorithm, hosts=hosts, keep_weights=AT)
    assert run.losses == pytest.approx(reference.losses, rel=1e-5)
    assert run.grad_norms == pytest.approx(reference.grad_norms, rel=1e-5)
    assert relative(run, reference, 10) < 1e-5


@pytest.mark.mpi(min_size=3)  # so that "hosts of two" are more than one
@pytest.mark.parametrize("algorithm, hosts", [("ring", None), *(("auto", name) for name in HOSTS)])
def test_a_bf16_wire_moves_the_numbers_by_no_more_than_its_roundings(comm, algorithm, hosts):
    reference = one_rank(10)
    options = {"algorithm": algorithm, "hosts": hosts, "wire_dtype": torch.bfloat16}
    run = train_small(comm, comm.size, 1, 10, keep_weights=AT, **options)
    # A partial sum is off by a factor of at most 1 + eps / 2 at each hop.
    rounding = (1 + torch.finfo(torch.bfloat16).eps / 2) ** (comm.size - 1) - 1
    assert run.losses[0] == pytest.approx(reference.losses[0], rel=1e-5), "nothing was summed yet"
    assert run.grad_norms[0] == pytest.approx(reference.grad_norms[0], rel=rounding)
    assert run.losses == pytest.approx(reference.losses, rel=rounding)
    assert 0 < relative(run, reference, 10) < rounding


@pytest.mark.mpi(min_size=4, max_size=4)  # the fewest with two hosts of two
@pytest.mark.parametrize(
    "algorithm, hosts, wire_dtype",
    [("ring", None, torch.bfloat16), ("native", None, None), ("auto", None, None), ("auto", "hosts of two", None)],
)
def test_replicas_are_still_bit_equal_after_200_steps(comm, algorithm, hosts, wire_dtype):
    card = small_card(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    options = {"card": card, "batch_size": 4, "micro_batches": 4, "keep_weights": (200,)}
    run = train_small(comm, comm.size, 1, 200, algorithm=algorithm, hosts=hosts, wire_dtype=wire_dtype, **options)
    assert run.losses[-1] < run.losses[0] / 2, "weights that stay as they are stay equal"
    bits = hashlib.sha256(b"".join(values.numpy().tobytes() for values in run.weights[200].values())).hexdigest()
    assert len(set(collect(comm, bits))) == 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_reproducible_sums_have_the_same_bits_on_any_mesh_of_powers_of_two(comm, precision):
    options = {"reproducible": True, "precision": precision}
    reference = one_rank(10, **options)
    for data, pipe in [*meshes_of(comm), (comm.size, 1)]:
        if comm.size != 3:
            run = train_small(comm, data, pipe, 10, keep_weights=AT, **options)
            assert run.grad_norms == reference.grad_norms
            for name, values in run.weights[10].items():
                assert torch.equal(values, reference.weights[10][name]), f"{name} on {data} x {pipe}"


def test_fewer_micro_batches_than_replicas_leave_some_without_work(comm):
    reference = one_rank(10, micro_batches=1, batch_size=5)
    run = train_small(comm, comm.size, 1, 10, micro_batches=1, batch_size=5)
    assert run.losses == pytest.approx(reference.losses, rel=1e-5)
    assert run.grad_norms == pytest.approx(reference.grad_norms, rel=1e-5)


def test_micro_batches_do_not_change_the_loss_without_dropout(comm):
    card = small_card(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    losses = [train_small(comm, comm.size, 1, 10, card=card, micro_batches=count).losses for count in (1, 3, 14)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)


def test_a_nan_on_one_rank_is_skipped_by_all_together(comm):
    def spoil(step, mesh, stage):
        if step == 2 and mesh.world.rank == comm.size - 1:
            hooks.append(next(iter(stage.parameters())).register_hook(lambda grad: grad * math.nan))
        elif hooks:
            hooks.pop().remove()

    for data, pipe in meshes_of(comm):
        hooks: list = []
        run = train_small(comm, data, pipe, 5, spoil=spoil, keep_weights=(2, 3, 5))
        assert run.updated == [True, True, False, True, True]
        assert all(torch.equal(run.weights[2][name], values) for name, values in run.weights[3].items())
        assert all(values.isfinite().all() for values in run.weights[5].values())


def test_fp16_halves_its_loss_scale_on_all_ranks_until_gradients_are_finite(comm):
    run = train_small(comm, comm.size, 1, 12, precision="fp16")
    assert run.updated[-1]
    assert share(comm, run.losses) == run.losses
    assert run.losses[-1] < run.losses[0]
