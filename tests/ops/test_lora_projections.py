"""`lora_projections` is as right as eager torch, layer by layer: every dtype, number of projections, shape, layout and
subset of gradients and of results in use, by the criterion of `fastpeft.oracle`.

The Triton kernels run in the interpreter, with NaN in all uninitialised memory and 32-bit overflow an error.
"""

import dataclasses
import itertools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastpeft.dispatch import Plan, backend, override_plan
from fastpeft.ops import lora_linear, lora_projections
from fastpeft.oracle import Bounds
from tests.ops.lora_linear_cases import DTYPES, EXACT_IN_INTERPRETER, TRUNCATED
from tests.ops.lora_projections_cases import (
    KINDS,
    LAYOUTS,
    OUTPUTS,
    RANKS,
    assert_as_single_layers,
    assert_right,
    call,
    draw,
    masks_of,
    of_kind,
    outcomes,
    reference,
    results,
    with_layout,
)

pytestmark = pytest.mark.usefixtures("poison", "symmetric_products")
interpreted = pytest.mark.interpreter
BOTH = [pytest.param("torch"), pytest.param("triton", marks=interpreted)]
EXACT = Bounds()
# Sums of a few numbers are a few roundings, of which one draw knows little: on one and the other backend as many draws
# as are cheap, and bounds that no wrong term passes.
FEW = Bounds(rms=1.5, peak=3.0, row=6.0)
ONE = Bounds(rms=2.2, peak=4.0, row=8.0)  # of one draw
BOUNDS = {"torch": FEW, "triton": ONE}
MASKED = pytest.mark.parametrize(  # the interpreter, which is slow, with masks alone
    ("name", "dropout"),
    [("torch", False), ("torch", True), pytest.param("triton", True, marks=interpreted)],
    ids=["torch", "torch-dropout", "triton-dropout"],
)
DROPPING = pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])


@DROPPING
@pytest.mark.parametrize("dtypes", DTYPES)
def test_torch_path(dtypes, dropout):
    """In fp32 without dropout A is one matrix for BLAS, whose order of a sum goes by its size."""
    with backend("torch"):
        assert_right(
            [draw(dtypes, dropout=dropout, seed=seed) for seed in range(16)], FEW if dtypes == "fp32" else EXACT
        )


@interpreted
@pytest.mark.usefixtures("overflow_checks")
@pytest.mark.parametrize(("dtypes", "dropout"), zip(EXACT_IN_INTERPRETER, (True, False, True), strict=True))
def test_kernels(dtypes, dropout):
    with backend("triton"):
        assert_right([draw(dtypes, dropout=dropout, seed=3)], ONE)


@interpreted
@pytest.mark.parametrize("dtypes", ["bf16", "bf16-fp32"])
def test_kernels_in_bfloat16_to_within_the_interpreters_truncation(dtypes):
    with backend("triton"):
        assert_right([draw(dtypes, dropout=True)], TRUNCATED)


SMALL = {"shape": (15, 33), "outputs": (40, 33, 37), "ranks": (4, 7, 3)}


def drawn(name: str, dtypes: str = "fp16-fp32", **options):
    """Some problems for the torch path, fewer for the interpreter."""
    return [draw(dtypes, **SMALL | options, seed=seed) for seed in range(1 if name == "triton" else 8)]


NUMBERS = {
    "1": (5,),
    "2": (4, 8),
    "4": (1, 2, 3, 4),
    "5": (3, 5, 7, 2, 1),
    "6": (4, 4, 4, 4, 4, 4),
    "wide beside narrow": (1, 33),
    "beyond the tail's registers": (40, 3, 20),
}


@pytest.mark.parametrize("ranks", NUMBERS.values(), ids=NUMBERS)
@MASKED
def test_any_number_of_projections(name, ranks, dropout):
    with backend(name):
        assert_right(drawn(name, ranks=ranks, dropout=dropout), BOUNDS[name])


SHAPES = {
    "one row": (1, 33),
    "whole tiles": (16, 32),
    "one more than a tile": (17, 33),
    "images": (2, 3, 5, 33),
    "one input": (15, 1),
}


