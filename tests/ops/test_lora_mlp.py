"""`lora_mlp` is as right as three separate layers in eager torch: every dtype, activation, subset of projections with
LoRA, shape, layout and subset of gradients, by the criterion of `fastpeft.oracle`.

The Triton kernels run in the interpreter, with NaN in all uninitialised memory and 32-bit overflow an error.
"""

import dataclasses
import functools
import itertools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastpeft.dispatch import backend
from fastpeft.ops import lora_linear
from fastpeft.ops.lora_mlp import ACTIVATIONS
from fastpeft.oracle import Bounds
from tests.ops.lora_linear_cases import DTYPES, EXACT_IN_INTERPRETER
from tests.ops.lora_mlp_cases import (
    INPUTS,
    LAYOUTS,
    RANKS,
    SIDES,
    assert_right,
    call,
    draw,
    outcomes,
    results,
    with_layout,
)

pytestmark = pytest.mark.usefixtures("poison", "symmetric_products")
interpreted = pytest.mark.interpreter
BOTH = [pytest.param("torch"), pytest.param("triton", marks=interpreted)]
RECOMPUTE = pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
DROPPING = pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])

# Sums of a few numbers are a few roundings, of which one draw knows little: as many draws as are cheap, and bounds that
# no wrong term passes.
FEW = Bounds(rms=1.5, peak=3.0, row=4.0)
# As in lora_linear_cases, through g, h, S and T one after the other.
TRUNCATED = Bounds(rms=4.0, peak=8.0, row=8.0, gain=0.002 + 5 * 2**-8)
ORDER = Bounds(rms=1.25, peak=2.5, row=2.5)  # alone in fp32 the order of a sum is seen, and there are nine in a row
SMALL = {"shape": (9, 33), "inner": 40, "outputs": 20, "ranks": (3, 5, 4)}


def drawn(name: str, dtypes: str = "fp16-fp32", **options):
    """Some problems for the torch path, fewer for the interpreter."""
    return [draw(dtypes, **SMALL | options, seed=seed) for seed in range(2 if name == "triton" else 8)]


@RECOMPUTE
@DROPPING
@pytest.mark.parametrize("dtypes", DTYPES)
def test_torch_path(dtypes, dropout, recompute):
    with backend("torch"):
        problems = [draw(dtypes, dropout=dropout, recompute=recompute, seed=seed) for seed in range(16)]
        assert_right(problems, ORDER if dtypes == "fp32" else Bounds())


@interpreted
@pytest.mark.usefixtures("overflow_checks")
@DROPPING
@pytest.mark.parametrize("dtypes", EXACT_IN_INTERPRETER)
def test_kernels(dtypes, dropout):
    with backend("triton"):
        problems = [draw(dtypes, dropout=dropout, recompute=not dropout, seed=seed) for seed in range(2)]
        assert_right(problems, ORDER if dtypes == "fp32" else Bounds())


@interpreted
@pytest.mark.parametrize("dtypes", ["bf16", "bf16-fp32"])
def test_kernels_in_bfloat16_to_within_the_interpreters_truncation(dtypes):
    with backend("triton"):
        assert_right([draw(dtypes, dropout=True, seed=seed) for seed in range(2)], TRUNCATED)


@interpreted
def test_kernels_beyond_the_ranks_that_one_of_them_holds():
    """In every mixture of projections inside and outside of the backward kernel."""
    with backend("triton"):
        for ranks in ((33, 3, 40), (4, 34, 3), (3, 4, 33), (0, 33, 34)):
            assert_right([draw("fp16", shape=(9, 33), inner=40, outputs=20, ranks=ranks, dropout=True)], FEW)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", BOTH)
def test_activations(name, activation):
    with backend(name):
        assert_right(drawn(name, activation=activation), FEW)
        if name == "torch":
            assert_right([draw(activation=activation, dropout=True, seed=seed) for seed in range(8)], ORDER)


SUBSETS_OF_LORA = [ranks for ranks in itertools.product(*((0, rank) for rank in (3, 5, 4))) if any(ranks)]


@pytest.mark.parametrize("ranks", SUBSETS_OF_LORA, ids=lambda ranks: "-".join(map(str, ranks)))
@pytest.mark.parametrize("name", BOTH)
def test_every_subset_of_projections_with_lora(name, ranks):
    with backend(name):
        for dropout in (True,) if name == "triton" else (False, True):
            assert_right(drawn(name, ranks=ranks, dropout=dropout), FEW)


