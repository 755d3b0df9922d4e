"""`lora_linear` on examples that nobody chose: any shapes, ranks, strides, storages, dtypes, gradients and dropout."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from fastpeft.ops import lora_linear
from fastpeft.ops.lora_linear import lora_linear_reference
from fastpeft.oracle import GRADIENTS, LoraProblem, op_dropout
from tests.counting import count
from tests.fuzz.judging import assert_rounded, in_double, magnitudes, outcome, tried_on
from tests.fuzz.layouts import CONTIGUOUS, Layout, changed, laid_out, layouts_of
from tests.fuzz.profiles import shown, tried
from tests.ops.lora_linear_cases import DTYPES as PAIRS
from tests.ops.lora_linear_cases import EXACT_IN_INTERPRETER, STRATEGIES, on

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = {**PAIRS, "fp64": (torch.float64, torch.float64), "fp32-fp16": (torch.float32, torch.float16)}
NAMES = (*GRADIENTS, "dy")


class Case(NamedTuple):
    """A call. leading: the dimensions of x before its inputs; layouts: of `NAMES`; wanted: which gradients."""

    leading: tuple[int, ...] = (2,)
    inputs: int = 1
    outputs: int = 1
    rank: int = 1
    dtypes: str = "fp32"
    bias: bool = False
    scaling: float = 1.0
    dropout: float = 0.0
    wanted: tuple[str, ...] = ()
    layouts: dict[str, Layout] = {}
    strategy: str | None = None
    seed: int = 0

    __repr__ = changed


def cases(sizes, outputs, ranks, dtypes, strategies):
    """Cases of these sizes, none of more than a few hundred rows."""
    leading = st.lists(st.integers(0, 3) | sizes, max_size=3).map(tuple)
    return st.builds(
        Case,
        leading=leading.filter(lambda shape: torch.Size(shape).numel() <= 300),
        inputs=sizes,
        outputs=outputs,
        rank=ranks,
        dtypes=st.sampled_from(dtypes),
        bias=st.booleans(),
        scaling=st.sampled_from((1.0, 0.5, 2.0, -0.7, 0.0)),
        dropout=st.sampled_from((0.0, 0.0, 0.3, 0.05, 0.9)),
        wanted=st.lists(st.sampled_from(GRADIENTS), unique=True).map(tuple),
        layouts=layouts_of(NAMES),
        strategy=strategies,
        seed=st.integers(0, 2**32 - 1),
    )


def tensors_of(case: Case) -> dict[str, torch.Tensor | None]:
    """By name, laid out; dy among them."""
    dtype, adapter = DTYPES[case.dtypes]
    generator = torch.Generator().manual_seed(case.seed)
    k, n, r = case.inputs, case.outputs, case.rank
    shapes = {
        "x": ((*case.leading, k), 1.0, dtype),
        "weight": ((n, k), k**-0.5, dtype),
        "bias": ((n,), 1.0, dtype),
        "lora_A": ((r, k), k**-0.5, adapter),
        "lora_B": ((n, r), r**-0.5, adapter),
        "dy": ((*case.leading, n), 1.0, dtype),
    }
    made = {}
    for name, (shape, deviation, of) in shapes.items():
        values = (torch.randn(shape, generator=generator) * deviation).to(of)
        made[name] = laid_out(values, case.layouts.get(name, CONTIGUOUS)) if name != "bias" or case.bias else None
    return made


def holds(case: Case, backend: str) -> None:
    tensors = tensors_of(case)
    problem = LoraProblem(**tensors, scaling=case.scaling, dropout=case.dropout)
    dy, wanted = tensors.pop("dy"), [name for name in case.wanted if tensors[name] is not None]
    with on(backend, case.strategy), torch.random.fork_rng():
        torch.manual_seed(case.seed)
        keep, p = op_dropout(problem)
        torch.manual_seed(case.seed)

        def op(**leaves):
            return lora_linear(**leaves, scaling=case.scaling, dropout=case.dropout, training=True)

        got = tried_on(op, tensors, wanted, dy)
    assert got["out"].dtype == problem.x.dtype and got["out"].shape == problem.dy.shape

    def definition(scaling):
        return lambda **leaves: lora_linear_reference(**leaves, scaling=scaling, keep=keep, p=p)

    truth = outcome(definition(case.scaling), in_double(tensors), wanted, dy.double())
    sizes = outcome(definition(abs(case.scaling)), magnitudes(tensors), wanted, dy.double().abs())
    rows = torch.Size(case.leading).numel()
    assert_rounded(got, truth, sizes, problem.x.dtype, case.rank + max(rows, case.inputs, case.outputs))
    count("examples")


EDGES = (1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33)
SIZES = st.sampled_from((*EDGES, 63, 64, 65, 100, 129))
ON_TORCH = cases(SIZES, st.just(0) | SIZES, st.sampled_from((*EDGES, 64, 300)), list(DTYPES), st.none())
ON_TRITON = cases(
    st.sampled_from(EDGES),
    st.just(0) | st.sampled_from(EDGES),
    st.sampled_from((*EDGES, 65)),
    [*EXACT_IN_INTERPRETER, "fp32-fp16"],
    st.sampled_from(STRATEGIES),
)


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
