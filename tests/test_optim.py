"""AdamW on shards is torch's AdamW on whole parameters; the learning rate rises and falls; fp16 finds its scale."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import own

from mpitrain.comm.buckets import fill_buckets
from mpitrain.comm.buffers import Transport
from mpitrain.comm.choice import choose_exchange
from mpitrain.comm.reducer import GradientReducer
from mpitrain.optim import LossScale, ShardedAdamW, decays, learning_rate_at
from mpitrain.runtime.agree import total
from mpitrain.sections import Train

OPTIONS = Train(weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6, max_grad_norm=0.1)


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.ModuleDict({"dense": torch.nn.Linear(7, 5), "LayerNorm": torch.nn.LayerNorm(5)})
        self.out = torch.nn.Linear(5, 1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.out(self.layer["LayerNorm"](self.layer["dense"](inputs))).square().sum()


def inputs_of(step: int, rank: int) -> torch.Tensor:
    return torch.randn(3, 7, generator=torch.Generator().manual_seed(100 * step + rank))


def by_torch(size: int, num_steps: int) -> dict[str, torch.Tensor]:
    """Whole parameters, the batch of all ranks at once, torch's own clipping."""
    net = Net()
    named = dict(net.named_parameters())
    groups = [
        {"params": [p for name, p in named.items() if "weight" in name and "Norm" not in name], "weight_decay": 0.1},
        {"params": [p for name, p in named.items() if "bias" in name or "Norm" in name], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-6)
    for step in range(num_steps):
        adamw.zero_grad()
        sum(net(inputs_of(step, rank)) for rank in range(size)).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        for group in adamw.param_groups:
            group["lr"] = 0.01 * (step + 1)
        adamw.step()
    return {name: parameter.detach() for name, parameter in named.items()}


@pytest.mark.mpi(min_size=1, max_size=3)  # importing torch's optimizers takes every rank seconds
@pytest.mark.parametrize("bucket_bytes, algorithm", [(1, "ring"), (10**6, "ring"), (1, "node"), (10**6, "node")])
def test_any_number_of_owners_makes_the_steps_of_torchs_adamw(comm, bucket_bytes, algorithm):
    net = Net()
    buckets = fill_buckets(net, bucket_bytes)
    exchange, _ = choose_exchange(comm, comm, Transport(), buckets, torch.float32, algorithm=algorithm)
    exchange.spread()
    optimizer = ShardedAdamW(buckets, OPTIONS)
    reducer = GradientReducer(exchange)
    for step in range(6):
        reducer.start_step(1)
        net(inputs_of(step, comm.rank)).backward()
        reducer.finish()
        norm = float(total(comm, torch.tensor([optimizer.squared_norm()]).double().numpy())[0]) ** 0.5
        assert norm > 0.1, "clipping must be active"
        optimizer.step(0.01 * (step + 1), 0.1 / norm)
        exchange.spread()
    reducer.close()
    for name, expected in by_torch(comm.size, 6).items():
        torch.testing.assert_close(net.get_parameter(name).detach(), expected, rtol=1e-5, atol=1e-6)
    exchange.close()


def test_masters_keep_what_bf16_weights_would_lose():
    net = Net()
    before = net.layer["dense"].weight.detach().clone()
    buckets = own(fill_buckets(net, 10**6), 0, 1, torch.bfloat16)
    optimizer = ShardedAdamW(buckets, Train(weight_decay=0.0))
    master = next(piece for piece in optimizer.slices() if (piece.kind, piece.name) == ("weight", "layer.dense.weight"))
    for _ in range(400):
        buckets[0].gradients.fill_(1.0)
        optimizer.step(1e-5, 1.0)
    moved = before - master.values.view(5, 7)
    torch.testing.assert_close(moved, torch.full_like(moved, 400e-5), rtol=1e-2, atol=0)
    assert master.values.dtype == torch.float32
    assert torch.equal(net.layer["dense"].weight, master.values.view(5, 7).bfloat16())


def test_slices_cover_every_element_of_every_tensor_once():
    owned: dict[tuple[str, str], list[int]] = {}
    for index in range(3):
        net = Net()
        for piece in ShardedAdamW(own(fill_buckets(net, 100), index, 3), OPTIONS).slices():
            assert piece.values.numel() == piece.stop - piece.start
            owned.setdefault((piece.kind, piece.name), []).extend(range(piece.start, piece.stop))
    assert {kind for kind, _ in owned} == {"weight", "exp_avg", "exp_avg_sq"}
    assert all(
        sorted(owned[kind, name]) == list(range(parameter.numel()))
        for kind in ("weight", "exp_avg", "exp_avg_sq")
        for name, parameter in Net().named_parameters()
    )


def test_the_step_count_of_a_checkpoint_decides_the_bias_correction():
    nets = [Net(), Net()]
    for net, num_updates in zip(nets, (0, 10_000), strict=True):
        buckets = own(fill_buckets(net, 10**6), 0, 1)
        optimizer = ShardedAdamW(buckets, OPTIONS)
        optimizer.set_num_updates(num_updates)
        buckets[0].gradients.fill_(1.0)
        optimizer.step(0.01, 1.0)
    moved = [float((Net().out.bias - net.out.bias).detach()) for net in nets]
    # Without bias correction the first step is smaller by (1 - beta1) / sqrt(1 - beta2).
    assert moved == pytest.approx([0.01, 0.01 * 0.2 / 0.05**0.5], rel=1e-2)


@pytest.mark.parametrize("name", ["a.bias", "bert.embeddings.LayerNorm.weight", "x.LayerNorm.bias"])
def test_biases_and_layer_norms_do_not_decay(name):
    assert not decays(name)
    assert decays("bert.embeddings.word_embeddings.weight")


def test_the_learning_rate_rises_linearly_then_falls_linearly_to_zero():
    rates = [learning_rate_at(step, 10, 1.0, 0.2) for step in range(11)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0.0])


@given(st.integers(1, 500), st.floats(0, 1), st.integers(0, 600))
def test_the_learning_rate_is_between_zero_and_its_peak(num_steps, warmup_ratio, step):
    rate = learning_rate_at(step, num_steps, 0.003, warmup_ratio)
    assert 0 <= rate <= 0.003
    assert rate > 0 or step >= num_steps


def test_the_loss_scale_halves_after_an_overflow_and_doubles_after_2000_good_steps():
    scale = LossScale("fp16")
    scale.update(False)
    assert scale.value == 2.0**15
    for _ in range(1999):
        scale.update(True)
    assert scale.value == 2.0**15
    scale.update(True)
    assert scale.value == 2.0**16
    for _ in range(40):
        scale.update(False)
    assert scale.value == 1.0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_other_dtypes_have_no_loss_scale(precision):
    scale = LossScale(precision)
    scale.update(False)
    scale.update(True)
    assert scale.value == 1.0
