"""Whichever library makes the products, values and gradients are those of torch's own linear layer."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from mpitrain.model import linear as module


@pytest.mark.parametrize("onednn", [False, True])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 8, 3), (71, 64, 256), (5, 33, 7), (0, 8, 4)])
def test_values_and_gradients_are_those_of_torch(monkeypatch, onednn, rows, inputs, outputs):
    if onednn and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("reason: this torch was built without oneDNN")
    monkeypatch.setattr(module, "prefers_onednn", lambda: onednn)
    torch.manual_seed(0)
    ours = [torch.randn(shape).requires_grad_() for shape in ((rows, inputs), (outputs, inputs), (outputs,))]
    theirs = [tensor.detach().double().requires_grad_() for tensor in ours]
    out, expected = module.linear(*ours), F.linear(*theirs)
    weight = torch.randn(rows, outputs)
    (out * weight).sum().backward()
    (expected * weight.double()).sum().backward()
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad.double(), reference.grad, rtol=1e-5, atol=1e-4)


def test_bf16_and_double_stay_with_torch():
    for dtype in (torch.bfloat16, torch.float64):
        x, weight, bias = (torch.ones(shape, dtype=dtype) for shape in ((2, 4), (3, 4), (3,)))
        assert torch.equal(module.linear(x, weight, bias), F.linear(x, weight, bias))
