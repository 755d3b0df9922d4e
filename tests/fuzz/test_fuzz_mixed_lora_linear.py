"""`mixed_lora_linear` on examples that nobody chose: any batches, adapters (none, too), strides, storages and dropout,
under autocast, and on top of a product that was made elsewhere."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastpeft.ops import mixed_lora_linear_reference
from tests.counting import count
from tests.fuzz.judging import assert_rounded, autocast_to, coarsest, in_double, magnitudes, outcome, tried_on
from tests.fuzz.layouts import CONTIGUOUS, Layout, changed, laid_out, layouts_of
from tests.fuzz.profiles import shown, tried
from tests.ops import mixed_lora_linear_cases as ops
from tests.ops.lora_linear_cases import DTYPES as PAIRS
from tests.ops.lora_linear_cases import EXACT_IN_INTERPRETER, on

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = {**PAIRS, "fp64": (torch.float64, torch.float64), "fp32-fp16": (torch.float32, torch.float16)}
KINDS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SHARED = ("x", "weight", "bias", "residual", "dy")


class Adapter(NamedTuple):
    """like_data: of the data's dtype, not of the adapters'."""

    rank: int = 1
    scaling: float = 1.0
    dropout: float = 0.0
    like_data: bool = False
    layouts: dict[str, Layout] = {}  # of A and B

    __repr__ = changed


class Case(NamedTuple):
    """A call. rows: of each sample its adapter; between: the dimensions between samples and inputs; residual: in
    the place of weight and bias; base: the dtype of these, where that is not x's; layouts: of `SHARED`; wanted: which
    gradients, by name."""

    rows: tuple[int, ...] = (0,)
    between: tuple[int, ...] = ()
    inputs: int = 1
    outputs: int = 1
    adapters: tuple[Adapter, ...] = (Adapter(),)
    dtypes: str = "fp32"
    bias: bool = False
    residual: bool = False
    base: str | None = None
    autocast: str | None = None
    wanted: tuple[str, ...] = ()
    layouts: dict[str, Layout] = {}
    seed: int = 0

    __repr__ = changed


ADAPTERS = 3
NAMES = ("x", "weight", "bias", "residual", *(f"{letter}{i}" for letter in "AB" for i in range(ADAPTERS)))


@st.composite
def cases(draw, sizes, outputs, ranks, dtypes, residual=False, bases=(None,), autocasts=(None,)):
    """Cases of these sizes, of up to three adapters and six samples."""
    adapter = st.builds(
        Adapter,
        ranks,
        st.sampled_from((1.0, 0.5, -0.7, 0.0)),
        st.sampled_from((0.0, 0.3, 0.9)),
        st.booleans(),
        layouts_of("AB"),
    )
    adapters = draw(st.lists(adapter, max_size=ADAPTERS).map(tuple))
    between = st.lists(st.integers(0, 3) | sizes, max_size=2).map(tuple)
    return Case(
        rows=draw(st.lists(st.integers(-1, len(adapters) - 1), max_size=6).map(tuple)),
        between=draw(between.filter(lambda shape: torch.Size(shape).numel() <= 40)),
        inputs=draw(sizes),
        outputs=draw(outputs),
        adapters=adapters,
        dtypes=draw(st.sampled_from(dtypes)),
        bias=not residual and draw(st.booleans()),
        residual=residual,
        base=draw(st.sampled_from(bases)),
        autocast=draw(st.sampled_from(autocasts)),
        wanted=draw(st.lists(st.sampled_from(NAMES), unique=True).map(tuple)),
        layouts=draw(layouts_of(SHARED)),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


def dtypes_of(case: Case) -> tuple[torch.dtype, ...]:
    """Of x, of adapters, of weight and bias or the residual, of the result."""
    data, wide = DTYPES[case.dtypes]
    base = data if case.base is None or data == torch.float64 else KINDS[case.base]
    if case.residual:
        return data, wide, base, base
    return data, wide, base, data if case.autocast is None or data == torch.float64 else KINDS[case.autocast]


def problem_of(case: Case) -> ops.Problem:
    """Its tensors, laid out."""
    data, wide, base, result = dtypes_of(case)
    generator = torch.Generator().manual_seed(case.seed)

    def normal(layouts, name, *shape, deviation=1.0, dtype=data):
        values = (torch.randn(shape, generator=generator) * deviation).to(dtype)
        return laid_out(values, layouts.get(name, CONTIGUOUS))

    batch, k, n = (len(case.rows), *case.between), case.inputs, case.outputs
    own = case.layouts
    a, b = [], []
    for each in case.adapters:
        dtype = data if each.like_data else wide
        a.append(normal(each.layouts, "A", each.rank, k, deviation=k**-0.5, dtype=dtype))
        b.append(normal(each.layouts, "B", n, each.rank, deviation=each.rank**-0.5, dtype=dtype))
    return ops.Problem(
        x=normal(own, "x", *batch, k),
        weight=None if case.residual else normal(own, "weight", n, k, deviation=k**-0.5, dtype=base),
        bias=normal(own, "bias", n, dtype=base) if case.bias else None,
        lora_A=tuple(a),
        lora_B=tuple(b),
        dy=normal(own, "dy", *batch, n, dtype=result),
        scalings=tuple(each.scaling for each in case.adapters),
        rows=case.rows,
        dropouts=tuple(each.dropout for each in case.adapters),
        residual=normal(own, "residual", *batch, n, dtype=base) if case.residual else None,
    )


def op_of(case: Case, problem: ops.Problem):
    """The call, as a function of its tensors by name."""

    def op(**leaves):
        with autocast_to(case.autocast and KINDS[case.autocast]):
            return ops.call(problem, leaves)

    return op


def definition_of(problem: ops.Problem, scalings, keep, dropouts):
    """Of the result, for autograd."""

    def definition(**leaves):
        a, b = ops.matrices_of(leaves, "A"), ops.matrices_of(leaves, "B")
        more = (scalings, problem.rows, keep, dropouts)
        if problem.residual is None:
            return mixed_lora_linear_reference(*(leaves.get(name) for name in ops.SHARED), a, b, *more)
        x, residual = leaves["x"], leaves["residual"]
        if not problem.used:  # x has no part in it
            return residual.clone()
        nothing = x.new_zeros(residual.shape[-1], x.shape[-1])
        return residual + mixed_lora_linear_reference(x, nothing, None, a, b, *more)

    return definition


def holds(case: Case, backend: str) -> None:
    problem = problem_of(case)
    tensors = problem.leaves()
    wanted = [name for name in case.wanted if name in tensors]
    with on(backend), torch.random.fork_rng():
        torch.manual_seed(case.seed)
        keep, dropouts = ops.mask_of(problem) if problem.x.numel() else (None, None)
        torch.manual_seed(case.seed)
        got = tried_on(op_of(case, problem), tensors, wanted, problem.dy)
    data, wide, _, result = dtypes_of(case)
    assert got["out"].dtype == result and got["out"].shape == problem.dy.shape
    unused = {f"d{letter}{g}" for letter in "AB" for g in range(len(case.adapters)) if g not in case.rows}
    assert not unused & got.keys(), "an adapter that no sample has has a gradient"
    dy = problem.dy.double()
    truth = outcome(definition_of(problem, problem.scalings, keep, dropouts), in_double(tensors), wanted, dy)
    scalings = [abs(s) for s in problem.scalings]
    sizes = outcome(definition_of(problem, scalings, keep, dropouts), magnitudes(tensors), wanted, dy.abs())
    ranks = max((each.rank for each in case.adapters), default=0)
    terms = ranks + max(problem.x.shape[:-1].numel(), case.inputs, case.outputs)
    if case.residual:  # in whose sum x is not rounded, as a gradient may be to x's dtype
        finest = torch.promote_types(data, wide) if all(not each.like_data for each in case.adapters) else data
        assert_rounded({"out": got["out"]}, {"out": truth["out"]}, sizes, finest, terms)
    assert_rounded(got, truth, sizes, coarsest(data, result), terms)
    count("examples")


EDGES = (1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33)
SIZES = st.sampled_from((*EDGES, 63, 65, 100))
ON_TORCH = cases(SIZES, st.just(0) | SIZES, st.sampled_from((*EDGES, 64, 300)), list(DTYPES))
FEW = (st.sampled_from(EDGES), st.just(0) | st.sampled_from(EDGES), st.sampled_from((*EDGES, 65)))
EXACT = [*EXACT_IN_INTERPRETER, "fp32-fp16"]
ON_TRITON = cases(*FEW, EXACT)
HALVES, ANY, EXACT_BASES = ("bf16", "fp16"), (None, *KINDS), (None, "fp32", "fp16")
CAST_ON_TORCH = cases(*FEW, list(DTYPES), bases=ANY, autocasts=HALVES)
CAST_ON_TRITON = cases(*FEW, EXACT, bases=EXACT_BASES, autocasts=("fp16",))
RESIDUAL_ON_TORCH = cases(*FEW, list(DTYPES), residual=True, bases=ANY, autocasts=(None, *HALVES))
RESIDUAL_ON_TRITON = cases(*FEW, EXACT, residual=True, bases=EXACT_BASES, autocasts=(None, "fp16"))


@tried(150, 1000)
@given(ON_TORCH)
def test_mixed_lora_linear_on_torch(case):
    shown(case)
    holds(case, "torch")


@pytest.mark.interpreter
@tried(50, 300)
@given(ON_TRITON)
def test_mixed_lora_linear_on_the_kernels(case):
    shown(case)
    holds(case, "triton")


@tried(60, 600)
@given(CAST_ON_TORCH)
def test_mixed_lora_linear_under_autocast_on_torch(case):
    shown(case)
    holds(case, "torch")


@pytest.mark.interpreter
@tried(15, 300)
@given(CAST_ON_TRITON)
def test_mixed_lora_linear_under_autocast_on_the_kernels(case):
    shown(case)
    holds(case, "triton")


@tried(60, 600)
@given(RESIDUAL_ON_TORCH)
def test_mixed_lora_linear_on_a_residual_on_torch(case):
    shown(case)
    holds(case, "torch")


@pytest.mark.interpreter
@tried(15, 300)
@given(RESIDUAL_ON_TRITON)
def test_mixed_lora_linear_on_a_residual_on_the_kernels(case):
    shown(case)
    holds(case, "triton")
