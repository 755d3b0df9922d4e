"""`dora_linear` on examples that nobody chose: any shapes, ranks, factors, strides, storages, dtypes, gradients and
dropout, under autocast too."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from fastpeft.ops import _dora_linear_torch as torch_path
from fastpeft.ops import _dora_linear_triton as triton_path
from fastpeft.ops.dora_linear import apply_dora, dora_linear_reference
from fastpeft.oracle import LoraProblem, op_dropout
from tests.counting import count
from tests.fuzz.judging import assert_rounded, autocast_to, coarsest, in_double, magnitudes, outcome, tried_twice
from tests.fuzz.large import as_if_large
from tests.fuzz.layouts import CONTIGUOUS, Layout, changed, laid_out, layouts_of
from tests.fuzz.profiles import assert_shown, shown, tried
from tests.ops.lora_linear_cases import DTYPES as PAIRS
from tests.ops.lora_linear_cases import EXACT_IN_INTERPRETER, STRATEGIES, on

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = {**PAIRS, "fp64": (torch.float64, torch.float64), "fp32-fp16": (torch.float32, torch.float16)}
KINDS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
GRADIENTS = ("x", "bias", "lora_A", "lora_B", "factor")


class Case(NamedTuple):
    """A call. leading: the dimensions of x before its inputs; base: the dtype of weight and bias, where that is not
    x's, as it may be under autocast; like_adapter: the factor's dtype is the adapter's, not fp32; wanted: which
    gradients; layouts: of these, weight and dy; large: as if its tensors were."""

    leading: tuple[int, ...] = (2,)
    inputs: int = 1
    outputs: int = 1
    rank: int = 1
    dtypes: str = "fp32"
    bias: bool = False
    base: str | None = None
    autocast: str | None = None
    like_adapter: bool = False
    scaling: float = 1.0
    dropout: float = 0.0
    wanted: tuple[str, ...] = ()
    layouts: dict[str, Layout] = {}
    strategy: str | None = None
    large: bool = False
    seed: int = 0

    __repr__ = changed


@st.composite
def cases(draw, sizes, ranks, dtypes, strategies, bases, autocasts):
    """Cases of these sizes, none of more than two hundred rows."""
    leading, autocast = st.lists(st.integers(1, 3) | sizes, max_size=3).map(tuple), draw(st.sampled_from(autocasts))
    return Case(
        leading=draw(leading.filter(lambda shape: torch.Size(shape).numel() <= 200)),
        inputs=draw(sizes),
        outputs=draw(sizes),
        rank=draw(ranks),
        dtypes=draw(st.sampled_from(dtypes)),
        bias=draw(st.booleans()),
        base=None if autocast is None else draw(st.sampled_from(bases)),
        autocast=autocast,
        like_adapter=draw(st.booleans()),
        scaling=draw(st.sampled_from((1.0, 0.5, 2.0, -0.7, 0.0))),
        dropout=draw(st.sampled_from((0.0, 0.0, 0.3, 0.05, 0.9))),
        wanted=draw(st.just(GRADIENTS) | st.lists(st.sampled_from(GRADIENTS), unique=True).map(tuple)),
        layouts=draw(layouts_of((*GRADIENTS, "weight", "dy"))),
        strategy=draw(strategies),
        large=draw(st.booleans()),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


def dtypes_of(case: Case) -> tuple[torch.dtype, ...]:
    """Of x, of the adapter, of the factor, of weight and bias, of the result."""
    data, adapter = DTYPES[case.dtypes]
    factor = adapter if case.like_adapter else torch.float32
    if data == torch.float64 or case.autocast is None:
        return data, adapter, factor, data, data
    return data, adapter, factor, data if case.base is None else KINDS[case.base], KINDS[case.autocast]


def tensors_of(case: Case) -> dict[str, torch.Tensor | None]:
    """By name, laid out; dy among them. The factor is about 1, as training has it."""
    data, adapter, factor, base, result = dtypes_of(case)
    generator = torch.Generator().manual_seed(case.seed)
    k, n, r = case.inputs, case.outputs, case.rank
    shapes = {
        "x": ((*case.leading, k), 1.0, data),
        "weight": ((n, k), max(1, k) ** -0.5, base),
        "bias": ((n,), 1.0, base),
        "lora_A": ((r, k), max(1, k) ** -0.5, adapter),
        "lora_B": ((n, r), r**-0.5, adapter),
        "factor": ((n,), 0.3, factor),
        "dy": ((*case.leading, n), 1.0, result),
    }
    made = {}
    for name, (shape, deviation, of) in shapes.items():
        values = torch.randn(shape, generator=generator) * deviation + (name == "factor")
        made[name] = laid_out(values.to(of), case.layouts.get(name, CONTIGUOUS))
    return made if case.bias else made | {"bias": None}


def sizes_of(scaling: float, keep, p: float):
    """Of the sums of magnitudes, for autograd: as the definition, whose f - 1 may come to |f| + 1, and which without
    dropout multiplies its one product by f."""

    def definition(x, weight, bias, lora_A, lora_B, factor):
        plain = torch.nn.functional.linear(x, weight)
        z = x if keep is None else x * keep.view(x.shape) / (1 - p)
        term = (z @ lora_A.t()) @ lora_B.t() * scaling
        total = factor * (plain + term) if keep is None else plain + (factor + 1) * (z @ weight.t()) + factor * term
        return total if bias is None else total + bias

    return definition


def holds(case: Case, backend: str) -> None:
    tensors = tensors_of(case)
    dy, wanted = tensors.pop("dy"), [name for name in case.wanted if tensors[name] is not None]

    def op(x, weight, bias, lora_A, lora_B, factor):
        with autocast_to(case.autocast and KINDS[case.autocast]):
            return apply_dora(x, weight, bias, lora_A, lora_B, factor, case.scaling, case.dropout)

    problem = LoraProblem(
        **{name: each for name, each in tensors.items() if name != "factor"},
        **{"dy": dy, "scaling": case.scaling, "dropout": case.dropout},
    )
    rows = torch.Size(case.leading).numel()
    with torch.random.fork_rng(), as_if_large(case.large and backend == "torch"):
        torch.manual_seed(case.seed)
        with on(backend if problem.x.numel() * problem.lora_B.numel() else "torch"):
            keep, p = op_dropout(problem) if case.inputs else (None, 0.0)
        with on(backend, case.strategy):
            got = tried_twice(op, tensors, wanted, dy, case.seed)
    data, _, _, _, result = dtypes_of(case)
    assert got["out"].dtype == result and got["out"].shape == dy.shape

    def definition(x, weight, bias, lora_A, lora_B, factor):
        return dora_linear_reference(x, weight, bias, lora_A, lora_B, factor, case.scaling, keep, p)

    truth = outcome(definition, in_double(tensors), wanted, dy.double())
    sizes = outcome(sizes_of(abs(case.scaling), keep, p), magnitudes(tensors), wanted, dy.double().abs())
    terms = case.rank + max(rows, case.inputs, case.outputs)
    assert_rounded(got, truth, sizes, coarsest(data, result), terms)
    count("examples")


EDGES = (1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33)
SIZES, FEW = st.sampled_from((0, *EDGES, 63, 65, 100, 129)), st.sampled_from((0, *EDGES))
HALVES = ("bf16", "fp16")
ON_TORCH = cases(
    *(SIZES, st.sampled_from((*EDGES, 64, 300)), list(DTYPES), st.none()), (None, *KINDS), (None, None, *HALVES)
)
ON_TRITON = cases(
    *(FEW, st.sampled_from((*EDGES, 65, 300)), [*EXACT_IN_INTERPRETER, "fp32-fp16"]),
    *(st.none() | st.sampled_from(STRATEGIES), (None, "fp32", "fp16"), (None, None, "fp16")),
)


@tried(50, 600)
@given(ON_TORCH)
def test_dora_linear_on_torch(case):
    shown(case)
    holds(case, "torch")


@pytest.mark.interpreter
@tried(10, 300)
@given(ON_TRITON)
@example(Case(outputs=2, wanted=GRADIENTS, layouts={"factor": Layout(step=0)}))
def test_dora_linear_on_the_kernels(case):
    shown(case)
    holds(case, "triton")


def without_last_row(column_sums):
    return lambda dy, base, dtype: column_sums(dy[:-1], base[:-1], dtype)


def without_last_rows_sum(scaled_grad):
    return lambda dy, base, *given: (scaled_grad(dy, base, *given)[0], scaled_grad(dy[:-1], base[:-1], *given)[1])


FAULTS = {
    "torch": (torch_path, "column_sums", without_last_row, ON_TORCH),
    "triton": (triton_path.kernels, "scaled_grad", without_last_rows_sum, ON_TRITON),
}


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.interpreter)])
def test_a_sum_without_its_last_row_is_shown(backend, monkeypatch):
    path, name, planted, tried_cases = FAULTS[backend]
    monkeypatch.setattr(path, name, planted(getattr(path, name)))
    words = "dfactor( again)?: an error of .* times what rounding explains"
    assert_shown(tried_cases, lambda case: holds(case, backend), words)
