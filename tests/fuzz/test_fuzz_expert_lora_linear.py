"""`expert_lora_linear` on examples that nobody chose: any experts, some without rows, any adapters (none, too),
strides, storages, dtypes and gradients, under autocast, which changes nothing."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from fastpeft.ops import _expert_lora_linear_torch as torch_path
from fastpeft.ops import _expert_lora_linear_triton as triton_path
from fastpeft.ops.expert_lora_linear import apply_expert_lora, expert_lora_linear_reference
from tests.counting import count
from tests.fuzz.judging import assert_rounded, autocast_to, in_double, magnitudes, outcome, tried_twice
from tests.fuzz.large import as_if_large
from tests.fuzz.layouts import CONTIGUOUS, Layout, changed, laid_out, layouts_of
from tests.fuzz.profiles import assert_shown, shown, tried
from tests.ops.lora_linear_cases import DTYPES as PAIRS
from tests.ops.lora_linear_cases import EXACT_IN_INTERPRETER, on

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = {**PAIRS, "fp64": (torch.float64, torch.float64), "fp32-fp16": (torch.float32, torch.float16)}
ENDS = {"int32": torch.int32, "int64": torch.int64}
SHARED = ("x", "weight", "bias", "ends", "dy")


class Adapter(NamedTuple):
    rank: int = 1
    scaling: float = 1.0
    layouts: dict[str, Layout] = {}  # of A and B

    __repr__ = changed


class Case(NamedTuple):
    """A call. rows: of each expert how many; large: as if its tensors were; layouts: of `SHARED`; wanted: which
    gradients, by name."""

    rows: tuple[int, ...] = (2,)
    inputs: int = 1
    outputs: int = 1
    adapters: tuple[Adapter, ...] = (Adapter(),)
    dtypes: str = "fp32"
    ends: str = "int64"
    bias: bool = False
    autocast: bool = False
    large: bool = False
    wanted: tuple[str, ...] = ()
    layouts: dict[str, Layout] = {}
    seed: int = 0

    __repr__ = changed


ADAPTERS = 2
NAMES = ("x", "weight", "bias", *(f"{letter}{i}" for letter in "AB" for i in range(ADAPTERS)))


def cases(sizes, ranks, dtypes):
    """Cases of these sizes, of up to five experts and two adapters."""
    adapter = st.builds(Adapter, ranks, st.sampled_from((1.0, 0.5, -0.7, 0.0)), layouts_of("AB"))
    return st.builds(
        Case,
        rows=st.lists(st.sampled_from((0, 0, 1, 2, 3, 15, 16, 17, 33)), min_size=1, max_size=5).map(tuple),
        inputs=sizes,
        outputs=sizes,
        adapters=st.lists(adapter, max_size=ADAPTERS).map(tuple),
        dtypes=st.sampled_from(dtypes),
        ends=st.sampled_from(list(ENDS)),
        bias=st.booleans(),
        autocast=st.booleans(),
        large=st.booleans(),
        wanted=st.just(NAMES) | st.lists(st.sampled_from(NAMES), unique=True).map(tuple),
        layouts=layouts_of(SHARED),
        seed=st.integers(0, 2**32 - 1),
    )


class Given(NamedTuple):
    """The tensors that may want gradients, by name; where experts' rows end; the gradient of the result."""

    tensors: dict[str, torch.Tensor]
    ends: torch.Tensor
    dy: torch.Tensor


def given_of(case: Case) -> Given:
    """Laid out, of a weight stored in any order."""
    data, adapter = DTYPES[case.dtypes]
    generator = torch.Generator().manual_seed(case.seed)
    e, k, n = len(case.rows), case.inputs, case.outputs

    def normal(layouts, name, *shape, deviation=1.0, dtype=data):
        values = (torch.randn(shape, generator=generator) * deviation).to(dtype)
        return laid_out(values, layouts.get(name, CONTIGUOUS))

    tensors = {
        "x": normal(case.layouts, "x", sum(case.rows), k),
        "weight": normal(case.layouts, "weight", e, n, k, deviation=k**-0.5),
        "bias": normal(case.layouts, "bias", e, n) if case.bias else None,
    }
    for i, (r, _, layouts) in enumerate(case.adapters):
        tensors[f"A{i}"] = normal(layouts, "A", e * r, k, deviation=k**-0.5, dtype=adapter)
        tensors[f"B{i}"] = normal(layouts, "B", n, r * e, deviation=r**-0.5, dtype=adapter)
    ends = torch.tensor(case.rows).cumsum(0).to(ENDS[case.ends])
    layout = case.layouts.get("ends", CONTIGUOUS)._replace(expand=None)  # they rise
    return Given(tensors, laid_out(ends, layout), normal(case.layouts, "dy", sum(case.rows), n))


