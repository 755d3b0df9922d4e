"""`lora_mlp` on examples that nobody chose: any activation, shapes, ranks or no LoRA on a side, strides, storages,
dtypes, gradients and dropout, computed again or saved, under autocast too."""

import dataclasses
from typing import NamedTuple

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from fastpeft.ops import _lora_mlp_torch as torch_path
from fastpeft.ops import _lora_mlp_triton as triton_path
from fastpeft.ops import lora_mlp_reference
from fastpeft.ops.lora_linear import Projection
from fastpeft.ops.lora_mlp import ACTIVATIONS
from tests.counting import count
from tests.fuzz.judging import assert_rounded, autocast_to, coarsest, in_double, outcome, tried_twice
from tests.fuzz.large import as_if_large
from tests.fuzz.layouts import CONTIGUOUS, Layout, changed, laid_out, layouts_of
from tests.fuzz.mlp_sizes import sizes_of
from tests.fuzz.profiles import assert_shown, shown, tried
from tests.ops import lora_mlp_cases as ops
from tests.ops.lora_linear_cases import DTYPES as PAIRS
from tests.ops.lora_linear_cases import EXACT_IN_INTERPRETER, STRATEGIES, on

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = {**PAIRS, "fp64": (torch.float64, torch.float64), "fp32-fp16": (torch.float32, torch.float16)}
HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class Side(NamedTuple):
    """A projection. rank: 0 without LoRA; wanted: which gradients; layouts: of these and "weight"."""

    rank: int = 0
    scaling: float = 1.0
    dropout: float = 0.0
    bias: bool = False
    wanted: tuple[str, ...] = ()
    layouts: dict[str, Layout] = {}

    __repr__ = changed


class Case(NamedTuple):
    """A call. leading: the dimensions of x before its inputs; sides: gate, up and down, one of them with LoRA; wanted:
    whether x wants a gradient; layouts: of x and dy; large: as if its tensors were."""

    leading: tuple[int, ...] = (2,)
    inputs: int = 1
    inner: int = 1
    outputs: int = 1
    sides: tuple[Side, Side, Side] = (Side(), Side(), Side(1))
    activation: str = "silu"
    recompute: bool = False
    dtypes: str = "fp32"
    autocast: str | None = None
    wanted: bool = False
    layouts: dict[str, Layout] = {}
    strategy: str | None = None
    large: bool = False
    seed: int = 0

    __repr__ = changed


def cases(sizes, ranks, dtypes, strategies, autocasts):
    """Cases of these sizes, none of more than a hundred rows. Of elements that are dropped no more than half: what is
    left is scaled up in fp16, and squared."""
    side = st.builds(
        Side,
        rank=st.just(0) | ranks,
        scaling=st.sampled_from((1.0, 0.5, -0.7, 0.0)),
        dropout=st.sampled_from((0.0, 0.0, 0.3, 0.05, 0.5)),
        bias=st.booleans(),
        wanted=st.just(ops.FIELDS) | st.lists(st.sampled_from(ops.FIELDS), unique=True).map(tuple),
        layouts=layouts_of(("weight", *ops.FIELDS)),
    )
    leading = st.lists(st.integers(1, 3) | sizes, max_size=3).map(tuple)
    return st.builds(
        Case,
        leading=leading.filter(lambda shape: torch.Size(shape).numel() <= 100),
        inputs=sizes,
        inner=sizes,
        outputs=sizes,
        sides=st.tuples(side, side, side).filter(lambda sides: any(each.rank for each in sides)),
        activation=st.sampled_from(ACTIVATIONS),
        recompute=st.booleans(),
        dtypes=st.sampled_from(dtypes),
        autocast=st.sampled_from(autocasts),
        wanted=st.booleans(),
        layouts=layouts_of(("x", "dy")),
        strategy=strategies,
        large=st.booleans(),
        seed=st.integers(0, 2**32 - 1),
    )


def dtypes_of(case: Case) -> tuple[torch.dtype, ...]:
    """Of x, weights and biases, of adapters, of the result."""
    data, adapter = DTYPES[case.dtypes]
    return data, adapter, data if case.autocast is None or data == torch.float64 else HALVES[case.autocast]


def problem_of(case: Case) -> ops.Problem:
    """Its tensors, laid out."""
    data, adapter, result = dtypes_of(case)
    generator = torch.Generator().manual_seed(case.seed)

    def normal(layouts, name, *shape, deviation=1.0, dtype=data):
        values = (torch.randn(shape, generator=generator) * deviation).to(dtype)
        return laid_out(values, layouts.get(name, CONTIGUOUS))

    x, dy = (
        normal(case.layouts, name, *case.leading, size, dtype=dtype)
        for name, size, dtype in (("x", case.inputs, data), ("dy", case.outputs, result))
    )
    projections = []
    for side, each in enumerate(case.sides):
        k, n = ((case.inputs, case.inner), (case.inputs, case.inner), (case.inner, case.outputs))[side]
        weight = normal(each.layouts, "weight", n, k, deviation=max(1, k) ** -0.5)
        bias, a, b = normal(each.layouts, "bias", n) if each.bias else None, None, None
        if each.rank:
            a = normal(each.layouts, "lora_A", each.rank, k, deviation=max(1, k) ** -0.5, dtype=adapter)
            b = normal(each.layouts, "lora_B", n, each.rank, deviation=each.rank**-0.5, dtype=adapter)
        projections.append(Projection(weight, bias, a, b, each.scaling, each.dropout))
    return ops.Problem(x, tuple(projections), dy, case.activation, case.recompute)


