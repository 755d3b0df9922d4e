"""A derivative of a gradient that an op has computed raises, in whatever way it is asked for; firsts are as ever."""

import pytest
import torch

from fastpeft import ops
from fastpeft.errors import OpError
from fastpeft.ops.lora_mlp import Projection
from fastpeft.quantised import FrozenProduct


def leaf(*shape):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).requires_grad_()


def lora():
    x, a, b = leaf(5, 6), leaf(2, 6), leaf(4, 2)
    return ops.lora_linear(x, leaf(4, 6).detach(), None, a, b, 0.5), x, [a, b]


def mixed():
    x, a, b = leaf(2, 3, 6), leaf(2, 6), leaf(4, 2)
    return ops.mixed_lora_linear(x, leaf(4, 6).detach(), None, [a], [b], [0.5], [0, -1]), x, [a, b]


def projections():
    x, a, b = leaf(5, 6), leaf(2, 6), leaf(4, 2)
    weight = leaf(4, 6).detach()
    return torch.cat(ops.lora_projections(x, [weight, weight], None, [a, a], [b, b], [0.5, 1.0]), -1), x, [a, b]


def mlp():
    x, a, b, c, d = leaf(5, 6), leaf(2, 6), leaf(4, 2), leaf(2, 4), leaf(6, 2)
    projections = Projection(leaf(4, 6).detach(), None, a, b), Projection(leaf(4, 6).detach())
    return ops.lora_mlp(x, *projections, Projection(leaf(6, 4).detach(), None, c, d)), x, [a, b, c, d]


def prefix():
    q, k, v, pk, pv = leaf(1, 2, 4, 8), leaf(1, 2, 4, 8), leaf(1, 2, 4, 8), leaf(2, 3, 8), leaf(2, 3, 8)
    return ops.prefix_attention(q, k, v, pk, pv), q, [pk, pv]


def gated():
    q, k, v, pk, pv = leaf(1, 2, 4, 8), leaf(1, 2, 4, 8), leaf(1, 2, 4, 8), leaf(2, 3, 8), leaf(2, 3, 8)
    gate = leaf(1)
    return ops.gated_prompt_attention(q, k, v, pk, pv, gate), q, [pk, pv, gate]


def quantised():
    x, weight = leaf(5, 6), leaf(4, 6).detach()
    scale = leaf(5, 1)
    out = FrozenProduct.apply(x * scale, None, lambda: weight, lambda x: x @ weight.t())
    return out.pow(2), x, [scale]


CASES = [lora, mixed, projections, mlp, prefix, gated, quantised]


@pytest.mark.parametrize("case", CASES, ids=lambda each: each.__name__)
def test_a_second_derivative_raises(case):
    out, x, parameters = case()
    (first,) = torch.autograd.grad(out.pow(2).sum(), x, create_graph=True)
    with pytest.raises(OpError, match="first derivatives only"):
        torch.autograd.grad(first.pow(2).sum(), parameters, allow_unused=True)
    out, x, parameters = case()
    (first,) = torch.autograd.grad(out.pow(2).sum(), x, create_graph=True)
    with pytest.raises(OpError, match="first derivatives only"):
        first.pow(2).sum().backward()


@pytest.mark.parametrize("case", CASES, ids=lambda each: each.__name__)
def test_a_graph_of_the_first_changes_nothing(case):
    found = []
    for create in (False, True):
        out, x, parameters = case()
        found.append(torch.autograd.grad(out.pow(2).sum(), [x, *parameters], create_graph=create))
    for with_graph, without in zip(*reversed(found), strict=True):
        assert torch.equal(with_graph, without) and not without.requires_grad


@pytest.mark.parametrize("reentrant", [False, True])
def test_in_a_checkpointed_segment(reentrant):
    from torch.utils.checkpoint import checkpoint

    x, a, b, weight = leaf(5, 6), leaf(2, 6), leaf(4, 2), leaf(4, 6).detach()

    def segment(x):
        return ops.lora_linear(x, weight, None, a, b, 0.5)

    out = checkpoint(segment, x, use_reentrant=reentrant)
    out.pow(2).sum().backward(create_graph=not reentrant)
    expected = torch.autograd.grad(segment(x).pow(2).sum(), [x, a, b])
    for tensor, each in zip((x, a, b), expected, strict=True):
        torch.testing.assert_close(tensor.grad, each)
