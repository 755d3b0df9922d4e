"""`prefix_attention` on examples that nobody chose: any shapes, masks, biases, strides and storages."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fastpeft.plans import ATTENTION_STRATEGIES
from tests.fuzz.attention import DTYPES, KINDS, Case, cases, holds
from tests.fuzz.layouts import Layout
from tests.fuzz.profiles import shown, tried

pytestmark = pytest.mark.usefixtures("poisoned")

EDGES = (1, 2, 3, 7, 15, 16, 17)
GATES = st.none()
ON_TORCH = cases(
    st.sampled_from((*EDGES, 31, 33, 70)), st.sampled_from((1, 3, 8, 16, 20, 40)), list(DTYPES), st.none(), GATES
)
ON_TRITON = cases(
    st.sampled_from(EDGES),
    st.sampled_from((1, 8, 20)),
    ["fp32", "fp16"],
    st.none() | st.sampled_from(ATTENTION_STRATEGIES),
    GATES,
)
CAST_ON_TORCH = cases(
    *(st.sampled_from(EDGES), st.sampled_from((1, 3, 8, 20)), list(DTYPES), st.none(), GATES),
    autocasts=("bf16", "fp16"),
    prefix_dtypes=(None, *KINDS),
)
CAST_ON_TRITON = cases(
    *(st.sampled_from(EDGES), st.sampled_from((1, 8, 20)), ["fp32", "fp16"]),
    *(st.none() | st.sampled_from(ATTENTION_STRATEGIES), GATES),
    autocasts=("fp16",),
    prefix_dtypes=(None, "fp32", "fp16"),
)


@tried(150, 1000)
@given(ON_TORCH)
def test_prefix_attention_on_torch(case):
    shown(case)
    holds(case, "torch")


@pytest.mark.interpreter
@tried(40, 200)
@given(ON_TRITON)
@example(Case(heads_of_group=2, queries=3, keys=3, sinks=True, layouts={"sinks": Layout(step=0)}))
@example(Case(heads_of_group=2, queries=1, keys=3, sinks=True, layouts={"sinks": Layout(step=0)}))
@example(Case(keys=2, causal=False, start=0, positions=True, window=6, seed=2))
@example(Case(queries=2, keys=2, positions=True, window=6, wanted=("query", "prefix_key"), seed=2))
def test_prefix_attention_on_the_kernels(case):
    shown(case)
    holds(case, "triton")


@tried(40, 600)
@given(CAST_ON_TORCH)
@example(Case(groups=2, keys=16, dtype="fp16", autocast="bf16", causal=False, alibi=True, wanted=("query", "key")))
@example(Case(groups=2, keys=16, dtype="bf16", autocast="fp16", causal=False, alibi=True, wanted=("query", "key")))
def test_prefix_attention_under_autocast_on_torch(case):
    shown(case)
    holds(case, "torch")


@pytest.mark.interpreter
@tried(6, 300)
@given(CAST_ON_TRITON)
def test_prefix_attention_under_autocast_on_the_kernels(case):
    shown(case)
    holds(case, "triton")
