"""An op's Function while gradients are off: its forward alone, with the same bits and the same draws."""

import pytest
import torch
from torch.autograd import forward_ad

from fastpeft.dispatch import backend
from fastpeft.ops import _first_order, lora_linear, lora_projections
from fastpeft.ops._first_order import applied

M, K, N, R = 21, 24, 19, 4


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.save_for_backward(x)
        ctx.set_materialize_grads(False)
        return 2 * factor * x

    @staticmethod
    def backward(ctx, dy):
        return 2 * dy, None


def one(x, weight, a, b):
    return lora_linear(x, weight, None, a, b, 2.0, dropout=0.3, training=True)


def three(x, weight, a, b):
    ys = lora_projections(x, [weight] * 3, None, [a] * 3, [b] * 3, [2.0] * 3, dropouts=[0.3] * 3, training=True)
    return torch.stack(ys)


@pytest.mark.parametrize("op", [one, three])
@pytest.mark.parametrize("path", ["torch", pytest.param("triton", marks=pytest.mark.interpreter)])
def test_an_op_gives_the_same_and_does_without_autograd(op, path, monkeypatch):
    tensors = [torch.randn(shape, requires_grad=shape != (N, K)) for shape in ((M, K), (N, K), (R, K), (N, R))]
    with backend(path):
        torch.manual_seed(7)
        expected, after = op(*tensors), torch.rand(1)
        monkeypatch.setattr(_first_order, "_apply_of", None)
        monkeypatch.setattr(torch.autograd.Function, "apply", None)
        torch.manual_seed(7)
        with torch.no_grad():
            found = op(*tensors)
        assert torch.equal(found, expected) and torch.equal(torch.rand(1), after)
    assert expected.requires_grad and not found.requires_grad and not found._is_view()


def test_gradients_are_had_where_they_are_on():
    x = torch.randn(3, requires_grad=True)
    y = applied(Doubled, x, 1.0)
    assert torch.equal(torch.autograd.grad(y, x, torch.ones(3))[0], torch.full((3,), 2.0))
    with torch.inference_mode():
        assert torch.equal(applied(Doubled, x, 1.0), 2 * x)


@pytest.mark.parametrize("op", [one, three])
def test_what_a_transform_has_left_behind_has_its_gradient(op):
    left = []

    def total(x):
        left.append(2 * x)
        return x.square().sum()

    x, weight, a, b = (torch.randn(shape, requires_grad=shape != (N, K)) for shape in ((M, K), (N, K), (R, K), (N, R)))
    torch.func.grad(total)(x)
    (given,) = left
    assert torch._C._functorch.is_functorch_wrapped_tensor(given)
    found = []
    for each in (given, 2 * x):
        torch.manual_seed(7)
        found.append(torch.autograd.grad(op(each, weight, a, b).sum(), [x, a, b]))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("path", ["torch", pytest.param("triton", marks=pytest.mark.interpreter)])
def test_a_tangent_is_refused_as_with_gradients(path):
    x, weight, a, b = (torch.randn(shape) for shape in ((M, K), (N, K), (R, K), (N, R)))
    with torch.no_grad(), forward_ad.dual_level(), backend(path), pytest.raises(NotImplementedError, match="jvp"):
        one(forward_ad.make_dual(x, torch.ones_like(x)), weight, a, b)


def test_a_transform_of_torch_s_is_told_what_it_was_told():
    with torch.no_grad(), pytest.raises(RuntimeError, match="setup_context"):
        torch.vmap(lambda x: applied(Doubled, x, 1.0))(torch.randn(2, 3))
