"""`lora_projections` on examples that nobody chose: any projections of any input, strides, storages, dtypes, gradients
and dropout, with results that nothing uses, under autocast too."""

import dataclasses
from typing import NamedTuple

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from fastpeft.ops import _lora_projections_torch as torch_path
from fastpeft.ops import _lora_projections_triton as triton_path
from tests.counting import count
from tests.fuzz.judging import assert_rounded, autocast_to, coarsest, in_double, magnitudes, outcome, tried_twice
from tests.fuzz.large import as_if_large
from tests.fuzz.layouts import CONTIGUOUS, Layout, changed, laid_out, layouts_of
from tests.fuzz.profiles import assert_shown, shown, tried
from tests.ops import lora_projections_cases as ops
from tests.ops.lora_linear_cases import DTYPES as PAIRS
from tests.ops.lora_linear_cases import EXACT_IN_INTERPRETER, STRATEGIES, on

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = {**PAIRS, "fp64": (torch.float64, torch.float64), "fp32-fp16": (torch.float32, torch.float16)}
KINDS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Projected(NamedTuple):
    """A projection. used: whether anything uses its result; wanted: which gradients; layouts: of these and "dy"."""

    outputs: int = 1
    rank: int = 1
    scaling: float = 1.0
    dropout: float = 0.0
    bias: bool = False
    used: bool = True
    wanted: tuple[str, ...] = ()
    layouts: dict[str, Layout] = {}

    __repr__ = changed


class Case(NamedTuple):
    """A call. leading: the dimensions of x before its inputs; base: the dtype of weights and biases, where that is not
    x's, as it may be under autocast, or that of base products; based: on these, which somebody else has computed;
    wanted: whether x wants a gradient; large: as if its tensors were."""

    leading: tuple[int, ...] = (2,)
    inputs: int = 1
    projections: tuple[Projected, ...] = (Projected(),)
    dtypes: str = "fp32"
    base: str | None = None
    based: bool = False
    autocast: str | None = None
    wanted: bool = False
    layout: Layout = CONTIGUOUS
    strategy: str | None = None
    large: bool = False
    seed: int = 0

    __repr__ = changed


MOST = 5  # one more than a launch takes