@pytest.mark.parametrize("outputs", [(1,), (40, 1, 33)], ids=["1", "40"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", BOTH)
def test_shapes(name, shape, outputs):
    """In half precision, whose fp32 sums round once: alone in fp32 the order of a sum is seen."""
    bounds = Bounds(rms=2.5, peak=5.0, row=12.0)  # a row is one number
    with backend(name):
        assert_right(drawn(name, "fp16", shape=shape, outputs=outputs), bounds)


@pytest.mark.parametrize("name", BOTH)
def test_a_vector(name):
    problems = drawn(name, "fp16", shape=(69,))
    with backend(name):
        assert_right(problems, BOUNDS[name])
        assert [y.shape for y in call(problems[0], problems[0].leaves())] == [(40,), (33,), (37,)]


@interpreted
def test_many_runs_of_rows_and_of_columns():
    """A reduction over rows, and one over the columns of few rows, are split among programs."""
    with backend("triton"):
        assert_right([draw("fp16-fp32", shape=(70, 33), outputs=(33,), dropout=True)], FEW)
        assert_right([draw("fp16-fp32", shape=(2, 201), outputs=(33,), dropout=True)], FEW)


def subsets(names):
    return [s for size in range(len(names) + 1) for s in itertools.combinations(names, size)]


# What is wanted of weights is none of the kernels' business.
SUBSETS = [("torch", wanted) for wanted in subsets(("x", *KINDS))]
SUBSETS += [pytest.param("triton", wanted, marks=interpreted) for wanted in (("bias",), *subsets(("x", "A", "B")))]


@pytest.mark.parametrize(("name", "wanted"), SUBSETS, ids=lambda of: of if isinstance(of, str) else "-".join(of) or "-")
def test_every_subset_of_gradients(name, wanted):
    wanted = [each for kind in wanted for each in ([kind] if kind == "x" else [f"{kind}{i}" for i in range(3)])]
    with backend(name):
        assert_right(drawn(name, shape=(9, 33), outputs=(33, 20)), BOUNDS[name], wanted)


SOME = [("A0",), ("B1",), ("A1", "B0"), ("bias2", "x"), ("x", "A0", "A2", "weight1"), ("A2", "B1", "bias0")]


@pytest.mark.parametrize("wanted", SOME, ids="-".join)
@MASKED
def test_gradients_of_some_projections(name, wanted, dropout):
    with backend(name):
        assert_right(drawn(name, dropout=dropout), BOUNDS[name], wanted)


@pytest.mark.parametrize("unused", [(0,), (1,), (0, 2), (1, 2)], ids=str)
@MASKED
def test_results_that_nothing_uses(name, unused, dropout):
    """Their own gradients are None, and not zeros."""
    problems = drawn(name, dropout=dropout, unused=unused)
    with backend(name):
        assert_right(problems, BOUNDS[name])
        leaves = problems[0].leaves()
        ys = call(problems[0], leaves)
        used = [i for i in range(3) if i not in unused]
        torch.autograd.backward([ys[i] for i in used], [problems[0].dy[i] for i in used])
    gone = {f"{kind}{i}" for kind in KINDS for i in unused}
    assert {key for key, leaf in leaves.items() if leaf.grad is None} == gone & leaves.keys()


LAID_OUT = [(name, layout) for name in ("x", "dy", "weight", "A", "B") for layout in LAYOUTS]
LAID_OUT = [each for each in LAID_OUT if each[0] in ("x", "dy") or each[1] == "gappy"]


@pytest.mark.parametrize(("tensor", "layout"), LAID_OUT)
@pytest.mark.parametrize("name", BOTH)
def test_layouts(name, tensor, layout):
    """What lies elsewhere is NaN."""
    problems = [with_layout(problem, tensor, layout) for problem in drawn(name, dropout=True)]
    with backend(name):
        assert_right(problems, BOUNDS[name])


@interpreted
@pytest.mark.parametrize(("plan", "dropout"), [("fused", True), ("fused", False), ("addmm", True), ("augment", False)])
def test_every_plan(plan, dropout):
    with backend("triton"), override_plan(Plan(plan, plan, "forced by a test")):
        assert_right(drawn("triton", "fp16", dropout=dropout), ONE)


@pytest.mark.parametrize("name", BOTH)
def test_no_rows(name):
    problem = draw(shape=(2, 0, 33), dropout=True)
    with backend(name):
        found = results(lambda leaves: call(problem, leaves), problem, list(problem.leaves()))
    assert [found[f"y{i}"].shape for i in range(3)] == [(2, 0, n) for n in OUTPUTS]
    for key, gradient in found.items():
        assert not gradient.any(), key


@DROPPING
@pytest.mark.parametrize("dtypes", ["fp32", "fp16-fp32", "bf16"])
def test_equal_to_single_layers_under_the_same_seed(dtypes, dropout):
    """On the torch path with the very masks that lone layers draw one after the other."""
    problem = draw(dtypes, dropout=dropout)

    def alone(leaves):
        lists = (of_kind(leaves, kind, 3) for kind in KINDS)
        each = zip(*lists, problem.scalings, problem.dropouts or [0.0] * 3, strict=True)
        return [
            lora_linear(leaves["x"], *tensors, scaling, dropout=p, training=True) for *tensors, scaling, p in each
        ]  # fmt: skip

    assert_as_single_layers(problem, alone)


@pytest.mark.parametrize("name", BOTH)
def test_masks_are_independent_and_have_their_own_rates(name):
    tokens = 64 if name == "triton" else 2000
    x, eye = torch.ones(tokens, 32), torch.eye(32)
    rates = (0.5, 0.5, 0.0, 0.25)
    with backend(name):
        ys = lora_projections(
            x, [torch.zeros(32, 32)] * 4, None, [eye] * 4, [eye] * 4, [1.0] * 4, dropouts=rates, training=True
        )
    assert torch.equal(ys[2], x)
    kept = [y > 0 for y in ys]
    for y, keep, p in zip(ys, kept, rates, strict=True):
        torch.testing.assert_close(y[keep], torch.full_like(y[keep], 1 / (1 - p)), rtol=2e-5, atol=0.0)
        assert abs((~keep).double().mean() - p) <= 5 * (p * (1 - p) / keep.numel()) ** 0.5
    for first, second in ((0, 1), (0, 3), (1, 3)):
        both = (~kept[first] & ~kept[second]).double().mean()
        p = rates[first] * rates[second]
        assert abs(both - p) <= 5 * (p * (1 - p) / x.numel()) ** 0.5


@interpreted
def test_the_kernels_mask_is_that_of_single_layers_with_its_seed():
    """`masks_of` asks the op of single layers; here what the op itself drops, by a projection that copies x."""
    problem = draw(shape=(40, 32), outputs=(32,), ranks=(32, 32, 32), dropout=True)
    eye = (torch.eye(32),) * 3
    problem = dataclasses.replace(problem, x=torch.ones(40, 32), weight=(torch.zeros(32, 32),) * 3, A=eye, B=eye)
    problem = dataclasses.replace(problem, bias=(None,) * 3)
    with backend("triton"):
        torch.manual_seed(1)
        ys = call(problem, problem.leaves())
        torch.manual_seed(1)
        keeps, _ = masks_of(problem)
    assert keeps[1] is None and ys[1].all()
    assert torch.equal(ys[0] != 0, keeps[0]) and torch.equal(ys[2] != 0, keeps[2])


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("name", BOTH)
def test_dropout_needs_training_and_checkpointing_draws_the_same_masks(name, reentrant):
    problem = draw(**SMALL, dropout=True)
    leaves = problem.leaves()

    def segment(x):
        return tuple(call(problem, leaves | {"x": x}))

    with backend(name):
        lists = (of_kind(leaves, kind, 3) for kind in KINDS)
        silent = lora_projections(leaves["x"], *lists, problem.scalings, dropouts=problem.dropouts)
        without = call(dataclasses.replace(problem, dropouts=None), leaves)
        assert all(map(torch.equal, silent, without))
        gradients = []
        for run in (segment, lambda x: checkpoint(segment, x, use_reentrant=reentrant)):
            torch.manual_seed(5)
            torch.autograd.backward(run(leaves["x"]), problem.dy)
            gradients.append([leaf.grad for leaf in leaves.values()])
            for leaf in leaves.values():
                leaf.grad = None
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


@DROPPING
def test_gradcheck(dropout):
    problem = draw(shape=(4, 5), outputs=(4, 3, 2), ranks=(1, 3, 2), dropout=dropout)
    leaves = problem.leaves(torch.float64)

    def op(*given):
        torch.manual_seed(1)
        return tuple(call(problem, dict(zip(leaves, given, strict=True))))

    assert torch.autograd.gradcheck(op, tuple(leaves.values()))


@pytest.mark.parametrize("adapter", ["fp32", "bf16"])
@DROPPING
def test_autocast(dropout, adapter):
    """fp32 x under bf16 autocast, as in lora_linear: results in bf16, gradients in the leaves' dtypes."""
    problems = [draw("fp32" if adapter == "fp32" else "bf16", dropout=dropout, seed=seed) for seed in range(4)]
    with torch.autocast("cpu", torch.bfloat16):
        for problem in problems:
            problem = dataclasses.replace(problem, x=problem.x.float())
            got, eager, _ = outcomes(problem)
            assert got["y1"].dtype == torch.bfloat16 and got["dx"].dtype == torch.float32
            for key in got:
                assert got[key].dtype == eager[key].dtype or key[0] == "y"
                scale = float(eager[key].float().abs().max())
                torch.testing.assert_close(got[key].float(), eager[key].float(), rtol=0.0, atol=0.03 * scale)


@interpreted
@DROPPING
def test_autocast_on_the_kernels(dropout):
    """dX in fp32, to which the base products are added in that type."""
    problem = draw("fp32", **SMALL, dropout=dropout)
    with torch.autocast("cpu", torch.float16), backend("triton"):
        got, eager, _ = outcomes(problem)
    assert got["y0"].dtype == torch.float16 and got["dx"].dtype == torch.float32
    for key in got:
        scale = float(eager[key].float().abs().max())
        torch.testing.assert_close(got[key].float(), eager[key].float(), rtol=0.0, atol=0.006 * scale)


@pytest.mark.parametrize("name", BOTH)
def test_adapters_of_different_dtypes_keep_their_own_gradients(name):
    """The op itself is that of the widest."""
    problem = draw("fp16-fp32", **SMALL)
    a, b = problem.A[0].half(), problem.B[2].half()
    narrow = dataclasses.replace(problem, A=(a, *problem.A[1:]), B=(*problem.B[:2], b))
    wide = dataclasses.replace(problem, A=(a.float(), *problem.A[1:]), B=(*problem.B[:2], b.float()))
    with backend(name):
        found, expected = (
            results(lambda leaves, of=of: call(of, leaves), of, list(of.leaves())) for of in (narrow, wide)
        )  # fmt: skip
    assert all(torch.equal(each, expected[key].to(each.dtype)) for key, each in found.items())
    assert [found[f"dA{i}"].dtype for i in range(3)] == [torch.float16, torch.float32, torch.float32]
    assert [found[f"dB{i}"].dtype for i in range(3)] == [torch.float32, torch.float32, torch.float16]


@pytest.mark.parametrize("name", BOTH)
def test_ranks_beyond_what_registers_hold(name):
    """Projection by projection, in the slices of single layers."""
    with backend(name):
        assert_right([draw("fp16", shape=(9, 33), outputs=(20,), ranks=(260, 4), dropout=True, seed=2)], FEW)


def test_the_definition_is_that_of_single_layers():
    problem = draw()
    leaves = problem.leaves()
    expected = [
        torch.nn.functional.linear(leaves["x"], leaves[f"weight{i}"], leaves.get(f"bias{i}"))
        + problem.scalings[i] * leaves["x"] @ (leaves[f"B{i}"] @ leaves[f"A{i}"]).t()
        for i in range(3)
    ]
    for y, each in zip(reference(problem, leaves, None, [0.0] * 3), expected, strict=True):
        torch.testing.assert_close(y, each, rtol=1e-4, atol=1e-5)


def test_problems_are_what_they_say():
    """So that a draw that lost its point is seen: one has no bias, one no mask, and all differ."""
    problem = draw(dropout=True)
    assert [bias is None for bias in problem.bias] == [False, True, False]
    assert [p == 0 for p in problem.dropouts] == [False, True, False]
    assert len(set(OUTPUTS)) == len(set(RANKS)) == 3
