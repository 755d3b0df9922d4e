"""`mixed_lora_linear` is as right as eager torch, sample by sample: every dtype, mixture, shape, layout and subset of
gradients, by the criterion of `fastpeft.oracle`.

The Triton kernels run in the interpreter, with NaN in all uninitialised memory and 32-bit overflow an error.
"""

import dataclasses
import itertools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastpeft.dispatch import backend
from fastpeft.ops import lora_linear, mixed_lora_linear
from fastpeft.ops.mixed_lora_linear import mixed_dropout_mask
from fastpeft.oracle import Bounds
from tests.ops.lora_linear_cases import DTYPES, EXACT_IN_INTERPRETER, TRUNCATED
from tests.ops.mixed_lora_linear_cases import (
    INPUTS,
    LAYOUTS,
    OUTPUTS,
    ROWS,
    TOKENS,
    assert_right,
    call,
    draw,
    outcomes,
    results,
    with_layout,
)
from tests.ops.test_lora_linear_dropout import independent_mask

pytestmark = pytest.mark.usefixtures("poison", "symmetric_products")
interpreted = pytest.mark.interpreter
BOTH = [pytest.param("torch"), pytest.param("triton", marks=interpreted)]
BASES = pytest.mark.parametrize("base", [True, False], ids=["base", "residual"])
DROPPING = pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])


@BASES
@DROPPING
@pytest.mark.parametrize("dtypes", DTYPES)
def test_torch_path(dtypes, dropout, base):
    with backend("torch"):
        assert_right([draw(dtypes, dropout=dropout, base=base, seed=seed) for seed in range(8)])


@interpreted
@pytest.mark.usefixtures("overflow_checks")
@BASES
@DROPPING
@pytest.mark.parametrize("dtypes", EXACT_IN_INTERPRETER)
def test_kernels(dtypes, dropout, base):
    with backend("triton"):
        assert_right([draw(dtypes, dropout=dropout, base=base, seed=seed) for seed in range(2)])


@interpreted
@pytest.mark.parametrize("dtypes", ["bf16", "bf16-fp32"])
def test_kernels_in_bfloat16_to_within_the_interpreters_truncation(dtypes):
    with backend("triton"):
        assert_right([draw(dtypes, dropout=True, seed=seed) for seed in range(2)], TRUNCATED)


MIXTURES = {  # ranks, rows
    "one adapter": ((5,), (0, 0, 0)),
    "one adapter and none": ((5,), (-1, 0, -1)),
    "alternating": ((4, 8), (0, 1, 0, 1, 0)),
    "backwards": ((3, 5, 7), (2, 1, 0)),
    "none between": ((3, 5), (0, -1, -1, 1)),
    "one sample": ((3, 5), (1,)),
    "an adapter that no sample has": ((3, 16, 2), (2, 0, -1)),
    "rank 1 beside 33": ((33, 1), (1, 0, 1)),
    "many": ((1, 2, 3, 4, 5, 6, 7, 8), tuple(range(7, -1, -1))),
}


# Sums of a few numbers are a few roundings, of which one draw knows little: on one and the other backend as many draws
# as are cheap, and bounds that no wrong term passes.
FEW = Bounds(rms=1.5, peak=3.0, row=4.0)
SMALL = {"shape": (5, 33), "outputs": 40}


def drawn(name: str, dtypes: str = "fp16-fp32", **options):
    """Some problems for the torch path, fewer for the interpreter."""
    return [draw(dtypes, **SMALL | options, seed=seed) for seed in range(3 if name == "triton" else 8)]


@pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES)
@pytest.mark.parametrize("name", BOTH)
def test_mixtures(name, mixture):
    ranks, rows = mixture
    with backend(name):
        assert_right(drawn(name, ranks=ranks, rows=rows, dropout=True), FEW)


SHAPES = {
    "vectors": (69,),
    "one token": (1, 33),
    "whole tiles": (16, 32),
    "one more than a tile": (17, 33),
    "images": (2, 3, 69),
    "one input": (5, 1),
}