@st.composite
def cases(draw, sizes, ranks, dtypes, strategies, bases, autocasts):
    """Cases of these sizes, none of more than a hundred rows."""
    projected = st.builds(
        Projected,
        outputs=sizes,
        rank=ranks,
        scaling=st.sampled_from((1.0, 0.5, 2.0, -0.7, 0.0)),
        dropout=st.sampled_from((0.0, 0.0, 0.3, 0.05, 0.9)),
        bias=st.booleans(),
        used=st.sampled_from((True, True, True, False)),
        wanted=st.just(ops.KINDS) | st.lists(st.sampled_from(ops.KINDS), unique=True).map(tuple),
        layouts=layouts_of((*ops.KINDS, "dy")),
    )
    leading = st.lists(st.integers(1, 3) | sizes, max_size=3).map(tuple)
    autocast, based = draw(st.sampled_from(autocasts)), draw(st.booleans())
    return Case(
        leading=draw(leading.filter(lambda shape: torch.Size(shape).numel() <= 100)),
        inputs=draw(sizes),
        projections=draw(st.lists(projected, min_size=1, max_size=MOST).map(tuple)),
        dtypes=draw(st.sampled_from(dtypes)),
        base=draw(st.sampled_from(bases)) if based or autocast else None,
        based=based,
        autocast=autocast,
        wanted=draw(st.booleans()),
        layout=draw(layouts_of(["x"])).get("x", CONTIGUOUS),
        strategy=draw(strategies),
        large=draw(st.booleans()),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


def dtypes_of(case: Case) -> tuple[torch.dtype, ...]:
    """Of x, of adapters, of weights and biases, of the results."""
    data, adapter = DTYPES[case.dtypes]
    base = data if case.base is None else KINDS[case.base]
    if case.based:
        return data, adapter, base, base
    if data == torch.float64 or case.autocast is None:
        return data, adapter, data, data
    return data, adapter, base, KINDS[case.autocast]


def problem_of(case: Case) -> ops.Problem:
    """Its tensors, laid out."""
    data, adapter, base, result = dtypes_of(case)
    generator = torch.Generator().manual_seed(case.seed)
    k, parts = case.inputs, {kind: [] for kind in (*ops.KINDS, "dy")}

    def normal(layout, *shape, deviation=1.0, dtype=data):
        return laid_out((torch.randn(shape, generator=generator) * deviation).to(dtype), layout)

    x, deviation = normal(case.layout, *case.leading, k), max(1, k) ** -0.5
    for each in case.projections:
        product, weight = ((*case.leading, each.outputs), 1.0, base), ((each.outputs, k), deviation, base)
        shapes = {
            "weight": product if case.based else weight,
            "bias": ((each.outputs,), 1.0, base),
            "A": ((each.rank, k), deviation, adapter),
            "B": ((each.outputs, each.rank), each.rank**-0.5, adapter),
            "dy": ((*case.leading, each.outputs), 1.0, result),
        }
        for name, (shape, spread, dtype) in shapes.items():
            made = normal(each.layouts.get(name, CONTIGUOUS), *shape, deviation=spread, dtype=dtype)
            absent = name == "bias" and (case.based or not each.bias) or name == "dy" and not each.used
            parts[name].append(None if absent else made)
    return ops.Problem(
        x=x,
        **{name: tuple(each) for name, each in parts.items()},
        scalings=tuple(each.scaling for each in case.projections),
        dropouts=tuple(each.dropout for each in case.projections),
        based=case.based,
    )


def op_of(case: Case, problem: ops.Problem):
    def op(**leaves):
        with autocast_to(case.autocast and KINDS[case.autocast]):
            return ops.call(problem, leaves)

    return op


def wanted_of(case: Case, tensors: dict) -> list[str]:
    wanted = [f"{kind}{i}" for i, each in enumerate(case.projections) for kind in each.wanted]
    return [name for name in [*wanted, *["x"] * case.wanted] if name in tensors]


def holds(case: Case, backend: str) -> None:
    problem = problem_of(case)
    tensors = {name: leaf.detach() for name, leaf in problem.leaves().items()}
    op, wanted = op_of(case, problem), wanted_of(case, tensors)
    some = problem.x.numel() * min(len(b) for b in problem.B) > 0
    rows, outputs = torch.Size(case.leading).numel(), max(each.outputs for each in case.projections)
    with torch.random.fork_rng(), as_if_large(case.large and backend == "torch"):
        torch.manual_seed(case.seed)
        with on(backend if some else "torch"):
            keeps, dropouts = ops.masks_of(problem)
        with on(backend, case.strategy):
            got = tried_twice(op, tensors, wanted, problem.dy, case.seed)
    data, _, _, result = dtypes_of(case)
    shapes = [(*case.leading, each.outputs) for each in case.projections]
    assert [(got[f"out{i}"].dtype, got[f"out{i}"].shape) for i in range(len(shapes))] == [(result, s) for s in shapes]
    dys = [None if dy is None else dy.double() for dy in problem.dy]
    sizes_of = dataclasses.replace(problem, scalings=tuple(map(abs, problem.scalings)))
    truth, sizes = (
        outcome(lambda **leaves: ops.reference(of, leaves, keeps, dropouts), of_tensors, wanted, grads)  # noqa: B023
        for of, of_tensors, grads in (
            (problem, in_double(tensors), dys),
            (sizes_of, magnitudes(tensors), [None if dy is None else dy.abs() for dy in dys]),
        )
    )
    terms = max(each.rank for each in case.projections) + max(rows, case.inputs, outputs)
    assert_rounded(got, truth, sizes, coarsest(data, result), terms, {"dx": len(problem.used)})
    count("examples")


EDGES = (1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33)
SIZES, FEW = st.sampled_from((0, *EDGES, 63, 65, 100)), st.sampled_from((0, *EDGES))
HALVES = ("bf16", "fp16")
ON_TORCH = cases(
    *(SIZES, st.sampled_from((*EDGES, 64, 300)), list(DTYPES), st.none()), (None, *KINDS), (None, None, *HALVES)
)
EXACT = [*EXACT_IN_INTERPRETER, "fp32-fp16"]
ON_TRITON = cases(
    *(FEW, st.sampled_from((*EDGES, 65, 300)), EXACT, st.none() | st.sampled_from(STRATEGIES)),
    *((None, "fp32", "fp16"), (None, None, "fp16")),
)


@tried(50, 600)
@given(ON_TORCH)
@example(Case(leading=(0,), projections=(Projected(dropout=0.05, wanted=ops.KINDS),)))
@example(Case(projections=(Projected(2, bias=True, layouts={"bias": Layout(step=0)}),), large=True))
def test_lora_projections_on_torch(case):
    shown(case)
    holds(case, "torch")


@pytest.mark.interpreter
@tried(6, 300)
@given(ON_TRITON)
def test_lora_projections_on_the_kernels(case):
    shown(case)
    holds(case, "triton")


def one_mask(draw_seeds):
    return lambda x, dropouts: [seed if p else None for seed, p in zip(draw_seeds(x, [0.5]) * MOST, dropouts)]  # noqa: B905


def first_scaling(forward):
    def planted(*given):
        *tensors, call = given
        return forward(*tensors, call._replace(scalings=call.scalings[:1] * len(call.scalings)))

    return planted


FAULTS = {
    "one mask for all": ("draw_seeds", one_mask),
    "the first scaling for all": ("forward", first_scaling),
}
PATHS = {"torch": torch_path, "triton": triton_path}
FEW_CASES = cases(*(st.sampled_from(each) for each in ((3, 17), (2, 5))), ["fp32"], st.none(), (None,), (None,))


PLANTED = [("torch", fault) for fault in FAULTS]
PLANTED += [pytest.param("triton", "one mask for all", marks=pytest.mark.interpreter)]


@pytest.mark.parametrize(("backend", "fault"), PLANTED)
def test_a_planted_fault_is_shown(backend, fault, monkeypatch):
    path, (name, planted) = PATHS[backend], FAULTS[fault]
    monkeypatch.setattr(path, name, planted(getattr(path, name)))
    assert_shown(FEW_CASES, lambda case: holds(case, backend), "an error of .* times what rounding explains")
