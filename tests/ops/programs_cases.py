"""What the tests of programs share: calls that stay alike."""

import torch
from torch import nn

from fastpeft.ops.dora_linear import apply_dora
from fastpeft.ops.lora_linear import Projection, apply_lora
from fastpeft.ops.lora_mlp import apply_lora_mlp
from fastpeft.ops.lora_projections import apply_lora_projections
from tests.op_calls import OPS, leaf

K, N, R = 20, 24, 4


def of_dora(x, weight, bias, a, b, factor, dropout=0.0):
    return apply_dora(x, weight, bias, a, b, factor, 2.0, dropout)


def dora():
    return leaf(3, 5, 16), torch.randn(24, 16), leaf(24), leaf(4, 16), leaf(24, 4), leaf(24)


# As `OPS`: name -> (the op, its tensors, its options, the plan that is forced).
WITH_PROGRAMS = {name: each for name, each in OPS.items() if name.partition("-")[0] in ("lora", "projections", "mlp")}
WITH_PROGRAMS |= {"dora": (of_dora, dora, {}, None), "dora-dropout": (of_dora, dora, {"dropout": 0.5}, None)}
REFUSED = ("lora-persistent",)  # whose descriptors hang on addresses
DTYPES = {"half": (torch.float16, torch.float16), "wide": (torch.float16, torch.float32), "fp32": (torch.float32,) * 2}


def differentiated(compute, tensors) -> list[torch.Tensor]:
    """The results under one seed, and the gradients of all tensors that want one."""
    torch.manual_seed(3)
    out = compute(*tensors)
    wanted = [each for each in tensors if isinstance(each, torch.Tensor) and each.requires_grad]
    dy = torch.arange(out.numel(), device=out.device).sin().view(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, wanted, dy)]


def same(found, expected):
    return all(torch.equal(each, other) for each, other in zip(found, expected, strict=True))


def projection(inputs: int, outputs: int, bias: bool, dtypes, scaling=0.5, dropout=0.0) -> Projection:
    dtype, adapter = dtypes
    bias = torch.randn(outputs, dtype=dtype, requires_grad=True) if bias else None
    matrices = [torch.randn(shape, dtype=adapter, requires_grad=True) for shape in ((R, inputs), (outputs, R))]
    return Projection(torch.randn(outputs, inputs, dtype=dtype) / inputs**0.5, bias, *matrices, scaling, dropout)


def layer_call(**changes):
    """(a function of nothing, what it is of): `apply_lora` on tensors that stay."""
    torch.manual_seed(5)
    given = {
        "x": torch.randn(3, 8, K, requires_grad=True),
        "weight": torch.randn(N, K),
        "bias": torch.randn(N),
        "residual": None,
        "lora_A": nn.Parameter(torch.randn(R, K)),
        "lora_B": nn.Parameter(torch.randn(N, R)),
        "scaling": 0.5,
        "dropout": 0.0,
        "patched_backend": None,
        **changes,
    }

    def call():
        torch.manual_seed(6)
        y = apply_lora(*given.values())
        if not y.requires_grad:
            return [y]
        wanted = [each for each in given.values() if isinstance(each, torch.Tensor) and each.requires_grad]
        return [y.detach(), *torch.autograd.grad(y.float().square().sum(), wanted)]

    return call, given


WAYS = {
    "rows": lambda x: x.flatten(0, -2),
    "batch": lambda x: x,
    "turned": lambda x: x.transpose(0, 1),
    "a part": lambda x: torch.cat((x, x), -1)[..., 7 : 7 + x.shape[-1]],
    "spread": lambda x: x[:, :1].expand(-1, 4, -1),
}


def of_one(x, each):
    return apply_lora(x, each[0].weight, each[0].bias, None, *each[0][2:])


def of_three(x, each):
    return torch.cat(apply_lora_projections(x, each), -1)


def of_mlp(x, each):
    return apply_lora_mlp(x, *each, "silu")


LAYERS = {of_one: [(K, N)], of_three: [(K, N)] * 3, of_mlp: [(K, 28), (K, 28), (28, N)]}
