"""`mixed_lora_linear`'s compiled kernels on a GPU: the criterion of `fastpeft.oracle` at larger, odd sizes and in bf16,
and what only a GPU can show: determinism under real parallelism, 64-bit offsets, CUDA graphs, no synchronisation."""

import dataclasses

import pytest
import torch

from fastpeft.dispatch import backend
from fastpeft.ops import mixed_lora_linear
from fastpeft.oracle import Bounds
from tests.cuda.launches import assert_repeats, assert_replays, waiting_is_an_error
from tests.ops.lora_linear_cases import DTYPES
from tests.ops.mixed_lora_linear_cases import assert_right, call, draw, faults_of

pytestmark = pytest.mark.cuda

DEVICE = "cuda"
ROWS = (2, 0, -1, 1, 2, 0)
SIZES = {"shape": (331, 1031), "outputs": 997, "ranks": (13, 64, 8), "rows": ROWS}
ALIGNED = {"shape": (512, 2048), "outputs": 1024, "ranks": (16, 64, 8), "rows": ROWS}
# fp32 gradients of fp32 adapters on fp16 data come from tf32 products of two parts: 21 of eager's 24 bits.
TF32X3 = Bounds(rms=16, peak=16, row=32)
# One draw of fp32 sums of a few hundred numbers in another order: the worst row's error is that of a few roundings.
SINGLE = Bounds(rms=1.25, peak=3.0, row=3.0)


def drawn(dtypes="bf16-fp32", sizes=SIZES, **options):
    return draw(dtypes, device=DEVICE, **sizes | options)


def found(problem, seed=3):
    torch.manual_seed(seed)
    leaves = problem.leaves()
    y = call(problem, leaves)
    return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), problem.dy)]


@pytest.mark.parametrize("base", [True, False], ids=["base", "residual"])
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("sizes", [SIZES, ALIGNED], ids=["odd", "aligned"])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_as_right_as_eager(dtypes, sizes, dropout, base):
    problem = drawn(dtypes, sizes, dropout=dropout, base=base)
    adapters = [name for name in problem.leaves() if name[0] in "AB"]
    others = [name for name in problem.leaves() if name not in adapters]
    with backend("triton"):
        assert_right([problem], SINGLE if dtypes == "fp32" else Bounds(), others)
        bounds = TF32X3 if dtypes == "fp16-fp32" else SINGLE
        assert [fault for fault in faults_of([problem], bounds, adapters) if not fault.startswith("y:")] == []


@pytest.mark.parametrize("ranks", [(1, 2, 3), (24, 65, 128), (256, 16, 8)], ids=str)
@pytest.mark.parametrize("tokens", [1, 7])
def test_decoding(tokens, ranks):
    with backend("triton"):
        assert_right([drawn("bf16", shape=(tokens, 1031), ranks=ranks, seed=seed) for seed in range(4)], SINGLE)


def test_on_the_gpu_triton_is_what_auto_means():
    problem = drawn()
    with backend("auto"):
        automatic = found(problem)
    with backend("triton"):
        assert all(torch.equal(*pair) for pair in zip(automatic, found(problem), strict=True))


def test_the_torch_backend_is_right_too():
    with backend("torch"):
        assert_right([drawn(dropout=True)], SINGLE)


@pytest.mark.parametrize("dropout", [False, True])
def test_fifty_repeats_are_equal_bit_for_bit(dropout):
    problem = drawn(sizes=ALIGNED, dropout=dropout)
    with backend("triton"):
        assert_repeats(lambda: found(problem), 50)


def test_cuda_graphs():
    problem = drawn(sizes=ALIGNED)
    leaves = problem.leaves()

    def step():
        y = call(problem, leaves)
        return y.detach(), *torch.autograd.grad(y, list(leaves.values()), problem.dy)

    with backend("triton"):
        assert_replays(step)


def test_nothing_waits_for_the_device():
    problem = drawn(sizes=ALIGNED, dropout=True)
    with backend("triton"):
        found(problem)  # tables are made once
        with waiting_is_an_error():
            leaves = problem.leaves()
            torch.autograd.grad(call(problem, leaves), list(leaves.values()), problem.dy)


@pytest.mark.xdist_group("large")  # one after the other
@pytest.mark.parametrize("wide", ["x", "dy"])
def test_offsets_beyond_32_bits(wide):
    """More than 2**31 elements, all zero but those of the last sample, which alone must give the same gradients."""
    if torch.cuda.mem_get_info()[0] < 32 * 2**30:
        pytest.skip("needs 32 GiB of free GPU memory")
    inputs, outputs = (32_768, 16) if wide == "x" else (16, 32_768)
    small = drawn("bf16-fp32", {"shape": (96, inputs), "outputs": outputs, "ranks": (13, 4), "rows": (1,)})
    samples = 800
    x = torch.zeros(samples, 96, inputs, dtype=torch.bfloat16, device=DEVICE)
    dy = torch.zeros(samples, 96, outputs, dtype=torch.bfloat16, device=DEVICE)
    x[-1], dy[-1] = small.x[0], small.dy[0]
    assert max(x.numel(), dy.numel()) > 2**31
    a, b = ([matrix.detach().requires_grad_() for matrix in each] for each in (small.lora_A, small.lora_B))

    def run(x, dy, rows):
        x = x.detach().requires_grad_()
        y = mixed_lora_linear(x, small.weight, None, a, b, small.scalings, rows)
        dx, da, db = torch.autograd.grad(y, (x, a[1], b[1]), dy)
        return y.detach()[-1], dx[-1], da, db

    with backend("triton"):
        large = run(x, dy, [b % 2 for b in range(samples - 1)] + [1])
        for one, other in zip(large, run(small.x, small.dy, [1]), strict=True):
            torch.testing.assert_close(one, other, rtol=2e-2, atol=1e-2 * float(other.abs().max()))


def test_compiled_as_one_graph():
    problem = dataclasses.replace(drawn(), dropouts=None)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True)
    results = []
    for function in (call, compiled):
        leaves = problem.leaves()
        y = function(problem, leaves)
        results.append([y.detach(), *torch.autograd.grad(y, list(leaves.values()), problem.dy)])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
