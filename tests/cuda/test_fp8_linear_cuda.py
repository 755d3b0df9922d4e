"""`fp8_linear` on a GPU: the vendor's product of 8 bits by the criterion of `fastpeft.oracle`, the products of wider
numbers where it does not serve, the same codes as on a CPU, compiled code, and a patched model."""

import pytest
import torch

import fastpeft
from fastpeft.ops import fp8_linear, fp8_linear_reference
from fastpeft.ops.fp8_linear import CAPABILITIES, quantise_rows, served
from fastpeft.oracle import Bounds, compare
from tests.models import batch, tiny
from tests.ops.test_fp8_linear import made, outcome

pytestmark = pytest.mark.cuda

DEVICE = "cuda"
# Hopper adds products of 8 bits to 14 bits or so, and those sums to fp32: a little more than bf16's own rounding.
VENDOR = Bounds(rms=1.25, peak=3.0, row=2.5)
EVEN = {"many": ((1024,), 4096, 1024), "few": ((17,), 512, 256), "one": ((1,), 256, 512), "batch": ((3, 41), 1024, 48)}
ODD = {"odd K": ((64,), 1000, 256), "odd N": ((64,), 256, 1000), "both": ((5, 7), 333, 77)}


def on_gpu(shape, dtype=torch.bfloat16, bias=True, seed=0):
    return [None if each is None else each.to(DEVICE) for each in made(*shape, dtype, bias, seed)[:-1]]


def assert_right(draws, bounds) -> None:
    """y and dX, in units of the plain formula's error."""
    wide = [[each if each is None or each.dtype != draw[0].dtype else each.double() for each in draw] for draw in draws]
    exact = [[*each[:2], draw[2], *each[3:]] for each, draw in zip(wide, draws, strict=True)]
    ways = [[outcome(fp8_linear, *draw) for draw in draws]]
    ways += [[outcome(fp8_linear_reference, *draw) for draw in each] for each in (draws, exact)]
    for name in ("y", "dx"):
        assert compare(name, *([draw[name] for draw in way] for way in ways)).faults(bounds) == []


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", EVEN)
def test_the_vendor_s_product(shape, bias):
    draws = [on_gpu(EVEN[shape], bias=bias, seed=seed) for seed in range(4)]
    x, weight, *_ = draws[0]
    if torch.cuda.get_device_capability() not in CAPABILITIES:
        pytest.skip("this GPU has no products of 8 bits with a scale for each row")
    assert served(x.view(-1, x.shape[-1]), weight, torch.bfloat16)
    assert_right(draws, VENDOR)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", ODD)
def test_wider_numbers(shape, dtype):
    draws = [on_gpu(ODD[shape], dtype, seed=seed) for seed in range(4)]
    assert not served(draws[0][0].view(-1, draws[0][0].shape[-1]), draws[0][1], dtype)
    assert_right(draws, Bounds())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_codes_are_those_of_a_cpu(dtype):
    x = made((257,), 1031, 8, dtype)[0]
    x[3], x[4] = 0, x[4] * 2.0**-20
    for mine, theirs in zip(quantise_rows(x.to(DEVICE)), quantise_rows(x), strict=True):
        assert torch.equal(mine.cpu().view(torch.uint8), theirs.view(torch.uint8))


def test_compiled():
    torch._dynamo.reset()
    x, weight, scale, bias, dy = on_gpu(EVEN["few"])
    compiled = torch.compile(fp8_linear, fullgraph=True)
    found, expected = (outcome(each, x, weight, scale, bias, dy) for each in (compiled, fp8_linear))
    for name, tensor in expected.items():  # the compiler's quotients may fall on the other side of a code's border
        assert float((found[name] - tensor).float().norm() / tensor.float().norm()) < 1e-2, name


def test_a_step_of_a_patched_model():
    losses = []
    for float8 in (False, True):
        model = tiny(dtype=torch.bfloat16).to(DEVICE)
        torch.manual_seed(0)
        fastpeft.patch(model, fastpeft.LoraConfig(r=4, target_modules="all-linear"))
        before = torch.cuda.memory_allocated()
        if float8:
            fastpeft.quantise_base_fp8(model)
            assert torch.cuda.memory_allocated() < before
        loss = model.train()(**{name: each.to(DEVICE) for name, each in batch().items()}).loss
        loss.backward()
        assert all(each.grad.isfinite().all() for each in model.parameters() if each.requires_grad)
        losses.append(float(loss.detach()))
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
