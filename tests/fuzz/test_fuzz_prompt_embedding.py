"""`prompt_embedding` and `prepend_prompt` on examples that nobody chose: any shapes, ids, strides, storages, starts,
under autocast too."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastpeft.dispatch import backend as backend_of
from fastpeft.ops import prepend_prompt, prepend_prompt_reference, prompt_embedding, prompt_embedding_reference
from tests.counting import count
from tests.fuzz.judging import assert_rounded, autocast_to, in_double, magnitudes, outcome, tried_on, unit
from tests.fuzz.layouts import CONTIGUOUS, Layout, changed, laid_out, layouts_of
from tests.fuzz.profiles import shown, tried

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64}
IDS = {"int32": torch.int32, "int64": torch.int64}


LAID_OUT = ("rows", "prompt", "ids", "start", "dout")


class Case(NamedTuple):
    """A call on a table, or with entries None on embeddings. padding: padding_idx; layouts: of `LAID_OUT`."""

    batch: int = 1
    tokens: int = 1
    count: int = 1
    hidden: int = 1
    entries: int | None = None
    by_sample: bool = False
    dtype: str = "fp32"
    prompt_dtype: str = "fp32"
    ids: str = "int64"
    start: str | None = None
    padding: int | None = None
    autocast: str | None = None
    wanted: tuple[str, ...] = ()
    layouts: dict[str, Layout] = {}
    seed: int = 0

    __repr__ = changed


@st.composite
def cases(draw, hidden, dtypes):
    """Cases of this hidden size: of any table, or none, whose ids name its rows."""
    entries = draw(st.none() | st.integers(0, 40))
    padding = st.none() if not entries else st.none() | st.integers(-entries, entries - 1)
    return Case(
        batch=draw(st.integers(0, 5)),
        tokens=draw(st.integers(0, 9) if entries != 0 else st.just(0)),
        count=draw(st.integers(1, 9)),
        hidden=draw(hidden),
        entries=entries,
        by_sample=draw(st.booleans()),
        dtype=draw(st.sampled_from(dtypes)),
        prompt_dtype=draw(st.sampled_from(dtypes)),
        ids=draw(st.sampled_from(list(IDS))),
        start=draw(st.none() | st.sampled_from(list(IDS))),
        padding=draw(padding),
        autocast=draw(st.sampled_from((None, "bf16", "fp16"))),
        wanted=draw(st.lists(st.sampled_from(("prompt", "rows")), unique=True).map(tuple)),
        layouts=draw(layouts_of(LAID_OUT)),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


def _of(start: str, results: dict) -> dict:
    return {name: each for name, each in results.items() if name.startswith(start)}


class Given(NamedTuple):
    """The tensors that may want gradients, by name; the others of a call; the gradient of its result."""

    tensors: dict[str, torch.Tensor]
    ids: torch.Tensor | None
    start: torch.Tensor | None
    dout: torch.Tensor


def given_of(case: Case) -> Given:
    """Laid out."""
    generator = torch.Generator().manual_seed(case.seed)
    dtype, batch = DTYPES[case.dtype], (case.batch, case.tokens)

    def normal(name, *shape, dtype):
        return laid_out(torch.randn(shape, generator=generator).to(dtype), case.layouts.get(name, CONTIGUOUS))

    def integers(name, below, shape, dtype):
        values = torch.randint(max(1, below), shape, generator=generator).to(IDS[dtype])
        return laid_out(values, case.layouts.get(name, CONTIGUOUS))

    rows = normal("rows", *(batch if case.entries is None else (case.entries,)), case.hidden, dtype=dtype)
    own = (case.batch,) * case.by_sample
    prompt = normal("prompt", *own, case.count, case.hidden, dtype=DTYPES[case.prompt_dtype])
    dout = normal("dout", case.batch, case.count + case.tokens, case.hidden, dtype=dtype)
    ids = None if case.entries is None else integers("ids", case.entries, batch, case.ids)
    start = None if case.start is None else integers("start", case.tokens + 1, (case.batch,), case.start)
    return Given({"rows": rows, "prompt": prompt}, ids, start, dout)


def op_of(case: Case, of: Given):
    """The call, as a function of its tensors by name."""

    def op(rows, prompt):
        with autocast_to(case.autocast and DTYPES[case.autocast]):
            if of.ids is None:
                return prepend_prompt(rows, prompt, start=of.start)
            return prompt_embedding(of.ids, rows, prompt, padding_idx=case.padding, start=of.start)

    return op


def holds(case: Case, backend: str) -> None:
    of = given_of(case)
    tensors, ids, start, dout = of

    def definition(rows, prompt):
        if not case.batch:  # nothing to put next to each other
            return rows.new_zeros(dout.shape) + 0 * (rows.sum() + prompt.sum())
        if ids is None:
            return prepend_prompt_reference(rows, prompt, start)
        return prompt_embedding_reference(ids.long(), rows, prompt, case.padding, start)

    with backend_of(backend):
        got = tried_on(op_of(case, of), tensors, case.wanted, dout, [t for t in (ids, start) if t is not None])
    eager = definition(**tensors)  # autocast changes nothing, and fails in torch's own cat if that meets the other half
    assert got["out"].is_contiguous() and got["out"].dtype == eager.dtype and torch.equal(got["out"], eager)
    truth = outcome(definition, in_double(tensors), case.wanted, dout.double())
    sizes = outcome(definition, magnitudes(tensors), case.wanted, dout.double().abs())
    own = [_of("dprompt", each) for each in (got, truth, sizes)]
    dtype = DTYPES[case.dtype]
    assert_rounded(*own, torch.promote_types(dtype, torch.float32), case.batch)  # it is summed in fp32, rounded once
    own = [_of("drows", each) for each in (got, truth, sizes)]
    if ids is None:
        assert all(torch.equal(got[name].double(), truth[name]) for name in own[0]), "drows: no copy"
    else:  # torch's own gradient, which adds up in the table's dtype
        assert_rounded(*own, dtype, case.batch * case.tokens * unit(dtype) / unit(torch.float32))
    count("examples")


HIDDEN = (1, 2, 7, 16, 31, 32, 33, 65)
ON_TORCH = cases(st.just(0) | st.sampled_from((*HIDDEN, 129)), list(DTYPES))
ON_TRITON = cases(st.just(0) | st.sampled_from(HIDDEN), ["fp32", "fp16"])


@tried(150, 1000)
@given(ON_TORCH)
def test_prompt_embedding_on_torch(case):
    shown(case)
    holds(case, "torch")


@pytest.mark.interpreter
@tried(50, 300)
@given(ON_TRITON)
def test_prompt_embedding_on_the_kernels(case):
    shown(case)
    holds(case, "triton")
