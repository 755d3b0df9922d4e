"""`lora_linear` is as right as eager torch: every dtype, strategy, rank, shape, layout and subset of gradients.

The criterion is `fastpeft.oracle`'s. The Triton kernels run in the interpreter, with NaN in all uninitialised memory
and 32-bit overflow an error.
"""

import dataclasses
import itertools

import pytest
import torch

from fastpeft.ops import lora_linear
from fastpeft.ops.lora_linear import apply_lora
from fastpeft.oracle import GRADIENTS, Bounds, compare, lora_linear_differences, lora_linear_outcomes, op_dropout
from tests.ops.lora_linear_cases import (
    DTYPES,
    EXACT_IN_INTERPRETER,
    INPUTS,
    OUTPUTS,
    ROWS,
    STRATEGIES,
    TRUNCATED,
    assert_right,
    draws,
    on,
    truth_of,
)

# A BLAS adds up as its processor likes, and eager's may be a tenth more exact than the interpreter's on one and not on
# another: the kernels' products are added up in one way everywhere.
pytestmark = pytest.mark.usefixtures("poison", "symmetric_products")
interpreted = pytest.mark.interpreter
BOTH = [pytest.param("torch"), pytest.param("triton", marks=interpreted)]


@pytest.mark.parametrize("base", [True, False], ids=["base", "alone"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_torch_path(dtypes, dropout, base):
    with on("torch"):
        assert_right(draws(12, dtypes=dtypes, dropout=dropout, base=base), GRADIENTS)


@interpreted
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("strategy", [*STRATEGIES, "alone"])
@pytest.mark.parametrize("dtypes", EXACT_IN_INTERPRETER)
def test_kernels(dtypes, strategy, dropout):
    alone = strategy == "alone"  # then the strategies differ only in how they add zeros
    with on("triton", "fused" if alone else strategy):
        assert_right(draws(3, dtypes=dtypes, dropout=dropout, base=not alone), GRADIENTS)


@interpreted
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtypes", ["bf16", "bf16-fp32"])
def test_kernels_in_bfloat16_to_within_the_interpreters_truncation(dtypes, strategy):
    with on("triton", strategy):
        differences = lora_linear_differences(draws(2, dtypes=dtypes, dropout=0.3))
    for difference in differences:
        # Three bf16 parts hold an fp32 adapter's 24 bits, so its fp32 gradients are eager's; what is bf16 is truncated.
        split = dtypes == "bf16-fp32" and difference.name.startswith("dlora")
        bounds = Bounds() if split else TRUNCATED
        assert not difference.faults(bounds), difference


@interpreted
@pytest.mark.parametrize("rank", [1, 2, 3, 7, 8, 16, 17, 24, 31, 33, 48, 64, 65, 100, 128, 145, 256, 300, 1024])
def test_kernels_at_rank(rank):
    # The error of a result of low rank is that of few roundings, so it takes more draws to know its size.
    with on("triton", "fused"):
        assert_right(draws(max(2, 12 // rank), rank=rank, base=False))


@pytest.mark.parametrize("rank", [1, 7, 24, 65, 256, 300])
def test_torch_path_at_rank(rank):
    with on("torch"):
        assert_right(draws(24, rank=rank, base=False, dropout=0.3))


SHAPES = [
    # x, N: whole tiles only, one more than a tile, tall, wide, and runs of several row blocks
    ((1, 69), 71),
    ((37, 1), 5),
    ((16, 32), 32),
    ((17, 33), 33),
    ((131, 33), 40),
    ((3, 201), 50),
    ((3, 50), 203),
    ((69,), 71),
    ((2, 1, 5, 69), 71),
]


# Where a product accumulates onto a term written before it, a BLAS in fp32 starts its sum of a single row there: up to
# 1.3 times eager's error in dX for 1 to 7 rows (1.0 from 64 rows on). Half precision is summed in fp32 and does not
# show it, so few rows are measured in half where that happens: in prewrite, and in the torch path under dropout.
@interpreted
@pytest.mark.usefixtures("overflow_checks")
@pytest.mark.parametrize(("dtypes", "strategy"), [("fp32", "fused"), ("fp16-fp32", "prewrite")])
@pytest.mark.parametrize(("shape", "outputs"), SHAPES)
def test_kernels_at_shape(shape, outputs, dtypes, strategy):
    rows = torch.Size(shape[:-1]).numel()
    if rows == 1:  # a BLAS sums a single row in many lanes at once, more exactly than any one fp32 accumulator
        dtypes = "fp16"
    with on("triton", strategy):
        assert_right(draws(min(12, max(2, 4000 // (outputs * rows))), shape, outputs, rank=17, dtypes=dtypes))


@pytest.mark.parametrize(("dtypes", "dropout"), [("fp32", 0.0), ("fp16-fp32", 0.3)])
@pytest.mark.parametrize(("shape", "outputs"), SHAPES)
def test_torch_path_at_shape(shape, outputs, dtypes, dropout):
    with on("torch"):
        assert_right(draws(60, shape, outputs, dtypes=dtypes, dropout=dropout))


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_single_elements(dropout, backend):
    # No sums to speak of: eager's whole error is one or two roundings, and one more is no fault.
    with on(backend):
        problems = draws(24 if backend == "triton" else 96, (1, 1), 1, dropout=dropout)
        assert_right(problems, bounds=Bounds(rms=2.5, peak=5.0, row=2.5))


def subsets(names):
    return [s for size in range(len(names) + 1) for s in itertools.combinations(names, size)]


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("wanted", subsets(GRADIENTS), ids=lambda wanted: "-".join(wanted) or "none")
def test_every_subset_of_gradients(wanted, backend):
    with on(backend, "prewrite" if backend == "triton" else None):
        assert_right(draws(1 if backend == "triton" else 12, rank=16, dtypes="fp16-fp32"), wanted)


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("wanted", subsets(("x", "lora_A", "lora_B")), ids=lambda wanted: "-".join(wanted) or "none")
def test_every_subset_of_gradients_with_dropout_and_no_bias(wanted, backend):
    with on(backend, "fused" if backend == "triton" else None):
        count = 1 if backend == "triton" else 12
        assert_right(draws(count, rank=16, dropout=0.3, bias=False, dtypes="fp16-fp32"), wanted)


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("wanted", [("x", "lora_A", "lora_B", "bias"), ("lora_B", "bias"), ("bias",), ("x", "bias")])
def test_beyond_the_rank_of_one_read(wanted, backend):
    with on(backend):
        assert_right(draws(2 if backend == "triton" else 12, rank=70, dropout=0.3), wanted)


def _gappy(t):
    """The same values as every second row and every third column of storage that holds NaN otherwise."""
    storage = torch.full((2 * t.shape[0], 3 * t.shape[1]), float("nan"), dtype=t.dtype)
    view = storage[::2, ::3]
    view.copy_(t)
    return view


def _offset(t):
    storage = torch.full((t.numel() + 7,), float("nan"), dtype=t.dtype)
    storage[3:-4] = t.flatten()
    return storage[3:-4].view(t.shape)


LAYOUTS = {
    "transposed": lambda t: t.t().contiguous().t(),
    "gappy": _gappy,
    "offset": _offset,
    "one-row": lambda t: t[:1].expand_as(t),
    "one-column": lambda t: t[:, :1].expand_as(t),
    "one-number": lambda t: t[:1, :1].expand_as(t),
}


# Parameters are never expanded; x is by broadcasting, dY by sum().backward().
LAID_OUT = [
    (name, layout)
    for name in ("x", "weight", "lora_A", "lora_B", "dy")
    for layout in LAYOUTS
    if name in ("x", "dy") or not layout.startswith("one-")
]


def with_layout(problem, name, layout):
    return dataclasses.replace(problem, **{name: LAYOUTS[layout](getattr(problem, name))})


@pytest.mark.parametrize(("name", "layout"), LAID_OUT)
def test_torch_path_with_layout(name, layout):
    with on("torch"):
        dropout = 0.3 if name == "x" else 0.0  # which reads no other tensor
        assert_right([with_layout(problem, name, layout) for problem in draws(24, dropout=dropout)], GRADIENTS)


@interpreted
@pytest.mark.parametrize(
    ("strategy", "name", "layout"),
    [("fused", *case) for case in LAID_OUT] + [("prewrite", *case) for case in LAID_OUT if case[1] == "gappy"],
)
def test_kernels_with_layout_equal_those_with_contiguous_tensors(strategy, name, layout):
    problem = with_layout(draws(1)[0], name, layout)
    plain = dataclasses.replace(problem, **{name: getattr(problem, name).clone(memory_format=torch.contiguous_format)})
    with on("triton", strategy):
        got, expected = (lora_linear_outcomes(p, ("x", "bias", "lora_A", "lora_B"))[0] for p in (problem, plain))
    for key in got:
        if strategy == "prewrite" and key in ("y", "dx"):  # the vendor's product, whose sums depend on the layout
            torch.testing.assert_close(got[key], expected[key])
        else:
            assert torch.equal(got[key], expected[key]), key


@pytest.mark.parametrize("backend", BOTH)
def test_leading_dimensions_that_cannot_be_flattened_without_a_copy(backend):
    problems = [
        dataclasses.replace(p, x=p.x.transpose(0, 1), dy=p.dy.transpose(0, 1)) for p in draws(3, shape=(7, 5, 69))
    ]
    with on(backend):
        assert_right(problems, GRADIENTS)


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("leading", [(0,), (0, 3), (3, 0)])
def test_no_rows(leading, backend):
    problem = draws(1, shape=(1, INPUTS))[0]
    leaves = [getattr(problem, name).detach().requires_grad_() for name in GRADIENTS]
    leaves[0] = torch.empty(*leading, INPUTS, requires_grad=True)
    with on(backend):
        y = lora_linear(*leaves, 0.5, dropout=0.3, training=True)
        gradients = torch.autograd.grad(y.sum(), leaves)
    assert y.shape == (*leading, OUTPUTS)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert gradient.shape == leaf.shape and not gradient.any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["x", "weight", "bias", "lora_A", "lora_B", "dy"])
@pytest.mark.parametrize("backend", BOTH)
def test_what_is_not_finite_spreads_as_in_eager(backend, name, value):
    problem = draws(1)[0]
    tensor = getattr(problem, name).clone()
    tensor.view(-1)[tensor.numel() // 2] = value
    got, eager, _ = _outcomes(backend, dataclasses.replace(problem, **{name: tensor}))
    for key in got:
        assert torch.equal(got[key].isfinite(), eager[key].isfinite()), key
        if value != value:
            assert torch.equal(got[key].isnan(), eager[key].isnan()), key
    assert sum(not t.isfinite().all() for t in got.values()) >= 1
    assert sum(t.isfinite().all() for t in got.values()) >= 1  # dX knows nothing of x, dA nothing of W ...


def _outcomes(backend, problem):
    with on(backend, "fused" if backend == "triton" else None):
        return lora_linear_outcomes(problem, ("x", "bias", "lora_A", "lora_B"))


# Eager adds the two halves of dX, whose x is fp32, in fp32, and so do we. With fp32 adapters under autocast eager
# rounds more often than we do.
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_autocast_is_as_right_as_eager_under_autocast(adapter, dropout):
    wanted, outcomes = ("x", "bias", "lora_A", "lora_B"), []
    for problem in draws(8, dropout=dropout):
        problem = dataclasses.replace(
            problem, lora_A=problem.lora_A.to(adapter), lora_B=problem.lora_B.to(adapter), bias=problem.bias
        )
        truth = truth_of(problem, wanted)
        with torch.autocast("cpu", torch.bfloat16):
            got, eager, _ = lora_linear_outcomes(problem, wanted)
        assert got["y"].dtype == torch.bfloat16
        assert [got[f"d{name}"].dtype for name in wanted] == [getattr(problem, name).dtype for name in wanted]
        outcomes.append((got, eager, truth))
    faults = []
    for key in got:
        faults += compare(key, *([outcome[i][key] for outcome in outcomes] for i in range(3))).faults()
    assert not faults, faults


@interpreted
@pytest.mark.parametrize("adapter", [torch.float32, torch.float16])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_autocast_on_the_kernels(strategy, adapter, dropout=0.3):
    wanted, outcomes = ("x", "lora_A", "lora_B"), []
    for problem in draws(4, dropout=dropout):
        problem = dataclasses.replace(problem, lora_A=problem.lora_A.to(adapter), lora_B=problem.lora_B.to(adapter))
        with on("triton", strategy):
            truth = truth_of(problem, wanted)
            with torch.autocast("cpu", torch.float16):
                got, eager, _ = lora_linear_outcomes(problem, wanted)
        assert (got["y"].dtype, got["dx"].dtype, got["dlora_A"].dtype) == (torch.float16, torch.float32, adapter)
        outcomes.append((got, eager, truth))
    faults = []
    for key in got:
        faults += compare(key, *([outcome[i][key] for outcome in outcomes] for i in range(3))).faults()
    assert not faults, faults


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("dtypes", ["fp32", "fp16-fp32"])
def test_on_top_of_a_product_made_elsewhere(dtypes, backend, dropout):
    """`apply_lora` with a residual in place of weight and bias, for quantised base layers."""
    outcomes = []
    for seed, problem in enumerate(draws(4, dtypes=dtypes, dropout=dropout)):
        residual = LAYOUTS["gappy"](torch.randn(ROWS, OUTPUTS).to(problem.x.dtype))
        with torch.random.fork_rng(), on(backend):
            torch.manual_seed(seed)
            keep, p = op_dropout(problem)
            torch.manual_seed(seed)

            def op(x, residual, a, b, problem=problem):
                return apply_lora(x, None, None, residual, a, b, problem.scaling, problem.dropout)

            def reference(x, residual, a, b, problem=problem, keep=keep, p=p):
                z = x.to(a.dtype) if keep is None else x.to(a.dtype) * keep / (1 - p)
                return (residual + z @ a.t() @ b.t() * problem.scaling).to(residual.dtype)

            tensors = (problem.x, residual, problem.lora_A, problem.lora_B)
            outcomes.append([_all(op, tensors, problem.dy), _all(reference, tensors, problem.dy),
                             _all(reference, [t.double() for t in tensors], problem.dy.double())])  # fmt: skip
    faults = []
    for key in outcomes[0][0]:
        faults += compare(key, *([outcome[i][key] for outcome in outcomes] for i in range(3))).faults()
    assert not faults, faults


def _all(function, tensors, dy):
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = function(*leaves)
    return {
        "y": y.detach(),
        **dict(zip(("dx", "dresidual", "da", "db"), torch.autograd.grad(y, leaves, dy), strict=True)),
    }
