"""An op on x of any leading dimensions, wherever its rows lie, gives what it gives on these rows: launchers read a
contiguous x as it is, and make a result in its shape."""

import pytest
import torch

from fastpeft.dispatch import Plan, backend, override_plan
from fastpeft.kernels._common import as_matrix
from fastpeft.ops._lora_linear_triton import for_launches
from fastpeft.ops.lora_linear import Projection, apply_lora
from fastpeft.ops.lora_mlp import apply_lora_mlp
from fastpeft.ops.lora_projections import apply_lora_projections
from tests.ops.lora_linear_cases import STRATEGIES

pytestmark = [pytest.mark.usefixtures("poison"), pytest.mark.interpreter]
K, N, R = 20, 24, 4
WAYS = {  # of x (2, 6, K): how it lies
    "rows": lambda x: x.flatten(0, -2),
    "batch": lambda x: x,
    "four dimensions": lambda x: x.unflatten(0, (2, 1)),
    "one row of each": lambda x: x[:, :1],
    "one of the batch": lambda x: x[:1].transpose(0, 1),
    "turned": lambda x: x.transpose(0, 1),
    "every second": lambda x: x[:, ::2],
    "a part of the columns": lambda x: torch.cat((x, x), -1)[..., 7 : 7 + x.shape[-1]],
    "spread": lambda x: x[:, :1].expand(-1, 4, -1),
    "one": lambda x: x[0, 0],
    "every second of one": lambda x: torch.stack((x, x), -1)[0, 0, :, 0],
}
EVERY_WAY = pytest.mark.parametrize("way", WAYS)


def projection(inputs: int, outputs: int, bias: bool) -> Projection:
    weight, bias = torch.randn(outputs, inputs) / inputs**0.5, torch.randn(outputs) if bias else None
    return Projection(weight, bias, torch.randn(R, inputs), torch.randn(outputs, R), 0.5)


def alone(x, each):
    return [apply_lora(x, each[0].weight, each[0].bias, None, *each[0][2:])]


def onto_a_product(x, each):
    weight, bias, *adapter = each[0]
    return [apply_lora(x, None, None, torch.nn.functional.linear(x.detach(), weight, bias), *adapter)]


def based(x, each):
    bases = [torch.nn.functional.linear(x.detach(), one.weight, one.bias) for one in each]
    given = [one._replace(weight=base, bias=None) for one, base in zip(each, bases, strict=True)]
    return apply_lora_projections(x, given, None, True)


def mlp(x, each):
    return [apply_lora_mlp(x, *each, "silu")]


OPS = {  # what computes (..., N) of x, and its layers' inputs and outputs
    "lora_linear": (alone, [(K, N)]),
    "onto a product": (onto_a_product, [(K, N)]),
    "lora_projections": (apply_lora_projections, [(K, N)] * 3),
    "onto products": (based, [(K, N)] * 2),
    "lora_mlp": (mlp, [(K, 28), (K, 28), (28, N)]),
}


@EVERY_WAY
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("op", "bias"), [("lora_linear", False), *((op, True) for op in OPS)])
def test_a_result_is_as_of_the_rows(op, bias, strategy, way):
    torch.manual_seed(1)
    compute, sizes = OPS[op]
    layers = [projection(*size, bias) for size in sizes]
    x, dy = WAYS[way](torch.randn(2, 6, K)), WAYS[way](torch.randn(2, 6, N))
    found = []
    with backend("triton"), override_plan(Plan(strategy, strategy, "a test's")):
        for z, dz in ((x, dy), (x.reshape(-1, K), dy.reshape(-1, N))):
            z = z.detach().requires_grad_()
            given = [
                one._replace(lora_A=one.lora_A.requires_grad_(), lora_B=one.lora_B.requires_grad_()) for one in layers
            ]
            ys = compute(z, given)
            assert all(y.shape == (*z.shape[:-1], N) and not y._is_view() for y in ys)
            wanted = [matrix for one in given for matrix in (one.lora_A, one.lora_B)]
            dx, *grads = torch.autograd.grad(ys, [z, *wanted], [dz] * len(ys))
            assert dx.shape == z.shape
            found.append([*(y.flatten() for y in ys), dx.flatten(), *grads])
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected)


@EVERY_WAY
def test_a_launcher_reads_x_where_it_lies(way):
    x = WAYS[way](torch.arange(2.0 * 6 * K).view(2, 6, K))
    given = for_launches(x)
    assert (given is x) is (x.is_contiguous() or x.ndim == 2)
    rows, columns, *steps = as_matrix(given)
    assert torch.equal(given.as_strided((rows, columns), steps, given.storage_offset()), x.reshape(-1, K))