@pytest.mark.parametrize("outputs", [1, 40])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", BOTH)
def test_shapes(name, shape, outputs):
    """In half precision, whose fp32 sums round once: alone in fp32 the order of a sum is seen."""
    bounds = Bounds(rms=2.5, peak=5.0, row=10.0) if outputs == 1 or shape[-1] == 1 else FEW  # a row is one number
    with backend(name):
        assert_right(drawn(name, "fp16", shape=shape, outputs=outputs), bounds)


@interpreted
def test_many_runs_of_rows_and_of_columns():
    """A reduction over rows, and one over the columns of few rows, are split among programs."""
    with backend("triton"):
        assert_right([draw("fp16-fp32", shape=(40, 33), outputs=33, rows=(0, 1, 0, -1), dropout=True)])
        assert_right([draw("fp16-fp32", shape=(1, 201), outputs=203, rows=(0, 0, 1), dropout=True)])


def subsets(names):
    return [s for size in range(len(names) + 1) for s in itertools.combinations(names, size)]


# What is wanted of bias and weight is none of the kernels' business.
SUBSETS = [("torch", wanted) for wanted in subsets(("x", "bias", "A", "B", "weight"))]
SUBSETS += [pytest.param("triton", wanted, marks=interpreted) for wanted in subsets(("x", "A", "B"))]


@pytest.mark.parametrize(("name", "wanted"), SUBSETS, ids=lambda of: of if isinstance(of, str) else "-".join(of) or "-")
def test_every_subset_of_gradients(name, wanted):
    wanted = [f"{each}{i}" if each in "AB" else each for each in wanted for i in ((0, 1) if each in "AB" else (0,))]
    with backend(name):
        assert_right(drawn(name, shape=(3, 33), rows=(1, 0, -1)), FEW, wanted)


@pytest.mark.parametrize("wanted", [("A0",), ("B1",), ("A1", "B0"), ("residual", "x")], ids="-".join)
@pytest.mark.parametrize("name", BOTH)
def test_gradients_of_some_adapters(name, wanted):
    with backend(name):
        base = "residual" not in wanted
        assert_right(drawn(name, dropout=True, base=base), FEW, wanted)


LAID_OUT = [(name, layout) for name in ("x", "weight", "lora_A", "lora_B", "dy") for layout in LAYOUTS]
LAID_OUT = [each for each in LAID_OUT if each[0] in ("x", "dy") or each[1] in ("transposed", "gappy")]


@pytest.mark.parametrize(("tensor", "layout"), LAID_OUT)
@pytest.mark.parametrize("name", BOTH)
def test_layouts(name, tensor, layout):
    problems = [with_layout(problem, tensor, layout) for problem in drawn(name, dropout=True)]
    with backend(name):
        if name == "torch":
            assert_right(problems, FEW)
        else:  # bounds for one draw: what lies elsewhere is NaN
            assert_right(problems[:1], Bounds(rms=2.2, peak=4.0, row=8.0))


@pytest.mark.parametrize("name", BOTH)
def test_a_residual_of_any_layout_is_left_alone(name):
    problem = with_layout(draw(base=False), "residual", "gappy")
    before = problem.residual.clone()
    with backend(name):
        adapters = list(zip(problem.lora_A, problem.lora_B, problem.scalings, (0.0, 0.0), strict=True))
        from fastpeft.ops.mixed_lora_linear import apply_mixed_lora

        y = apply_mixed_lora(problem.x, None, None, problem.residual, adapters, problem.rows)
        assert torch.equal(problem.residual, before)
        assert torch.equal(y[3], before[3]) and not torch.equal(y[0], before[0])


@pytest.mark.parametrize("rows", [(-1, -1, -1), ()], ids=["all without", "no samples"])
@pytest.mark.parametrize("name", BOTH)
def test_nothing_to_add(name, rows):
    problem = draw("fp16-fp32", rows=rows, dropout=True)
    leaves = problem.leaves()
    with backend(name):
        y = call(problem, leaves)
        dx, dbias, da = torch.autograd.grad(y, [leaves[n] for n in ("x", "bias", "A0")], problem.dy, allow_unused=True)
    expected = torch.nn.functional.linear(problem.x, problem.weight, problem.bias)
    assert torch.equal(y, expected) and dx.shape == problem.x.shape and dbias.shape == problem.bias.shape
    assert da is None


