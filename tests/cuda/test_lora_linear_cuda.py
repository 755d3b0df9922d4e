"""`lora_linear`'s compiled kernels on a GPU: the criterion of `fastpeft.oracle` at larger, odd sizes and in bf16, and
what only a GPU can show: determinism under real parallelism, 64-bit offsets, CUDA graphs."""

import pytest
import torch

from fastpeft.dispatch import backend
from fastpeft.ops import dropout_mask, lora_linear
from fastpeft.oracle import GRADIENTS, Bounds, lora_linear_differences, lora_linear_outcomes, random_lora_problem
from tests.ops.lora_linear_cases import DTYPES, STRATEGIES, on
from tests.ops.test_lora_linear_dropout import independent_mask

pytestmark = pytest.mark.cuda

DEVICE = "cuda"
SHAPE, OUTPUTS, RANK = (3, 331, 1031), 997, 13
ALIGNED, ALIGNED_OUTPUTS = (4, 512, 2048), 1024
LARGE_ROWS, LARGE_COLUMNS, LAST = 70_000, 32_768, 96  # more than 2**31 elements, and the rows that are looked at

# fp32 gradients of fp32 adapters on fp16 data come from tf32 products of two parts: 21 of eager's 24 bits.
TF32X3 = Bounds(rms=16, peak=16, row=32)


def problem_of(shape, outputs, rank=RANK, dtypes="bf16-fp32", **options):
    dtype, adapter_dtype = DTYPES[dtypes]
    return random_lora_problem(shape, outputs, rank, dtype=dtype, adapter_dtype=adapter_dtype, device=DEVICE, **options)


def assert_right(problem, dtypes, wanted=("x", "bias", "lora_A", "lora_B")):
    faults = []
    for difference in lora_linear_differences([problem], wanted):
        two_parts = dtypes == "fp16-fp32" and difference.name.startswith("dlora")
        faults += difference.faults(TF32X3 if two_parts else Bounds())
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("strategy", [*STRATEGIES, "alone"])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_as_right_as_eager(dtypes, strategy, dropout):
    alone = strategy == "alone"
    problem = problem_of(SHAPE, OUTPUTS, dtypes=dtypes, dropout=dropout)
    with on("triton", "prewrite" if alone else strategy):
        assert_right(problem.without_base() if alone else problem, dtypes)


@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_as_right_as_eager_on_aligned_shapes_by_the_shipped_plan(dropout):
    with on("triton"):
        assert_right(problem_of(ALIGNED, ALIGNED_OUTPUTS, 16, dropout=dropout), "bf16-fp32", GRADIENTS)


@pytest.mark.parametrize("rank", [1, 24, 64, 65, 256, 300, 1024])
def test_at_rank(rank):
    with on("triton"):
        assert_right(problem_of(SHAPE, OUTPUTS, rank, dtypes="bf16").without_base(), "bf16")


@pytest.mark.parametrize("wanted", [("x",), ("lora_A", "lora_B"), ("lora_B", "bias"), ("x", "lora_A"), ("weight",)])
def test_subsets_of_gradients(wanted):
    with on("triton"):
        assert_right(problem_of(SHAPE, OUTPUTS, dropout=0.3), "bf16-fp32", wanted)


def test_on_the_gpu_triton_is_what_auto_means():
    problem = problem_of(SHAPE, OUTPUTS)
    arguments = (problem.x, problem.weight, problem.bias, problem.lora_A, problem.lora_B, 0.5)
    with backend("auto"):
        automatic = lora_linear(*arguments)
    with backend("triton"):
        assert torch.equal(automatic, lora_linear(*arguments))


@pytest.mark.parametrize("seed", [0, -1, 0x0123456789ABCDEF])
def test_the_mask_is_philox_bit_for_bit(seed):
    mask = dropout_mask(torch.tensor([seed], device=DEVICE), 0.3, 513, 777, DEVICE, "triton")
    assert torch.equal(mask.cpu(), independent_mask(seed, 0.3, 513, 777))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_fifty_repeats_are_equal_bit_for_bit(dropout):
    problem = problem_of(ALIGNED, ALIGNED_OUTPUTS, 16, dropout=dropout)
    leaves = [getattr(problem, name).detach().requires_grad_() for name in GRADIENTS]

    def run():
        torch.manual_seed(3)
        y = lora_linear(*leaves, 0.5, dropout=dropout, training=True)
        return y, *torch.autograd.grad(y, leaves, problem.dy)

    with on("triton"):
        first = run()
        for _ in range(50):
            for one, other in zip(first, run(), strict=True):
                assert torch.equal(one, other)


@pytest.mark.xdist_group("large")  # one after the other
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("wide", ["x", "dy"])
def test_offsets_beyond_32_bits(wide, strategy):
    """More than 2**31 elements, all zero but those of the last rows, which alone must give the same gradients."""
    if DEVICE == "cuda" and torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    inputs, outputs = (LARGE_COLUMNS, 16) if wide == "x" else (16, LARGE_COLUMNS)
    small = problem_of((LAST, inputs), outputs, bias=False)
    x = torch.zeros(LARGE_ROWS, inputs, dtype=small.x.dtype, device=DEVICE)
    dy = torch.zeros(LARGE_ROWS, outputs, dtype=small.x.dtype, device=DEVICE)
    x[-LAST:], dy[-LAST:] = small.x, small.dy
    a, b = (t.detach().requires_grad_() for t in (small.lora_A, small.lora_B))

    def run(x, dy):
        x = x.detach().requires_grad_()
        y = lora_linear(x, small.weight, None, a, b, 0.5)
        dx, da, db = torch.autograd.grad(y, (x, a, b), dy)
        return y.detach()[-LAST:], dx[-LAST:], da, db

    with on("triton", strategy):
        for large, alone in zip(run(x, dy), run(small.x, small.dy), strict=True):
            torch.testing.assert_close(large, alone, rtol=2e-2, atol=1e-2 * float(alone.abs().max()))


def test_cuda_graphs():
    problem = problem_of(ALIGNED, ALIGNED_OUTPUTS, 16)
    leaves = [getattr(problem, name).detach().requires_grad_() for name in ("x", "bias", "lora_A", "lora_B")]

    def step(dropout):
        x, bias, a, b = leaves
        y = lora_linear(x, problem.weight, bias, a, b, 0.5, dropout=dropout, training=True)
        return y.detach(), *torch.autograd.grad(y, leaves, problem.dy)

    def captured(dropout):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                step(dropout)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = step(dropout)
        return graph, results

    with on("triton"):
        graph, results = captured(0.0)
        graph.replay()
        for replayed, expected in zip(results, step(0.0), strict=True):
            assert torch.equal(replayed, expected)
        graph, results = captured(0.5)
        graph.replay()
        first = [t.clone() for t in results]
        graph.replay()
        assert not torch.equal(first[0], results[0])  # another mask each time, as for any dropout in a graph


def test_the_generator_of_the_device_decides():
    problem = problem_of(SHAPE, OUTPUTS, dropout=0.3)
    with on("triton"):
        first = lora_linear_outcomes(problem, ("x",), seed=1)[0]
        again = lora_linear_outcomes(problem, ("x",), seed=1)[0]
        other = lora_linear_outcomes(problem, ("x",), seed=2)[0]
    assert torch.equal(first["dx"], again["dx"]) and not torch.equal(first["dx"], other["dx"])
