"""`lora_mlp`'s compiled kernels on a GPU: the criterion of `fastpeft.oracle` at larger, odd sizes and in bf16, and what
only a GPU can show: determinism under real parallelism, CUDA graphs, no synchronisation."""

import pytest
import torch

from fastpeft.dispatch import backend
from fastpeft.ops.lora_mlp import ACTIVATIONS
from fastpeft.oracle import Bounds
from tests.cuda.launches import assert_repeats, assert_replays, waiting_is_an_error
from tests.ops.lora_linear_cases import DTYPES
from tests.ops.lora_mlp_cases import assert_right, call, draw

pytestmark = pytest.mark.cuda

SIZES = {"shape": (2, 331, 517), "inner": 1031, "outputs": 499, "ranks": (13, 32, 8)}
ALIGNED = {"shape": (2, 512, 1024), "inner": 2816, "outputs": 1024, "ranks": (16, 16, 16)}
# fp32 gradients of fp32 adapters on fp16 data come from tf32 products of two parts: 21 of eager's 24 bits.
TF32X3 = Bounds(rms=16, peak=16, row=32)
# One draw, and sums of a few thousand numbers in another order.
SINGLE = Bounds(rms=1.25, peak=3.0, row=3.0)


def drawn(dtypes="bf16-fp32", sizes=SIZES, **options):
    return draw(dtypes, device="cuda", **sizes | options)


def found(problem, seed=3):
    torch.manual_seed(seed)
    leaves = problem.leaves()
    y = call(problem, leaves)
    return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), problem.dy)]


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("sizes", [SIZES, ALIGNED], ids=["odd", "aligned"])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_as_right_as_eager(dtypes, sizes, dropout):
    problem = drawn(dtypes, sizes, dropout=dropout)
    with backend("triton"):
        assert_right([problem], TF32X3 if dtypes == "fp16-fp32" else SINGLE)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("ranks", [(16, 16, 16), (64, 16, 128), (0, 32, 0)], ids=str)
def test_activations_and_ranks(activation, ranks):
    with backend("triton"):
        assert_right([drawn("bf16", activation=activation, ranks=ranks, dropout=True)], SINGLE)


@pytest.mark.parametrize("tokens", [1, 7])
def test_decoding(tokens):
    with backend("triton"):
        assert_right([drawn("bf16", shape=(tokens, 517), seed=seed) for seed in range(4)], SINGLE)


def test_the_torch_backend_is_right_too():
    with backend("torch"):
        assert_right([drawn(dropout=True)], SINGLE)


@pytest.mark.parametrize("recompute", [False, True])
def test_thirty_repeats_are_equal_bit_for_bit(recompute):
    problem = drawn(sizes=ALIGNED, dropout=True, recompute=recompute)
    with backend("triton"):
        assert_repeats(lambda: found(problem), 30)


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
        found(problem)
        with waiting_is_an_error():
            leaves = problem.leaves()
            torch.autograd.grad(call(problem, leaves), list(leaves.values()), problem.dy)


def test_compiled_as_one_graph():
    problem = drawn()
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True)
    results = []
    for function in (call, compiled):
        leaves = problem.leaves()
        y = function(problem, leaves)
        results.append([y.detach(), *torch.autograd.grad(y, list(leaves.values()), problem.dy)])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
