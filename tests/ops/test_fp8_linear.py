"""`fp8_linear` against an emulation of its own in float64, whose e4m3 is written out bit by bit: codes, results, every
subset of gradients, dtypes, layouts, rows without numbers; the calls that the vendor's product would get."""

import itertools
import math
import types

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from fastpeft.errors import OpError
from fastpeft.ops import fp8_linear, fp8_linear_reference
from fastpeft.oracle import Bounds, compare
from tests.host_sync import HostSync
from tests.memory import saved_for_backward

FP8 = torch.float8_e4m3fn
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = {"odd": ((5, 7), 33, 23), "even": ((16,), 32, 48), "one row": ((1,), 8, 3), "vector": ((), 33, 23)}


def e4m3(value: float) -> float:
    """The nearest number with 4 exponent bits (bias 7, none for infinities) and 3 of mantissa, ties to even."""
    if value == 0 or math.isnan(value):
        return value
    step = 2.0 ** (max(math.frexp(abs(value))[1] - 1, -6) - 3)
    nearest = round(value / step) * step  # Python's round is to even
    return nearest if abs(nearest) <= 448 else math.nan


def emulated_rows(t: torch.Tensor) -> torch.Tensor:
    """What rows in float8 with a scale each stand for, in float64."""
    t = t.float()
    scale = (t.abs().amax(-1, keepdim=True) / 448).clamp_min(2.0**-126)
    codes = (t / scale).double().flatten().tolist()
    return torch.tensor([e4m3(code) for code in codes], dtype=torch.float64).view(t.shape) * scale.double()


def made(rows, inputs, outputs, dtype=torch.float32, bias=True, seed=0):
    """(x, weight in float8, its scales, bias, dy, the weight as it was)"""
    generator = torch.Generator().manual_seed(seed)
    x, dense, bias_N, dy = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((*rows, inputs), (outputs, inputs), (outputs,), (*rows, outputs))
    )
    scale = dense.abs().amax(1, keepdim=True).float() / 448
    return x, (dense.float() / scale).to(FP8), scale, bias_N if bias else None, dy, dense


def outcome(function, x, weight, scale, bias, dy, wanted=("x", "bias")):
    leaves = {"x": x, "bias": bias}
    leaves = {n: None if t is None else t.detach().clone().requires_grad_(n in wanted) for n, t in leaves.items()}
    y = function(leaves["x"], weight, scale, leaves["bias"])
    names = [name for name in wanted if leaves[name] is not None]
    gradients = torch.autograd.grad(y, [leaves[name] for name in names], dy.to(y.dtype)) if names else ()
    return {"y": y.detach(), **{f"d{name}": each for name, each in zip(names, gradients, strict=True)}}


def emulation(x, weight, scale, bias, dy) -> dict:
    """In float64, without a line of the op's."""
    dense = weight.double() * scale.double()
    y = emulated_rows(x) @ dense.t()
    dy = dy.double()
    return {
        "y": y if bias is None else y + bias.double(),
        "dx": dy @ dense,
        "dbias": dy.reshape(-1, dy.shape[-1]).sum(0),
    }