@pytest.mark.parametrize("name", BOTH)
def test_samples_without_rows(name):
    problem = draw(shape=(0, INPUTS), dropout=True)
    with backend(name):
        found = results(lambda leaves: call(problem, leaves), problem, list(problem.leaves()))
    assert found["y"].shape == (len(ROWS), 0, OUTPUTS)
    for key, gradient in found.items():
        assert not gradient.any(), key


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("tensor", ["x", "dy", "lora_A", "lora_B"])
@pytest.mark.parametrize("name", BOTH)
def test_what_is_not_finite_stays_with_its_adapter(name, tensor, value):
    problem = draw(shape=(5, 33), outputs=40)
    given = getattr(problem, tensor)
    changed = (given[0] if tensor in ("lora_A", "lora_B") else given).clone()
    (changed if tensor in ("lora_A", "lora_B") else changed[0]).view(-1)[7] = value
    changed = (changed, *given[1:]) if tensor in ("lora_A", "lora_B") else changed
    with backend(name):
        got, eager, _ = outcomes(dataclasses.replace(problem, **{tensor: changed}))
    for key in got:
        assert torch.equal(got[key].isfinite(), eager[key].isfinite()), key
    assert got["dA1"].isfinite().all() and got["dB1"].isfinite().all()
    assert got["y"][1:4].isfinite().all() and got["dx"][1:4].isfinite().all()  # the other adapter's samples
    assert sum(not t.isfinite().all() for t in got.values()) >= 1


@DROPPING
def test_equal_to_a_loop_of_lora_linear(dropout):
    """Sample by sample without dropout; with it adapter by adapter, for which the torch path draws the same masks."""
    problem = draw(dropout=dropout)
    groups = [[b for b, g in enumerate(problem.rows) if g == each] for each in (0, 1)]
    groups = groups if dropout else [[b] for group in groups for b in group]

    def loop(leaves):
        y = [torch.nn.functional.linear(x, leaves["weight"], leaves["bias"]) for x in leaves["x"]]
        for group in groups:
            g = problem.rows[group[0]]
            a, b, p = leaves[f"A{g}"], leaves[f"B{g}"], problem.dropouts[g] if dropout else 0.0
            own = lora_linear(
                leaves["x"][group],
                leaves["weight"],
                leaves["bias"],
                a,
                b,
                problem.scalings[g],
                dropout=p,
                training=True,
            )
            for place, each in zip(group, own, strict=True):
                y[place] = each
        return torch.stack(y)

    with backend("torch"):
        found = []
        for function in (loop, lambda leaves: call(problem, leaves)):
            torch.manual_seed(3)
            found.append(results(function, problem, list(problem.leaves())))
    for key, expected in found[0].items():
        torch.testing.assert_close(found[1][key], expected)


@interpreted
def test_the_kernels_give_one_adapter_of_all_samples_what_lora_linear_gives():
    problem = draw("fp16-fp32", rows=(0, 0, 0), ranks=(5,), dropout=True)
    given = (problem.lora_A[0], problem.lora_B[0], problem.scalings[0])
    with backend("triton"):
        torch.manual_seed(3)
        mixed = call(problem, problem.leaves())
        torch.manual_seed(3)
        plain = lora_linear(problem.x, problem.weight, problem.bias, *given, dropout=0.3, training=True)
    torch.testing.assert_close(mixed, plain, rtol=2e-3, atol=2e-3)


@interpreted
def test_the_kernels_mask_is_philox_of_the_sorted_rows():
    rows, p, shape = (0, 1, 1, -1, 0), (0.3, 0.6), (5 * 7, 40)
    mask = mixed_dropout_mask(torch.tensor([99]), rows, p, shape, "cpu", "triton").view(5, 7, 40)
    assert mask[3].all()
    for samples, rate, first in (((0, 4), 0.3, 0), ((1, 2), 0.6, 14)):
        own = mask[list(samples)].view(14, 40)
        assert torch.equal(own, independent_mask(99, rate, 14, 40, first))


