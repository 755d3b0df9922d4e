"""`lora_projections` on base products that somebody else has computed, as quantised layers do: as right as eager torch
in every subset of gradients and results in use, and nothing of the base is computed, kept or written into."""

import dataclasses
import itertools

import pytest
import torch

from fastpeft.dispatch import backend
from fastpeft.ops.lora_linear import apply_lora
from fastpeft.oracle import Bounds
from tests.memory import saved_for_backward
from tests.ops.lora_linear_cases import DTYPES, EXACT_IN_INTERPRETER, TRUNCATED
from tests.ops.lora_projections_cases import (
    assert_as_single_layers,
    assert_right,
    call,
    draw,
    of_kind,
    outcomes,
    projections_of,
    results,
)

pytestmark = pytest.mark.usefixtures("poison", "symmetric_products")
BOTH = [pytest.param("torch"), pytest.param("triton", marks=pytest.mark.interpreter)]
DROPPING = pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
SMALL = {"shape": (15, 33), "outputs": (40, 33, 37), "ranks": (4, 7, 3), "based": True}
BOUNDS = {"torch": Bounds(rms=1.5, peak=3.0, row=6.0), "triton": Bounds(rms=2.2, peak=4.0, row=8.0)}  # of 8 and 1


def drawn(name: str, dtypes: str = "fp16-fp32", **options):
    """Some problems for the torch path, fewer for the interpreter."""
    return [draw(dtypes, **SMALL | options, seed=seed) for seed in range(1 if name == "triton" else 8)]


@DROPPING
@pytest.mark.parametrize("dtypes", DTYPES)
def test_torch_path(dtypes, dropout):
    with backend("torch"):
        assert_right(drawn("torch", dtypes, dropout=dropout), BOUNDS["torch"])


@pytest.mark.interpreter
@pytest.mark.usefixtures("overflow_checks")
@pytest.mark.parametrize("dtypes", [*EXACT_IN_INTERPRETER, "bf16-fp32"])
@DROPPING
def test_kernels(dtypes, dropout):
    bounds = BOUNDS["triton"] if dtypes in EXACT_IN_INTERPRETER else TRUNCATED
    with backend("triton"):
        assert_right([draw(dtypes, dropout=dropout, based=True, seed=3)], bounds)


WANTED = [kinds for size in range(5) for kinds in itertools.combinations(("x", "weight", "A", "B"), size)]


@pytest.mark.parametrize("kinds", WANTED, ids=lambda kinds: "-".join(kinds) or "-")
@pytest.mark.parametrize("name", BOTH)
def test_every_subset_of_gradients(name, kinds):
    """That of a base product is its result's, bit for bit."""
    wanted = [each for kind in kinds for each in ([kind] if kind == "x" else [f"{kind}{i}" for i in range(3)])]
    problems = drawn(name)
    with backend(name):
        assert_right(problems, BOUNDS[name], wanted)
        got, _, _ = outcomes(problems[0], wanted)
    for i in range(3) if "weight" in kinds else ():
        assert torch.equal(got[f"dweight{i}"], problems[0].dy[i])


@pytest.mark.parametrize("unused", [(0,), (1, 2)], ids=str)
@pytest.mark.parametrize("name", BOTH)
def test_results_that_nothing_uses(name, unused):
    with backend(name):
        assert_right(drawn(name, dropout=True, unused=unused), BOUNDS[name])


@pytest.mark.parametrize("ranks", [(5,), (3, 5, 7, 2, 1), (1, 33), (40, 3, 70)], ids=str)
@pytest.mark.parametrize("name", BOTH)
def test_any_number_of_projections(name, ranks):
    with backend(name):
        assert_right(drawn(name, ranks=ranks, dropout=True), BOUNDS[name])


@DROPPING
@pytest.mark.parametrize("dtypes", ["fp32", "fp16-fp32", "bf16"])
def test_equal_to_single_layers_under_the_same_seed(dtypes, dropout):
    problem = draw(dtypes, dropout=dropout, based=True)

    def alone(leaves):
        each = projections_of(problem, leaves, problem.dropouts)
        return [apply_lora(leaves["x"], None, None, p.weight, p.lora_A, p.lora_B, *p[4:6]) for p in each]

    assert_as_single_layers(problem, alone)


@pytest.mark.parametrize("name", BOTH)
def test_with_the_vendors_product_it_is_what_it_is_with_weights(name):
    """fp32 x and fp16 base products, as autocast gives them, too."""
    problem = draw("fp32", **SMALL | {"based": False}, dropout=True)
    problem = dataclasses.replace(problem, bias=(None,) * 3)
    leaves = problem.leaves()
    bases = tuple(leaves["x"].detach() @ weight.detach().t() for weight in of_kind(leaves, "weight", 3))
    based = dataclasses.replace(problem, weight=bases, based=True)
    with backend(name):
        found = []
        for each in (problem, based, dataclasses.replace(based, weight=tuple(map(torch.Tensor.half, bases)))):
            torch.manual_seed(2)
            found.append(call(each, each.leaves()))
    for exact, same, rounded in zip(*found, strict=True):
        torch.testing.assert_close(same, exact)
        assert rounded.dtype == torch.float16
        torch.testing.assert_close(rounded.float(), exact, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", BOTH)
def test_the_base_is_neither_kept_nor_written_into(name):
    problem = draw(**SMALL, dropout=True)
    leaves = problem.leaves()
    before = [base.detach().clone() for base in of_kind(leaves, "weight", 3)]
    with backend(name):
        with saved_for_backward(besides=of_kind(leaves, "A", 3) + of_kind(leaves, "B", 3)) as saved:
            ys = call(problem, leaves)
        torch.autograd.backward(ys, problem.dy)
    assert all(map(torch.equal, before, of_kind(leaves, "weight", 3)))
    x, s = 4 * 15 * 33, 4 * 15 * (4 + 7 + 3)
    assert sorted(saved.values())[-2:] == [s, x] and sum(saved.values()) < s + x + 64  # and seeds


@DROPPING
def test_gradcheck(dropout):
    problem = draw(shape=(4, 5), outputs=(4, 3, 2), ranks=(1, 3, 2), dropout=dropout, based=True)
    leaves = problem.leaves(torch.float64)

    def op(*given):
        torch.manual_seed(1)
        return tuple(call(problem, dict(zip(leaves, given, strict=True))))

    assert torch.autograd.gradcheck(op, tuple(leaves.values()))


@DROPPING
def test_autocast(dropout):
    """The low-rank terms are in x's dtype, as single layers', whatever autocast is on."""
    problem = draw("fp32", dropout=dropout, based=True)
    problem = dataclasses.replace(problem, weight=tuple(map(torch.Tensor.bfloat16, problem.weight)))
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        found = results(lambda leaves: call(problem, leaves), problem, list(problem.leaves()))
    torch.manual_seed(0)
    expected = results(lambda leaves: call(problem, leaves), problem, list(problem.leaves()))
    assert found["y0"].dtype == torch.bfloat16 and found["dA0"].dtype == torch.float32
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_no_rows():
    problem = draw(shape=(2, 0, 33), dropout=True, based=True)
    found = results(lambda leaves: call(problem, leaves), problem, list(problem.leaves()))
    assert not any(each.any() for each in found.values())