def test_the_written_out_format_is_torch_s():
    every = torch.arange(256, dtype=torch.uint8).view(FP8).double()
    for value in every[every.isfinite()].tolist():
        assert e4m3(value) == value
    values = torch.linspace(-460, 460, 4001, dtype=torch.float64)
    values = torch.cat([values, values / 3000, torch.tensor([2.0**-10, 3 * 2.0**-10, 17.0, 19.0, 2.0**-11])])
    assert values.to(FP8).double().tolist() == [e4m3(value) for value in values.float().double().tolist()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_emulation(dtype, shape):
    """In units of the plain formula's error, in the same dtype."""
    rows, inputs, outputs = SHAPES[shape]
    draws = [made(rows, inputs, outputs, dtype, seed=seed) for seed in range(12)]
    got = [outcome(fp8_linear, *draw[:-1]) for draw in draws]
    eager = [outcome(fp8_linear_reference, *draw[:-1]) for draw in draws]
    truth = [emulation(*draw[:-1]) for draw in draws]
    for name in ("y", "dx", "dbias"):
        assert got[0][name].dtype == dtype
        three = [[each[name] for each in way] for way in (got, eager, truth)]
        if dtype == torch.float64:
            assert all(torch.allclose(g, t, rtol=1e-12, atol=1e-12) for g, _, t in zip(*three, strict=True))
        else:
            assert compare(name, *three).faults(Bounds()) == []
            error = max(float((g - t).norm() / t.norm()) for g, _, t in zip(*three, strict=True))
            assert 0 < error < 6 * torch.finfo(dtype).eps or name == "dbias"


def test_its_error_is_that_of_the_format():
    """A rounding to 4 bits has an error of 2**-4 / sqrt(3) at most and about 2.6 % over a binade; of two, once more."""
    x, weight, scale, _, dy, dense = made((64,), 256, 128)
    found, wanted = outcome(fp8_linear, x, weight, scale, None, dy), (x @ dense.t(), dy @ dense)
    errors = [float((a - b).norm() / b.norm()) for a, b in zip((found["y"], found["dx"]), wanted, strict=True)]
    assert 0.033 < errors[0] < 0.041 and 0.023 < errors[1] < 0.029


@pytest.mark.parametrize(
    "wanted", [each for n in range(3) for each in itertools.combinations(("x", "bias"), n)], ids=str
)
def test_every_subset_of_gradients(wanted):
    problem = made((5,), 33, 24)[:-1]
    whole, found = outcome(fp8_linear, *problem), outcome(fp8_linear, *problem, wanted=wanted)
    assert found.keys() == {"y", *(f"d{name}" for name in wanted)}
    assert all(torch.equal(found[name], whole[name]) for name in found)


def test_nothing_of_x_is_saved():
    x, weight, scale, bias, _, _ = made((512,), 32, 16)
    x.requires_grad_()
    with saved_for_backward() as saved:
        y = fp8_linear(x, weight, scale, bias)
    assert sum(saved.values()) == weight.nbytes + scale.nbytes < x.nbytes / 10
    y.sum().backward()
    assert x.grad.isfinite().all()


def test_layouts():
    x, weight, scale, bias, _, _ = made((6, 5), 33, 24)
    expected = fp8_linear(x, weight, scale, bias)
    for other in (x.transpose(0, 1).contiguous().transpose(0, 1), x.repeat(1, 1, 2)[..., :33], x.flip(0).flip(0)):
        assert torch.equal(fp8_linear(other, weight, scale, bias), expected)
    assert fp8_linear(x[:0], weight, scale, bias).shape == (0, 5, 24)
    empty = x[:0].clone().requires_grad_()
    fp8_linear(empty, weight, scale, bias).sum().backward()
    assert empty.grad.shape == (0, 5, 33)


def test_blocks_of_rows_are_the_rows(monkeypatch):
    from fastpeft.ops.fp8_linear import quantise_rows

    x = made((37,), 33, 24)[0]
    codes, scale = quantise_rows(x)
    monkeypatch.setitem(quantise_rows.__globals__, "BLOCK", 5 * 33)
    in_blocks, its_scale = quantise_rows(x)
    assert torch.equal(in_blocks.view(torch.uint8), codes.view(torch.uint8)) and torch.equal(its_scale, scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_are_special(dtype):
    """Zeros stay zeros, small numbers keep their precision, the greatest number is exact, NaN and infinities are NaN in
    their row alone."""
    from fastpeft.ops.fp8_linear import dequantise_rows, quantise_rows

    x = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[1], x[2, 3], x[3, 5] = 0, torch.nan, -torch.inf
    x[4] *= 2.0**-10 if dtype == torch.float16 else 2.0**-100
    x[5, 7] = torch.finfo(torch.float16).max
    codes, scale = quantise_rows(x)
    back = dequantise_rows(codes, scale, torch.float64)
    assert back[1].eq(0).all() and back[2:4].isnan().all() and back[[0, 1, 4, 5]].isfinite().all()
    for row in (0, 4):
        assert float((back[row] - x[row].double()).norm() / x[row].double().norm()) < 0.04
    assert float(back[5, 7]) == pytest.approx(float(x[5, 7]), rel=1e-6)
    weight, its_scale = quantise_rows(torch.eye(40))
    y = fp8_linear(x, weight, its_scale)
    assert y[2:4].isnan().all() and y[[0, 1, 4]].isfinite().all() and y[1].eq(0).all()


def test_under_autocast_x_is_rounded_once():
    """To 8 bits, and not to bf16 before."""
    x, weight, scale, bias, dy, _ = made((9,), 33, 24)
    truth = emulation(x, weight, scale, bias, dy)
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = fp8_linear(x, weight, scale, bias)
        assert y.dtype == torch.bfloat16
        assert fp8_linear(x.double(), weight, scale, bias.double()).dtype == torch.float64
        y.backward(dy.bfloat16())
    assert torch.allclose(y.double(), truth["y"], rtol=2**-8, atol=2**-16)
    assert x.grad.dtype == torch.float32 and float((x.grad - truth["dx"]).norm() / truth["dx"].norm()) < 2**-7


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant):
    x, weight, scale, bias, dy, _ = made((9,), 33, 24)
    expected = outcome(fp8_linear, x, weight, scale, bias, dy)
    x, bias = x.requires_grad_(), bias.requires_grad_()
    checkpoint(fp8_linear, x, weight, scale, bias, use_reentrant=reentrant).backward(dy)
    assert torch.equal(x.grad, expected["dx"]) and torch.equal(bias.grad, expected["dbias"])


def test_one_graph_for_every_length():
    torch._dynamo.reset()
    _, weight, scale, bias, _, _ = made((1,), 33, 24)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x: fp8_linear(x, weight, scale, bias), backend=counter, fullgraph=True)
    for rows in (4, 9, 17):
        found, expected = (made((rows,), 33, 24)[0].requires_grad_() for _ in range(2))
        y = compiled(found)
        assert torch.equal(y, fp8_linear(expected, weight, scale, bias))
        y.square().sum().backward()
        fp8_linear(expected, weight, scale, bias).square().sum().backward()
        assert torch.equal(found.grad, expected.grad)
    assert counter.frame_count == 2  # for the first length, then for every other