@pytest.mark.parametrize("name", BOTH)
def test_each_adapter_has_its_own_rate_of_dropout(name):
    tokens = 64 if name == "triton" else 4000
    x, eye = torch.ones(3, tokens, 32), torch.eye(32)
    with backend(name):
        y = mixed_lora_linear(
            x, torch.zeros(32, 32), None, [eye, eye], [eye, eye], [1.0, 1.0], [0, 1, -1],
            dropouts=[0.3, 0.0], training=True,
        )  # fmt: skip
    assert not y[2].any() and torch.equal(y[1], x[1])
    kept = y[0] > 0
    torch.testing.assert_close(y[0][kept], torch.full_like(y[0][kept], 1 / 0.7), rtol=2e-5, atol=0.0)
    assert abs((~kept).double().mean() - 0.3) < 5 * (0.21 / kept.numel()) ** 0.5


@pytest.mark.parametrize("name", BOTH)
def test_dropout_needs_training_and_checkpointing_draws_the_same_masks(name):
    problem = draw(shape=(5, 33), outputs=40, dropout=True)
    leaves = problem.leaves()
    with backend(name):
        silent = mixed_lora_linear(
            problem.x, problem.weight, problem.bias, problem.lora_A, problem.lora_B, problem.scalings, problem.rows,
            dropouts=problem.dropouts,
        )  # fmt: skip
        assert torch.equal(silent, call(dataclasses.replace(problem, dropouts=None), leaves))
        gradients = []
        for run in (call, lambda *given: checkpoint(call, *given, use_reentrant=False)):
            torch.manual_seed(5)
            y = run(problem, leaves)
            gradients.append(torch.autograd.grad(y, list(leaves.values()), problem.dy))
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


@DROPPING
def test_gradcheck(dropout):
    problem = draw(shape=(2, 5), outputs=4, ranks=(1, 3), rows=(1, 0, -1, 1), dropout=dropout)
    leaves = problem.leaves(torch.float64)

    def op(*given):
        torch.manual_seed(1)
        return call(problem, dict(zip(leaves, given, strict=True)))

    assert torch.autograd.gradcheck(op, tuple(leaves.values()))


@pytest.mark.parametrize("adapter", ["fp32", "bf16"])
@DROPPING
def test_autocast(dropout, adapter):
    """fp32 x under bf16 autocast, as in lora_linear: result in bf16, gradients in the leaves' dtypes."""
    problems = [draw("fp32" if adapter == "fp32" else "bf16", dropout=dropout, seed=seed) for seed in range(4)]
    with torch.autocast("cpu", torch.bfloat16):
        for problem in problems:
            problem = dataclasses.replace(problem, x=problem.x.float())
            got, eager, _ = outcomes(problem)
            assert got["y"].dtype == torch.bfloat16 and got["dx"].dtype == torch.float32
            for key in got:
                assert got[key].dtype == eager[key].dtype or key == "y"
                scale = float(eager[key].float().abs().max())
                torch.testing.assert_close(got[key].float(), eager[key].float(), rtol=0.0, atol=0.03 * scale)


@pytest.mark.parametrize("name", BOTH)
def test_adapters_of_different_dtypes_keep_their_own_gradients(name):
    problem = draw("fp16-fp32", shape=(5, 33), outputs=40)
    a, b = problem.lora_A, problem.lora_B
    problem = dataclasses.replace(problem, lora_A=(a[0].half(), a[1]), lora_B=(b[0].half(), b[1]))
    with backend(name):
        found = results(lambda leaves: call(problem, leaves), problem, ["A0", "B0", "A1", "B1"])
    assert [found[key].dtype for key in ("dA0", "dB0", "dA1", "dB1")] == [torch.float16] * 2 + [torch.float32] * 2


def test_beyond_the_kernels_ranks_it_is_torch():
    with backend("auto"):
        assert_right(drawn("torch", "bf16", ranks=(300, 4)), FEW)


def test_problems_are_what_they_say():
    """So that a draw that lost its point is seen: samples apart and together, more rows than a tile."""
    assert ROWS.count(0) * TOKENS > 32 and ROWS.count(-1) == 1 and ROWS[0] == ROWS[4] == 0 != ROWS[1]
