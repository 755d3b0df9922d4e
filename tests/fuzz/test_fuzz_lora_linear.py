"""`lora_linear` on examples that nobody chose: any shapes, ranks, strides, storages, dtypes, gradients and dropout,
under autocast, and on top of a product that was made elsewhere."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from fastpeft.ops import lora_linear
from fastpeft.ops.lora_linear import apply_lora, lora_linear_reference
from fastpeft.oracle import GRADIENTS, LoraProblem, op_dropout
from tests.counting import count
from tests.fuzz.judging import assert_rounded, autocast_to, coarsest, in_double, magnitudes, outcome, tried_on
from tests.fuzz.large import as_if_large
from tests.fuzz.layouts import CONTIGUOUS, Layout, changed, laid_out, layouts_of
from tests.fuzz.profiles import shown, tried
from tests.ops.lora_linear_cases import DTYPES as PAIRS
from tests.ops.lora_linear_cases import EXACT_IN_INTERPRETER, STRATEGIES, on

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = {**PAIRS, "fp64": (torch.float64, torch.float64), "fp32-fp16": (torch.float32, torch.float16)}
KINDS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
NAMES = (*GRADIENTS, "residual", "dy")


class Case(NamedTuple):
    """A call. leading: the dimensions of x before its inputs; residual: in the place of weight and bias; base: the
    dtype of these, where that is not x's; layouts: of `NAMES`; wanted: which gradients; large: as if they were."""

    leading: tuple[int, ...] = (2,)
    inputs: int = 1
    outputs: int = 1
    rank: int = 1
    dtypes: str = "fp32"
    bias: bool = False
    residual: bool = False
    base: str | None = None
    autocast: str | None = None
    scaling: float = 1.0
    dropout: float = 0.0
    wanted: tuple[str, ...] = ()
    layouts: dict[str, Layout] = {}
    strategy: str | None = None
    large: bool = False
    seed: int = 0

    __repr__ = changed


def cases(sizes, outputs, ranks, dtypes, strategies, residual=False, bases=(None,), autocasts=(None,)):
    """Cases of these sizes, none of more than a few hundred rows."""
    gradients = ("x", "residual", "lora_A", "lora_B") if residual else GRADIENTS
    leading = st.lists(st.integers(0, 3) | sizes, max_size=3).map(tuple)
    return st.builds(
        Case,
        leading=leading.filter(lambda shape: torch.Size(shape).numel() <= 300),
        inputs=sizes,
        outputs=outputs,
        rank=ranks,
        dtypes=st.sampled_from(dtypes),
        bias=st.just(False) if residual else st.booleans(),
        residual=st.just(residual),
        base=st.sampled_from(bases),
        autocast=st.sampled_from(autocasts),
        scaling=st.sampled_from((1.0, 0.5, 2.0, -0.7, 0.0)),
        dropout=st.sampled_from((0.0, 0.0, 0.3, 0.05, 0.9)),
        wanted=st.lists(st.sampled_from(gradients), unique=True).map(tuple),
        layouts=layouts_of(NAMES),
        strategy=strategies,
        large=st.booleans(),
        seed=st.integers(0, 2**32 - 1),
    )


def dtypes_of(case: Case) -> tuple[torch.dtype, ...]:
    """Of x, of the adapter, of weight and bias or the residual, of the result."""
    data, adapter = DTYPES[case.dtypes]
    base = data if case.base is None or data == torch.float64 else KINDS[case.base]
    if case.residual:
        return data, adapter, base, base
    return data, adapter, base, data if case.autocast is None or data == torch.float64 else KINDS[case.autocast]


def tensors_of(case: Case) -> dict[str, torch.Tensor | None]:
    """By name, laid out; dy among them."""
    data, adapter, base, result = dtypes_of(case)
    generator = torch.Generator().manual_seed(case.seed)
    k, n, r = case.inputs, case.outputs, case.rank
    shapes = {
        "x": ((*case.leading, k), 1.0, data),
        "weight": ((n, k), k**-0.5, base),
        "bias": ((n,), 1.0, base),
        "residual": ((*case.leading, n), 1.0, base),
        "lora_A": ((r, k), k**-0.5, adapter),
        "lora_B": ((n, r), r**-0.5, adapter),
        "dy": ((*case.leading, n), 1.0, result),
    }
    absent = ("weight", "bias") if case.residual else ("residual",) if case.bias else ("bias", "residual")
    made = {}
    for name, (shape, deviation, of) in shapes.items():
        values = (torch.randn(shape, generator=generator) * deviation).to(of)
        made[name] = None if name in absent else laid_out(values, case.layouts.get(name, CONTIGUOUS))
    return made


def op_of(case: Case):
    """The call, as a function of its tensors by name."""

    def op(x, weight, bias, residual, lora_A, lora_B):
        with autocast_to(case.autocast and KINDS[case.autocast]):
            if case.residual:
                return apply_lora(x, None, None, residual, lora_A, lora_B, case.scaling, case.dropout)
            return lora_linear(
                x, weight, bias, lora_A, lora_B, scaling=case.scaling, dropout=case.dropout, training=True
            )

    return op


