"""`lora_projections`' compiled kernels on a GPU: the criterion of `fastpeft.oracle` at larger, odd sizes and in bf16,
and what only a GPU can show: determinism under real parallelism, CUDA graphs, no synchronisation."""

import pytest
import torch

from fastpeft.dispatch import Plan, backend, override_plan
from fastpeft.oracle import Bounds
from tests.cuda.launches import assert_repeats, assert_replays, waiting_is_an_error
from tests.ops.lora_linear_cases import DTYPES
from tests.ops.lora_projections_cases import assert_right, call, draw, faults_of

pytestmark = pytest.mark.cuda

SIZES = {"shape": (3, 331, 1031), "outputs": (997, 331, 331), "ranks": (13, 64, 8)}
ALIGNED = {"shape": (4, 512, 2048), "outputs": (1024, 256, 256), "ranks": (16, 16, 16)}
# fp32 gradients of fp32 adapters on fp16 data come from tf32 products of two parts: 21 of eager's 24 bits.
TF32X3 = Bounds(rms=16, peak=16, row=32)
# One draw of fp32 sums of a few hundred numbers in another order: the worst row's error is that of a few roundings.
SINGLE = Bounds(rms=1.25, peak=3.0, row=3.0)


def drawn(dtypes="bf16-fp32", sizes=SIZES, **options):
    return draw(dtypes, device="cuda", **sizes | options)


def found(problem, seed=3):
    torch.manual_seed(seed)
    leaves = problem.leaves()
    ys = call(problem, leaves)
    return [*(y.detach() for y in ys), *torch.autograd.grad(ys, list(leaves.values()), problem.dy)]


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("sizes", [SIZES, ALIGNED], ids=["odd", "aligned"])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_as_right_as_eager(dtypes, sizes, dropout):
    problem = drawn(dtypes, sizes, dropout=dropout)
    adapters = [name for name in problem.leaves() if name[0] in "AB"]
    others = [name for name in problem.leaves() if name not in adapters]
    with backend("triton"):
        assert_right([problem], SINGLE if dtypes == "fp32" else Bounds(), others)
        bounds = TF32X3 if dtypes == "fp16-fp32" else SINGLE
        assert [fault for fault in faults_of([problem], bounds, adapters) if not fault.startswith("y")] == []


@pytest.mark.parametrize("plan", ["fused", "prewrite"])
@pytest.mark.parametrize("ranks", [(8, 8), (128, 64, 5), (1, 2, 3, 4), (16, 16, 16, 16, 16, 16), (300, 16)], ids=str)
def test_any_number_of_projections(ranks, plan):
    problems = [drawn("bf16", shape=(2, 67, 1031), ranks=ranks, dropout=True, seed=seed) for seed in range(2)]
    with backend("triton"), override_plan(Plan(plan, plan, "forced by a test")):
        assert_right(problems, SINGLE)


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("dtypes", ["bf16", "bf16-fp32"])
def test_on_base_products_that_somebody_else_has_computed(dtypes, dropout):
    with backend("triton"):
        assert_right([drawn(dtypes, dropout=dropout, based=True, seed=seed) for seed in range(2)], SINGLE)


@pytest.mark.parametrize("rows", [1, 7])
def test_decoding(rows):
    with backend("triton"):
        assert_right([drawn("bf16", shape=(rows, 1031), seed=seed) for seed in range(4)], SINGLE)


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
        ys = call(problem, leaves)
        return *(y.detach() for y in ys), *torch.autograd.grad(ys, list(leaves.values()), problem.dy)

    with backend("triton"):
        assert_replays(step)


def test_nothing_waits_for_the_device():
    problem = drawn(sizes=ALIGNED, dropout=True)
    with backend("triton"):
        found(problem)
        with waiting_is_an_error():
            leaves = problem.leaves()
            torch.autograd.grad(call(problem, leaves), list(leaves.values()), problem.dy)
