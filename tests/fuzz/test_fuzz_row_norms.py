"""`row_norms` on examples that nobody chose: any shapes, ranks, strides, storages and dtypes, and updates that leave
little of the weight."""

import sys
from typing import NamedTuple

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from fastpeft.dispatch import backend as backend_of
from fastpeft.kernels import row_norms as kernels
from fastpeft.ops.row_norms import row_norms, row_norms_reference, wide_dtype
from tests.counting import count
from tests.fuzz.judging import assert_rounded, autocast_to, in_double, magnitudes, tried_twice
from tests.fuzz.layouts import CONTIGUOUS, Layout, changed, laid_out, layouts_of
from tests.fuzz.profiles import assert_shown, shown, tried

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64}
NAMES = ("weight", "lora_A", "lora_B")


class Case(NamedTuple):
    """A call. dtypes: of `NAMES`; left: how much of a weight the update leaves; layouts: of `NAMES`."""

    outputs: int = 1
    inputs: int = 1
    rank: int = 1
    dtypes: tuple[str, str, str] = ("fp32", "fp32", "fp32")
    scaling: float = 1.0
    left: float = 1.0
    autocast: bool = False
    wanted: tuple[str, ...] = ()
    layouts: dict[str, Layout] = {}
    seed: int = 0

    __repr__ = changed


def cases(sizes, ranks, dtypes):
    kinds = st.sampled_from(dtypes)
    return st.builds(
        Case,
        outputs=sizes,
        inputs=sizes,
        rank=ranks,
        dtypes=st.tuples(kinds, kinds, kinds),
        scaling=st.sampled_from((1.0, 0.5, 2.0, -0.7, 0.0)),
        left=st.sampled_from((1.0, 0.1, 0.001)),
        autocast=st.booleans(),
        wanted=st.lists(st.sampled_from(NAMES), unique=True).map(tuple),
        layouts=layouts_of(NAMES),
        seed=st.integers(0, 2**32 - 1),
    )


def tensors_of(case: Case) -> dict[str, torch.Tensor]:
    """By name, laid out."""
    of_weight, of_a, of_b = (DTYPES[name] for name in case.dtypes)
    generator = torch.Generator().manual_seed(case.seed)
    n, k, r = case.outputs, case.inputs, case.rank
    weight, a, b = (torch.randn(shape, generator=generator).double() for shape in ((n, k), (r, k), (n, r)))
    a, b = a.to(of_a), (b * max(1, r) ** -0.5).to(of_b)
    weight = (case.left * weight - case.scaling * b.double() @ a.double()).to(of_weight)
    given_ = zip(NAMES, (weight, a, b), strict=True)
    return {name: laid_out(each, case.layouts.get(name, CONTIGUOUS)) for name, each in given_}


def holds(case: Case, backend: str) -> None:
    tensors = tensors_of(case)

    def op(weight, lora_A, lora_B):
        with autocast_to(torch.bfloat16 if case.autocast else None):
            return row_norms(weight, lora_A, lora_B, case.scaling)

    with backend_of(backend), torch.random.fork_rng():
        got = tried_twice(op, tensors, case.wanted, torch.empty(0), case.seed)
    dtype = torch.float64 if "fp64" in case.dtypes else torch.float32
    assert got.keys() == {"out"} and got["out"].dtype == dtype, "no gradient, and never in half precision"
    truth, sizes = (
        {"out": row_norms_reference(*of.values(), scaling)}
        for of, scaling in ((in_double(tensors), case.scaling), (magnitudes(tensors), abs(case.scaling)))
    )
    assert_rounded(got, truth, sizes, dtype, case.rank + case.inputs)
    count("examples")


EDGES = (1, 2, 3, 7, 15, 16, 17, 31, 32, 33)
ON_TORCH = cases(st.sampled_from((0, *EDGES, 63, 65, 300)), st.sampled_from((0, *EDGES, 65, 300)), list(DTYPES))
ON_TRITON = cases(st.sampled_from((0, *EDGES, 63, 65, 130)), st.sampled_from((0, *EDGES, 65)), ["fp32", "fp16"])


@tried(50, 600)
@given(ON_TORCH)
@example(Case(dtypes=("fp32", "fp32", "fp64")))
def test_row_norms_on_torch(case):
    shown(case)
    holds(case, "torch")


@pytest.mark.interpreter
@tried(20, 300)
@given(ON_TRITON)
def test_row_norms_on_the_kernel(case):
    shown(case)
    holds(case, "triton")


def expanded(weight, a, b, scaling: float) -> torch.Tensor:
    """Of the square's three terms, in which the digits of a small difference are lost."""
    weight, a, b = (each.to(wide_dtype(weight, a, b)) for each in (weight, a, b))
    crossed = 2 * scaling * (weight @ a.t() * b).sum(1) + scaling**2 * ((b @ (a @ a.t())) * b).sum(1)
    return (weight.square().sum(1) + crossed).clamp(min=0).sqrt()


FAULTS = {
    "torch": (sys.modules["fastpeft.ops.row_norms"], "row_norms_torch", ON_TORCH),
    "triton": (kernels, "row_norms", ON_TRITON),
}


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.interpreter)])
def test_lost_digits_are_shown(backend, monkeypatch):
    path, name, tried_cases = FAULTS[backend]
    monkeypatch.setattr(path, name, expanded)
    words = "out: an error of .* times what rounding explains"
    assert_shown(tried_cases, lambda case: holds(case, backend), words)