def magnitudes_of(problem: ops.Problem) -> ops.Problem:
    """In float64."""
    projections = [
        Projection(*(t if t is None else t.double().abs() for t in each[:4]), abs(each.scaling), each.dropout)
        for each in problem.projections
    ]
    x, dy = (t.double().abs() for t in (problem.x, problem.dy))
    return dataclasses.replace(problem, x=x, projections=tuple(projections), dy=dy)


def op_of(case: Case, problem: ops.Problem):
    def op(**leaves):
        with autocast_to(case.autocast and HALVES[case.autocast]):
            return ops.call(problem, leaves)

    return op


def wanted_of(case: Case, tensors: dict) -> list[str]:
    wanted = [f"{side}.{field}" for side, each in zip(ops.SIDES, case.sides, strict=True) for field in each.wanted]
    return [name for name in [*wanted, *["x"] * case.wanted] if name in tensors]


def holds(case: Case, backend: str) -> None:
    problem = problem_of(case)
    tensors, weights = problem.tensors, [each.weight for each in problem.projections]
    op, wanted = op_of(case, problem), wanted_of(case, tensors)
    some = min(t.numel() for t in (*weights, *tensors.values())) > 0
    rows = torch.Size(case.leading).numel()
    with torch.random.fork_rng(), as_if_large(case.large and backend == "torch"):
        torch.manual_seed(case.seed)
        with on(backend if some else "torch"):
            keeps, exact = ops.masks_of(problem)
        with on(backend, case.strategy):
            got = tried_twice(op, tensors, wanted, problem.dy, case.seed, weights)
    data, _, result = dtypes_of(case)
    assert got["out"].dtype == result and got["out"].shape == problem.dy.shape
    defined = dataclasses.replace(problem, projections=exact)

    def definition(**leaves):
        return lora_mlp_reference(*defined.with_leaves(leaves), case.activation, keeps)

    truth = outcome(definition, in_double(tensors), wanted, problem.dy.double())
    terms = max(each.rank for each in case.sides) + max(rows, case.inputs, case.inner, case.outputs)
    coarse = coarsest(data, result)
    least = max(torch.finfo(dtype).smallest_normal for dtype in (data, result)) * terms
    sizes = sizes_of(magnitudes_of(defined), keeps, least)
    assert_rounded(got, truth, sizes, coarse, terms, {"dx": 2})  # of gate and up
    count("examples")


EDGES = (1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33)
SIZES, FEW = st.sampled_from((0, *EDGES, 63, 65, 100)), st.sampled_from((0, *EDGES))
ON_TORCH = cases(SIZES, st.sampled_from((*EDGES, 64, 300)), list(DTYPES), st.none(), (None, None, *HALVES))
ON_TRITON = cases(
    *(FEW, st.sampled_from((*EDGES, 65)), [*EXACT_IN_INTERPRETER, "fp32-fp16"]),
    *(st.none() | st.sampled_from(STRATEGIES), (None, None, "fp16")),
)


@tried(50, 600)
@given(ON_TORCH)
@example(Case(leading=(0,), sides=(Side(), Side(), Side(1, dropout=0.05, wanted=ops.FIELDS))))
def test_lora_mlp_on_torch(case):
    shown(case)
    holds(case, "torch")


@pytest.mark.interpreter
@tried(8, 300)
@given(ON_TRITON)
def test_lora_mlp_on_the_kernels(case):
    shown(case)
    holds(case, "triton")


def of_gelu(backward):
    def planted(*given):
        *before, call, needs = given
        return backward(*before, call._replace(activation=call.activation.replace("silu", "gelu")), needs)

    return planted


def without_scaling_of_down(forward):
    def planted(x, projections, seeds, call, *keep):
        return forward(x, projections, seeds, call._replace(scalings=(*call.scalings[:2], 1.0)), *keep)

    return planted


FAULTS = {
    "silu with the gradient of gelu": ("backward", of_gelu),
    "down's update is not scaled": ("forward", without_scaling_of_down),
}
PATHS = {"torch": torch_path, "triton": triton_path}
FEW_CASES = cases(*(st.sampled_from(each) for each in ((3, 17), (2, 5))), ["fp32"], st.none(), (None,))


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.interpreter)])
def test_a_planted_fault_is_shown(backend, fault, monkeypatch):
    path, (name, planted) = PATHS[backend], FAULTS[fault]
    monkeypatch.setattr(path, name, planted(getattr(path, name)))
    assert_shown(FEW_CASES, lambda case: holds(case, backend), "an error of .* times what rounding explains")