def test_dropout_of_some_projections_alone():
    with backend("torch"):
        for dropout in ((0.0, 0.3, 0.0), (0.2, 0.0, 0.0), (0.0, 0.0, 0.4), (0.3, 0.0, 0.2)):
            assert_right(drawn("torch", dropout=dropout), FEW)


SHAPES = {
    "vectors": (33,),
    "one token": (1, 33),
    "whole tiles": (16, 32),
    "one more than a tile": (17, 33),
    "samples": (2, 3, 33),
    "one input": (5, 1),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", BOTH)
def test_shapes(name, shape):
    bounds = Bounds(rms=2.5, peak=5.0, row=10.0) if shape[-1] == 1 else FEW  # a row is one number
    with backend(name):
        assert_right(drawn(name, "fp16", shape=shape, dropout=True), bounds)


def test_one_inner_feature_and_one_output():
    with backend("torch"):
        assert_right(drawn("torch", "fp16", inner=1, outputs=1), Bounds(rms=2.5, peak=5.0, row=10.0))


def test_many_blocks_of_rows():
    """More rows than a block has, and more drawn at once than a block has: with dropout in both sizes of blocks."""
    with backend("torch"):
        problem = draw(shape=(5000, 24), inner=256, outputs=8, dropout=True)
        assert_right([problem], Bounds(rms=1.5, peak=4.0, row=6.0))


def subsets(names):
    return [s for size in range(len(names) + 1) for s in itertools.combinations(names, size)]


# Every subset of x and the six matrices; biases come with a part of them.
MATRICES = tuple(f"{side}.{field}" for side in SIDES for field in ("lora_A", "lora_B"))
SUBSETS = [
    (*wanted, *(("gate.bias", "down.bias") * (i % 3 == 0))) for i, wanted in enumerate(subsets(("x", *MATRICES)))
]


def test_every_subset_of_gradients_on_torch():
    with backend("torch"):
        for i, wanted in enumerate(SUBSETS):
            problem = draw(**SMALL, recompute=i % 2 == 0, dropout=i % 5 == 0)
            got, eager, _ = outcomes(problem, wanted)
            assert got.keys() == {"y", *(f"d{name}" for name in wanted)}
            for key in got:
                torch.testing.assert_close(got[key], eager[key], rtol=2e-5, atol=2e-5)


LAID_OUT = [(name, layout) for name in ("x", "dy", "gate.weight", "down.weight", "up.lora_A", "down.lora_B")
            for layout in LAYOUTS if name in ("x", "dy") or layout != "one row"]  # fmt: skip


@pytest.mark.parametrize(("tensor", "layout"), LAID_OUT)
@pytest.mark.parametrize("name", BOTH)
def test_layouts(name, tensor, layout):
    problems = [with_layout(problem, tensor, layout) for problem in drawn(name, dropout=True)]
    with backend(name):
        if name == "torch":
            assert_right(problems, FEW)
        else:  # bounds for one draw: what lies elsewhere is NaN
            assert_right(problems[:1], Bounds(rms=2.2, peak=4.0, row=8.0))


def layers(problem, leaves):
    """Three separate calls of `lora_linear`."""
    x, *projections = problem.with_leaves(leaves)
    gate, up = (lora_linear(x, *each[:5], dropout=each.dropout, training=True) for each in projections[:2])
    down = projections[2]
    return lora_linear(torch.nn.functional.silu(gate) * up, *down[:5], dropout=down.dropout, training=True)


@DROPPING
@RECOMPUTE
def test_equal_to_three_layers_under_the_same_seed(dropout, recompute):
    """With dropout too: the masks are the same, drawn in the same order."""
    problem = draw(shape=(3000, 40), inner=512, outputs=24, dropout=dropout, recompute=recompute)
    with backend("torch"):
        found = []
        for function in (layers, call):
            torch.manual_seed(3)
            found.append(results(functools.partial(function, problem), problem, problem.tensors))
            found[-1]["next draw"] = torch.rand(1)
    for key, expected in found[0].items():
        torch.testing.assert_close(found[1][key], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", BOTH)
def test_dropout_needs_training_and_checkpointing_draws_the_same_masks(name):
    problem = draw(**SMALL, dropout=True)
    leaves = problem.leaves()
    with backend(name):
        silent = call(problem, leaves, training=False)
        assert torch.equal(silent, call(draw(**SMALL), leaves))
        gradients = []
        for run in (call, lambda *given: checkpoint(call, *given, use_reentrant=False)):
            torch.manual_seed(5)
            y = run(problem, leaves)
            gradients.append(torch.autograd.grad(y, list(leaves.values()), problem.dy))
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@DROPPING
def test_gradcheck(dropout, activation):
    sizes = {"shape": (3, 4), "inner": 5, "outputs": 3, "ranks": (1, 2, 2)}
    problem = draw(**sizes, dropout=dropout, activation=activation, recompute=dropout)
    leaves = problem.leaves(dtype=torch.float64)

    def op(*given):
        torch.manual_seed(1)
        return call(problem, dict(zip(leaves, given, strict=True)))

    assert torch.autograd.gradcheck(op, tuple(leaves.values()))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", BOTH)
def test_large_gates(name, activation):
    """Where an exponential or a cube overflows, or an act' is 0: what eager has finite is finite."""
    problem = draw(**SMALL, activation=activation)
    gate = problem.projections[0]
    bias = torch.tensor([-1e30, -1e4, -100.0, -30.0, 0.0, 30.0, 100.0, 1e4]).repeat(5)
    problem = dataclasses.replace(problem, projections=(gate._replace(bias=bias), *problem.projections[1:]))
    with backend(name):
        got, eager, _ = outcomes(problem)
    assert got["y"].isfinite().any()
    for key in got:
        finite = eager[key].isfinite()
        assert torch.equal(got[key].isfinite(), finite), key
        width = eager[key].abs().where(finite, 0.0).amax(-1, keepdim=True)
        assert ((got[key] - eager[key]).abs() <= 1e-5 * width)[finite].all(), key


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("tensor", ["x", "dy", "gate.lora_A", "down.lora_B"])
@pytest.mark.parametrize("name", BOTH)
def test_what_is_not_finite_shows_where_eager_shows_it(name, tensor, value):
    problem = draw(**SMALL)
    if tensor == "dy":
        problem.dy.view(-1)[7] = value
    else:
        problem.tensors[tensor].view(-1)[7] = value
    with backend(name):
        got, eager, _ = outcomes(problem)
    for key in got:
        assert torch.equal(got[key].isfinite(), eager[key].isfinite()), key
    assert any(not each.isfinite().all() for each in got.values())


@pytest.mark.parametrize("adapter", ["fp32", "bf16"])
@DROPPING
def test_autocast(dropout, adapter):
    """fp32 x under bf16 autocast, as three layers: result in bf16, gradients in the leaves' dtypes."""
    for seed in range(4):
        problem = draw(adapter, dropout=dropout, seed=seed, recompute=seed % 2 == 0)
        problem = dataclasses.replace(problem, x=problem.x.float())
        problem = dataclasses.replace(problem, projections=tuple(
            each._replace(weight=each.weight.float()) for each in problem.projections
        ))  # fmt: skip
        with torch.autocast("cpu", torch.bfloat16):
            found = []
            for function in (layers, call):
                torch.manual_seed(3)
                found.append(results(functools.partial(function, problem), problem, problem.tensors))
        for key, expected in found[0].items():
            assert found[1][key].dtype == expected.dtype, key
            scale = float(expected.float().abs().max())
            torch.testing.assert_close(found[1][key].float(), expected.float(), rtol=0.0, atol=0.03 * scale)


@pytest.mark.parametrize("name", BOTH)
def test_adapters_of_different_dtypes_keep_their_own_gradients(name):
    problem = draw("fp16-fp32", **SMALL)
    gate = problem.projections[0]
    gate = gate._replace(lora_A=gate.lora_A.half(), lora_B=gate.lora_B.half())
    problem = dataclasses.replace(problem, projections=(gate, *problem.projections[1:]))
    with backend(name):
        found = results(lambda leaves: call(problem, leaves), problem, MATRICES)
    kinds = [found[f"d{each}"].dtype for each in MATRICES]
    assert kinds == [torch.float16] * 2 + [torch.float32] * 4


@pytest.mark.parametrize("name", BOTH)
def test_no_rows(name):
    problem = draw(**SMALL | {"shape": (0, 33)}, dropout=True)
    with backend(name):
        found = results(lambda leaves: call(problem, leaves), problem, problem.tensors)
    assert found["y"].shape == (0, 20)
    for key, gradient in found.items():
        assert not gradient.any(), key


def test_beyond_the_kernels_ranks_it_is_torch():
    with backend("auto"):
        assert_right(drawn("torch", "bf16", ranks=(300, 4, 4)), FEW)


def test_problems_are_what_they_say():
    """So that a draw that lost its point is seen."""
    problem = draw()
    assert len({len(each.lora_A) for each in problem.projections}) == 3 and min(RANKS) > 2
    assert INPUTS > 32 and len(problem.tensors) == 10 and len(SUBSETS) == 128