def test_the_host_waits_for_nothing():
    x, weight, scale, bias, _, _ = made((9,), 33, 24)
    with HostSync() as host:
        fp8_linear(x.requires_grad_(), weight, scale, bias.requires_grad_()).square().sum().backward()
    assert not host.found


class Cuda:
    """As much of a tensor on a GPU as `served` asks of x."""

    is_cuda, device = True, "cuda:0"

    def __init__(self, rows=4):
        self.shape = (rows, 48)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_which_calls_the_vendor_s_product_serves(capability, monkeypatch):
    from fastpeft.ops.fp8_linear import served

    device = dict(zip(("major", "minor"), capability, strict=True))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(**device))
    monkeypatch.setattr(torch.version, "hip", None)
    weight, bf16 = torch.zeros(32, 48).to(FP8), torch.bfloat16
    assert served(Cuda(), weight, bf16) == (capability in [(8, 9), (9, 0), (10, 0)])
    assert not served(torch.zeros(4, 48), weight, bf16)
    assert not served(Cuda(0), weight, bf16)
    assert not served(Cuda(), weight, torch.float16) and not served(Cuda(), weight, torch.float32)
    assert not served(Cuda(), weight[:31], bf16) and not served(Cuda(), weight[:, :40].contiguous(), bf16)
    assert not served(Cuda(), weight.t().contiguous().t(), bf16)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not served(Cuda(), weight, bf16)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_vendor_s_product_gives_the_same(bias, transposed, monkeypatch):
    """torch's emulation of it on a CPU, called as on a GPU; the layout is the one that GPUs ask for."""
    from fastpeft.ops.fp8_linear import product

    x, weight, scale, bias_N, dy, _ = made((21,), 64, 48, torch.bfloat16, bias=bias)
    x = x.t().contiguous().t() if transposed else x
    calls, real = [], torch._scaled_mm

    def checked(a, b, scale_a, scale_b, **options):
        calls.append(options)
        assert a.stride() == (64, 1) and b.stride() == (1, 64) and b.shape == (64, 48)
        assert scale_a.shape == (21, 1) and scale_b.shape == (1, 48)
        assert scale_a.is_contiguous() and scale_b.is_contiguous() and scale_a.dtype == scale_b.dtype == torch.float32
        return real(a, b, scale_a, scale_b, **options)

    widened = fp8_linear(x, weight, scale, bias_N)
    monkeypatch.setattr(torch, "_scaled_mm", checked)
    monkeypatch.setitem(product.__globals__, "served", lambda *_: True)
    found = outcome(fp8_linear, x, weight, scale, bias_N, dy)
    assert len(calls) == 1 and calls[0]["out_dtype"] == torch.bfloat16 and calls[0]["use_fast_accum"] is False
    assert bias_N is None or calls[0]["bias"].dtype == torch.bfloat16
    truth = emulation(x, weight, scale, bias_N, dy)
    assert compare("y", [found["y"]], [widened], [truth["y"]]).faults(Bounds(rms=1.3)) == []
    assert float((found["dx"].double() - truth["dx"]).norm() / truth["dx"].norm()) < 2**-7