def adapters_of(case: Case, leaves: dict) -> list[tuple]:
    return [(leaves[f"A{i}"], leaves[f"B{i}"], each.scaling) for i, each in enumerate(case.adapters)]


def definition_of(case: Case, ends: torch.Tensor, sign):
    """Of the result, for autograd: the base's, and what each adapter adds. sign: of a scaling."""

    def definition(x, weight, bias, **matrices):
        experts, outputs, inputs = weight.shape
        none = x.new_zeros(experts, inputs), x.new_zeros(outputs, experts), 0.0
        total = expert_lora_linear_reference(x, weight, bias, *none, ends)
        for a, b, scaling in adapters_of(case, matrices):
            total = total + expert_lora_linear_reference(x, torch.zeros_like(weight), None, a, b, sign(scaling), ends)
        return total

    return definition


def op_of(case: Case, ends: torch.Tensor):
    def op(x, weight, bias, **matrices):
        with autocast_to(torch.bfloat16 if case.autocast else None):
            return apply_expert_lora(x, weight, bias, adapters_of(case, matrices), ends)

    return op


def holds(case: Case, backend: str) -> None:
    tensors, ends, dy = given_of(case)
    op, wanted = op_of(case, ends), [name for name in case.wanted if tensors.get(name) is not None]
    with on(backend), torch.random.fork_rng(), as_if_large(case.large and backend == "torch"):
        got = tried_twice(op, tensors, wanted, dy, case.seed, [ends])
    data = DTYPES[case.dtypes][0]
    assert got["out"].dtype == data and got["out"].shape == dy.shape
    truth = outcome(definition_of(case, ends, float), in_double(tensors), wanted, dy.double())
    sizes = outcome(definition_of(case, ends, abs), magnitudes(tensors), wanted, dy.double().abs())
    terms = max((each.rank for each in case.adapters), default=0) + max(*case.rows, case.inputs, case.outputs)
    # To one product the adapters are added in turn, to the result and to the gradient of x.
    assert_rounded(got, truth, sizes, data, terms, {name: max(1, len(case.adapters)) for name in ("out", "dx")})
    count("examples")


EDGES = (1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33)
ON_TORCH = cases(st.sampled_from((*EDGES, 63, 65, 100)), st.sampled_from((*EDGES, 64, 300)), list(DTYPES))
ON_TRITON = cases(*(st.sampled_from(EDGES), st.sampled_from((*EDGES, 65)), [*EXACT_IN_INTERPRETER, "fp32-fp16"]))


@tried(50, 600)
@given(ON_TORCH)
def test_expert_lora_linear_on_torch(case):
    shown(case)
    holds(case, "torch")


@pytest.mark.interpreter
@tried(10, 300)
@given(ON_TRITON)
@example(Case(rows=(0, 1), adapters=(Adapter(layouts={"A": Layout(step=0)}),), wanted=NAMES))
def test_expert_lora_linear_on_the_kernels(case):
    shown(case)
    holds(case, "triton")


def without_last_row(transposed_product):
    return lambda t, x: transposed_product(t[:-1], x[:-1])


def without_scaling(layout_of):
    return lambda experts, rank, scaling, rows: layout_of(experts, rank, 1.0, rows)


FAULTS = {
    "torch": (torch_path, "transposed_product", without_last_row, ON_TORCH),
    "triton": (triton_path, "layout_of", without_scaling, ON_TRITON),
}


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.interpreter)])
def test_a_planted_fault_is_shown(backend, monkeypatch):
    path, name, planted, tried_cases = FAULTS[backend]
    monkeypatch.setattr(path, name, planted(getattr(path, name)))
    assert_shown(tried_cases, lambda case: holds(case, backend), "an error of .* times what rounding explains")
