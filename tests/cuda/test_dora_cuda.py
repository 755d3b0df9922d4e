"""The compiled kernels of `row_norms` and `dora_linear` on a GPU, at larger, odd sizes and in bf16."""

import pytest
import torch

from fastpeft.kernels._common import Dropout
from fastpeft.ops import _dora_linear_triton
from fastpeft.ops.dora_linear import apply_dora, dora_linear_reference
from fastpeft.ops.lora_linear import _path, dropout_mask
from fastpeft.ops.row_norms import row_norms, row_norms_reference
from fastpeft.oracle import Bounds, compare
from tests.ops.lora_linear_cases import on

pytestmark = pytest.mark.cuda

DEVICE, SCALE = "cuda", 0.7
DTYPES = {  # data, adapter
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16-fp32": (torch.bfloat16, torch.float32),
    "fp16-fp32": (torch.float16, torch.float32),
    "fp32": (torch.float32, torch.float32),
}
NAMES = ("x", "bias", "lora_A", "lora_B", "factor")
M, N, K = 993, 997, 1031


def problem(dtypes, rank, seed=0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    data, adapter = DTYPES[dtypes]

    def normal(*size, scale=1.0, dtype=data):
        return (torch.randn(*size, generator=generator) * scale).to(DEVICE, dtype)

    given = {
        "x": normal(M, K),
        "weight": normal(N, K, scale=K**-0.5),
        "bias": normal(N),
        "lora_A": normal(rank, K, scale=K**-0.5, dtype=adapter),
        "lora_B": normal(N, rank, scale=rank**-0.5, dtype=adapter),
        "factor": 1 + normal(N, scale=0.3, dtype=torch.float32),
        "dy": normal(M, N),
    }
    return {name: each.requires_grad_(name in NAMES) for name, each in given.items()}


@pytest.mark.parametrize("left", [1.0, 1e-2])
@pytest.mark.parametrize("rank", [5, 16, 64, 300])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_norms_are_as_exact_as_by_blocks_of_rows(dtypes, rank, left):
    given = problem(dtypes, rank)
    a, b = given["lora_A"].detach(), given["lora_B"].detach()
    weight = (left * torch.randn(N, K, device=DEVICE).double() - SCALE * b.double() @ a.double()).to(DTYPES[dtypes][0])
    exact = row_norms_reference(weight.double(), a.double(), b.double(), SCALE)
    errors = {}
    for name in ("torch", "triton"):
        with on(name):
            errors[name] = ((row_norms(weight, a, b, SCALE).double() - exact) / exact).square().mean().sqrt()
    assert errors["triton"] <= 1.1 * errors["torch"] + 1e-8, errors


def outcome(given: dict, function) -> dict[str, torch.Tensor]:
    y = function(*(given[name] for name in ("x", "weight", *NAMES[1:])))
    gradients = torch.autograd.grad(y, [given[name] for name in NAMES], given["dy"].to(y.dtype))
    return {"y": y.detach(), **dict(zip(NAMES, gradients, strict=True))}


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("rank", [16, 65])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_as_right_as_the_definition(dtypes, rank, p):
    given = problem(dtypes, rank)
    keep, honoured = None, 0.0
    if p:
        torch.manual_seed(2)
        keep = dropout_mask(_path(True).draw_seed(given["x"]), p, M, K, DEVICE, "triton")
        honoured = _path(True).honoured(p)
    torch.manual_seed(2)
    with on("triton"):
        found = outcome(given, lambda *tensors: apply_dora(*tensors, SCALE, p))
    doubled = {name: each.detach().double().requires_grad_(name in NAMES) for name, each in given.items()}

    def definition(*tensors):
        return dora_linear_reference(*tensors, SCALE, keep, honoured)

    eager, exact = outcome(given, definition), outcome(doubled, definition)
    bounds = Bounds(rms=16, peak=16, row=32) if dtypes == "fp16-fp32" else Bounds()  # tf32 products of two parts
    for name, each in found.items():
        difference = compare(name, [each], [eager[name]], [exact[name]])
        assert not difference.faults(bounds), difference


def test_the_same_twice():
    given = problem("bf16-fp32", 16)
    runs = []
    for _ in range(2):
        torch.manual_seed(2)
        with on("triton"):
            runs.append(outcome(given, lambda *tensors: apply_dora(*tensors, SCALE, 0.3)))
    assert all(torch.equal(each, runs[1][name]) for name, each in runs[0].items())


def test_the_mask_is_that_of_lora_linear():
    x, seed = torch.ones(513, 777, device=DEVICE), torch.tensor([11], device=DEVICE)
    keep = dropout_mask(seed, 0.3, 513, 777, DEVICE, "triton")
    dropped = _dora_linear_triton.kernels.drop(x, Dropout(seed, 0.3))
    assert torch.equal(dropped > 0, keep)