def test_a_derivative_of_a_gradient_is_refused():
    x, weight, scale, *_ = made((4,), 33, 24)
    x.requires_grad_()
    y = fp8_linear(x * x, weight, scale)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(OpError, match="first derivatives only"):
        dx.sum().backward()


X, WEIGHT, SCALE, BIAS, _, _ = made((4,), 33, 24)
REFUSED = {
    "x of 8 bits": ({"x": X.to(FP8)}, "x is torch.float8_e4m3fn; float32, .* is needed"),
    "x of integers": ({"x": X.long()}, "x is torch.int64"),
    "x too wide": ({"x": X.repeat(1, 2)}, r"x has shape \(4, 66\), expected \(..., 33\)"),
    "x a scalar": ({"x": torch.tensor(1.0)}, r"x has shape \(\)"),
    "x elsewhere": ({"x": X.to("meta")}, "x is on meta, weight on cpu; move one"),
    "weight dense": ({"weight": WEIGHT.float()}, "weight is torch.float32 of shape .*; torch.float8_e4m3fn in 2"),
    "weight wants a gradient": ({"weight": WEIGHT.clone().requires_grad_()}, r"weight wants a gradient, .*\(False\)"),
    "scale flat": (
        {"weight_scale": SCALE[:, 0]},
        r"weight_scale is torch.float32 of shape \(24,\); torch.float32 in 2",
    ),
    "scale narrow": ({"weight_scale": SCALE.half()}, "weight_scale is torch.float16"),
    "scale short": ({"weight_scale": SCALE[:3]}, r"weight_scale has shape \(3, 1\) on cpu, expected \(24, 1\)"),
    "bias short": ({"bias": BIAS[:3]}, r"bias has shape \(3,\) on cpu, expected \(24,\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case):
    changed, message = REFUSED[case]
    with pytest.raises(OpError, match=message):
        fp8_linear(**{"x": X, "weight": WEIGHT, "weight_scale": SCALE, "bias": BIAS, **changed})
