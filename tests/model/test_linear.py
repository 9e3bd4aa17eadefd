"""Whichever library makes the products, values and gradients are those of torch's own linear layer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from mpitrain.model import linear as module


@pytest.fixture(autouse=True)
def _library_of_others():
    before = module.in_use()
    yield
    module.use(before)


@pytest.mark.parametrize("library", module.LIBRARIES)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 8, 3), (71, 64, 256), (5, 33, 7), (0, 8, 4)])
def test_values_and_gradients_are_those_of_torch(library, rows, inputs, outputs):
    if library == "onednn" and not module.has_onednn():
        pytest.skip("reason: this torch was built without oneDNN")
    module.use(library)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_weights_that_are_put_off_are_the_same_and_come_when_they_are_called(dtype):
    torch.manual_seed(0)
    x, *parameters = (
        torch.randn(shape, dtype=dtype).requires_grad_() for shape in ((5, 8), (3, 8), (4, 8), (3,), (4,))
    )
    module.stacked_linear(x, parameters[:2], parameters[2:]).square().sum().backward()
    expected = [each.grad for each in (x, *parameters)]
    for each in (x, *parameters):
        each.grad = None
    work: list = []
    with module.postponed(work):
        module.stacked_linear(x, parameters[:2], parameters[2:]).square().sum().backward()
    assert torch.equal(x.grad, expected[0])
    assert [each.grad for each in parameters] == [None] * 4
    arrived = []
    parameters[0].register_post_accumulate_grad_hook(lambda parameter: arrived.append(parameter.grad))
    for each in work:
        each()
    assert all(torch.equal(each.grad, wanted) for each, wanted in zip(parameters, expected[1:], strict=True))
    assert len(arrived) == 1, "as from a backward pass"


@pytest.mark.parametrize("library", module.LIBRARIES)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
def test_gelu_in_the_product_is_gelu_after_it(monkeypatch, library, approximate, dtype, tolerance):
    if not module.has_onednn():
        pytest.skip("reason: this torch was built without oneDNN")
    module.use(library)
    fused, kernel = [], module._by_onednn
    monkeypatch.setattr(module, "_by_onednn", lambda *arguments: fused.extend(arguments[3:]) or kernel(*arguments))
    torch.manual_seed(0)
    parameters = [torch.randn(shape).to(dtype) for shape in ((71, 64), (256, 64), (256,))]
    expected = F.gelu(F.linear(*(each.double() for each in parameters)), approximate=approximate)
    with torch.no_grad():
        torch.testing.assert_close(
            module.linear_gelu(*parameters, approximate).double(), expected, rtol=tolerance, atol=tolerance
        )
    wanted = ["gelu", approximate] if library == "onednn" or dtype == torch.bfloat16 else []
    assert fused == wanted
    parameters[0].requires_grad_()
    found = module.linear_gelu(*parameters, approximate)
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    assert found.requires_grad and fused == wanted


def test_libraries_are_timed_and_left_as_they_were():
    module.use("onednn")
    assert all(0 < seconds < 10 for seconds in module.time_libraries().values())
    assert module.in_use() == "onednn"
    assert module.suits_maker() in module.LIBRARIES


def test_bf16_and_double_stay_with_torch():
    module.use("onednn")
    for dtype in (torch.bfloat16, torch.float64):
        x, weight, bias = (torch.ones(shape, dtype=dtype) for shape in ((2, 4), (3, 4), (3,)))
        assert torch.equal(module.linear(x, weight, bias), F.linear(x, weight, bias))


@pytest.mark.parametrize("library", module.LIBRARIES)
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 9])
def test_several_layers_at_once_are_each_of_them(library, together, rows):
    if library == "onednn" and not module.has_onednn():
        pytest.skip("reason: this torch was built without oneDNN")
    module.use(library)
    torch.manual_seed(0)
    x = torch.randn(rows, 8, requires_grad=True)
    memory = torch.randn(15, 8)
    weights = [part.detach() if together else part.clone() for part in memory.split([4, 8, 3])]
    weights, biases = (
        [each.requires_grad_() for each in weights],
        [torch.randn(n, requires_grad=True) for n in (4, 8, 3)],
    )
    found = module.stacked_linear(x, weights, biases)
    expected = torch.cat([F.linear(x, *each) for each in zip(weights, biases, strict=True)], dim=1)
    torch.testing.assert_close(found, expected)
    gradient = torch.randn(rows, 15)
    inputs = [x, *weights, *biases]
    ours, theirs = (torch.autograd.grad(each, inputs, gradient) for each in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_only_what_lies_one_behind_the_other_is_not_copied():
    memory = torch.arange(40.0).view(10, 4)
    first, second, third = memory.split([2, 5, 3])
    assert module._stack([first, second, third]).data_ptr() == memory.data_ptr()
    assert torch.equal(module._stack([first, second, third]), memory)
    rows = [memory[::2][:1], memory[1:2]]  # contiguous whatever its stride is, as it is but one
    columns = [memory[:, :2], memory[5:, :2]]  # the second begins where as many elements as the first has end
    storages = [torch.from_numpy(part) for part in np.split(np.ones((4, 4), np.float32), 2)]  # adjacent, but two
    assert torch.equal(module._stack(rows), memory[:2])
    for others in ([second, first], [first, third], [first, second.clone()], columns, storages):
        assert torch.equal(module._stack(others), torch.cat(others))
        assert module._stack(others).data_ptr() != others[0].data_ptr()