def definition_of(scaling: float, keep, p: float):
    """Of the result, for autograd."""

    def definition(x, weight, bias, residual, lora_A, lora_B):
        if residual is None:
            return lora_linear_reference(x, weight, bias, lora_A, lora_B, scaling, keep, p)
        nothing = lora_B.new_zeros(len(lora_B), x.shape[-1])
        term = lora_linear_reference(x.to(lora_A.dtype), nothing, None, lora_A, lora_B, scaling, keep, p)
        return (residual + term).to(residual.dtype)

    return definition


def holds(case: Case, backend: str) -> None:
    tensors = tensors_of(case)
    dy, wanted = tensors.pop("dy"), [name for name in case.wanted if tensors[name] is not None]
    given = {name: each for name, each in tensors.items() if name != "residual"}
    problem = LoraProblem(**given, dy=dy, scaling=case.scaling, dropout=case.dropout)
    large = as_if_large(case.large and backend == "torch")
    with on(backend, case.strategy), large, torch.random.fork_rng():
        torch.manual_seed(case.seed)
        keep, p = op_dropout(problem)
        torch.manual_seed(case.seed)
        got = tried_on(op_of(case), tensors, wanted, dy)
    data, adapter, _, result = dtypes_of(case)
    assert got["out"].dtype == result and got["out"].shape == dy.shape
    if case.autocast is not None:
        with autocast_to(KINDS[case.autocast]):
            eager = definition_of(case.scaling, keep, p)(**tensors)
        assert eager.dtype == result
    truth = outcome(definition_of(case.scaling, keep, p), in_double(tensors), wanted, dy.double())
    sizes = outcome(definition_of(abs(case.scaling), keep, p), magnitudes(tensors), wanted, dy.double().abs())
    rows = torch.Size(case.leading).numel()
    terms = case.rank + max(rows, case.inputs, case.outputs)
    if case.residual:  # in whose sum x is not rounded, as a gradient may be to x's dtype
        out = {"out": got["out"]}
        assert_rounded(out, {"out": truth["out"]}, sizes, torch.promote_types(data, adapter), terms)
    assert_rounded(got, truth, sizes, coarsest(data, result), terms)
    count("examples")


EDGES = (1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33)
SIZES = st.sampled_from((*EDGES, 63, 64, 65, 100, 129))
ON_TORCH = cases(SIZES, st.just(0) | SIZES, st.sampled_from((*EDGES, 64, 300)), list(DTYPES), st.none())
FEW = (st.sampled_from(EDGES), st.just(0) | st.sampled_from(EDGES), st.sampled_from((*EDGES, 65)))
EXACT = [*EXACT_IN_INTERPRETER, "fp32-fp16"]
ON_TRITON = cases(*FEW, EXACT, st.sampled_from(STRATEGIES))
HALVES, ANY, EXACT_BASES = ("bf16", "fp16"), (None, *KINDS), (None, "fp32", "fp16")
CAST_ON_TORCH = cases(*FEW, list(DTYPES), st.none(), bases=ANY, autocasts=HALVES)
CAST_ON_TRITON = cases(*FEW, EXACT, st.sampled_from(STRATEGIES), bases=EXACT_BASES, autocasts=("fp16",))
RESIDUAL_ON_TORCH = cases(*FEW, list(DTYPES), st.none(), residual=True, bases=ANY, autocasts=(None, *HALVES))
RESIDUAL_ON_TRITON = cases(*FEW, EXACT, st.none(), residual=True, bases=EXACT_BASES, autocasts=(None, "fp16"))


@tried(150, 1000)
@given(ON_TORCH)
def test_lora_linear_on_torch(case):
    shown(case)
    holds(case, "torch")


@pytest.mark.interpreter
@tried(50, 300)
@given(ON_TRITON)
@example(Case(outputs=2, bias=True, layouts={"bias": Layout(step=0)}))
def test_lora_linear_on_the_kernels(case):
    shown(case)
    holds(case, "triton")


@tried(60, 600)
@given(CAST_ON_TORCH)
def test_lora_linear_under_autocast_on_torch(case):
    shown(case)
    holds(case, "torch")


@pytest.mark.interpreter
@tried(15, 300)
@given(CAST_ON_TRITON)
def test_lora_linear_under_autocast_on_the_kernels(case):
    shown(case)
    holds(case, "triton")


@tried(60, 600)
@given(RESIDUAL_ON_TORCH)
def test_lora_linear_on_a_residual_on_torch(case):
    shown(case)
    holds(case, "torch")


@pytest.mark.interpreter
@tried(15, 300)
@given(RESIDUAL_ON_TRITON)
def test_lora_linear_on_a_residual_on_the_kernels(case):
    shown(case)
    holds(case, "triton")
