"""`prompt_embedding` and `prepend_prompt`: the result is the concatenation, bit for bit, and the prompt's gradient is
as right as eager torch's, by the criterion of `fastpeft.oracle`; every dtype, kind of prompt, shape, layout, gradient.

The Triton kernels run in the interpreter, with NaN in all uninitialised memory and 32-bit overflow an error.
"""

import dataclasses

import pytest
import torch

from fastpeft.dispatch import backend
from fastpeft.ops import prepend_prompt, prompt_embedding
from fastpeft.oracle import Bounds
from tests.ops.prompt_embedding_cases import (
    BATCH,
    COUNT,
    DOUBLE,
    DTYPES,
    ENTRIES,
    EXACT_IN_INTERPRETER,
    HIDDEN,
    LAYOUTS,
    TOKENS,
    Problem,
    assert_right,
    draw,
    results,
    with_layout,
)
from tests.traffic import count_traffic

pytestmark = pytest.mark.usefixtures("poison")
interpreted = pytest.mark.interpreter
BOTH = [pytest.param("torch"), pytest.param("triton", marks=interpreted)]
KINDS = pytest.mark.parametrize("by_sample", [False, True], ids=["shared", "by sample"])
SOURCES = pytest.mark.parametrize("embeds", [False, True], ids=["ids", "embeds"])
TRUNCATED = Bounds(rms=2.2, peak=4.0, row=4.0, gain=0.002 + 2**-8)  # as the interpreter makes a bf16 of an fp32


@SOURCES
@KINDS
@pytest.mark.parametrize("dtypes", DTYPES)
def test_torch_path(dtypes, by_sample, embeds):
    with backend("torch"):
        assert_right([draw(dtypes, seed=seed, by_sample=by_sample, embeds=embeds) for seed in range(12)])


@interpreted
@pytest.mark.usefixtures("overflow_checks")
@SOURCES
@KINDS
@pytest.mark.parametrize("dtypes", EXACT_IN_INTERPRETER)
def test_kernels(dtypes, by_sample, embeds):
    sums = 1 if by_sample or embeds else 4  # of which one draw knows little
    with backend("triton"):
        assert_right([draw(dtypes, seed=seed, by_sample=by_sample, embeds=embeds, tokens=2) for seed in range(sums)])


@interpreted
@pytest.mark.parametrize("dtypes", ["bf16", "bf16-fp32"])
def test_kernels_in_bfloat16_to_within_the_interpreters_truncation(dtypes):
    with backend("triton"):
        assert_right([draw(dtypes, seed=seed, tokens=2) for seed in range(4)], TRUNCATED, exact_out=dtypes == "bf16")


@SOURCES
@KINDS
@pytest.mark.parametrize("name", BOTH)
def test_prompts_behind_padding(name, by_sample, embeds):
    """Of no, some and all tokens of a sample; a table's gradient too."""
    options = {"by_sample": by_sample, "embeds": embeds, "starts": True}
    with backend(name):
        assert_right([draw("fp16", **options)])
        assert_right([draw("fp32-fp16", tokens=3, seed=seed, **options) for seed in range(4)])
        if not embeds:
            problem = draw(starts=True, by_sample=by_sample)
            found, expected = results(problem, table=True), results(problem, table=True, reference=True)
            torch.testing.assert_close(found["drows"], expected["drows"])


@pytest.mark.parametrize("name", BOTH)
def test_padding_of_nobody_changes_nothing(name):
    problem = draw()
    with backend(name):
        plain = results(problem)
        behind = results(dataclasses.replace(problem, start=torch.zeros(BATCH, dtype=torch.int32)))
    assert all(torch.equal(behind[key], plain[key]) for key in plain)


SHAPES = {
    "one of everything": (1, 1, 1, 1),
    "one sample": (1, 7, 3, 33),
    "two samples": (2, 7, 3, 33),
    "whole blocks": (4, 6, 2, 64),
    "one more than a block": (3, 2, 3, 33),
    "long prompt": (2, 1, 50, 5),
    "many samples": (21, 1, 2, 9),
    "no tokens": (3, 0, 4, 40),
    "no samples": (0, 5, 4, 40),
}


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(shape, name):
    """In half precision, whose fp32 sums round once: alone in fp32 the order of a sum is seen."""
    sizes = dict(zip(("batch", "tokens", "count", "hidden"), shape, strict=True))
    with backend(name):
        assert_right([draw("fp16", **sizes)])
        assert_right([draw("fp16", embeds=True, by_sample=True, **sizes)])


@KINDS
@pytest.mark.parametrize("name", BOTH)
def test_rows_of_no_width(name, by_sample):
    with backend(name):
        found = results(draw(hidden=0, by_sample=by_sample))
    assert found["out"].shape == (BATCH, COUNT + TOKENS, 0) and found["dprompt"].shape[-2:] == (COUNT, 0)


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("batch", [9, 40])
def test_sums_over_many_samples_in_fp32(batch, name):
    with backend(name):
        assert_right([draw(batch=batch, tokens=0, count=2, seed=seed) for seed in range(4)])


def test_thousands_of_virtual_tokens_in_torch():
    with backend("torch"):
        assert_right([draw("bf16-fp32", count=3000)])


@pytest.mark.parametrize("name", BOTH)
def test_both_kinds_of_ids(name):
    wide, narrow = (draw(ids=ids) for ids in (torch.int64, torch.int32))
    with backend(name):
        assert torch.equal(results(wide)["out"], results(narrow)["out"])


KIND_OF = {  # which problems each tensor's layouts are tried in
    "ids": [{}],
    "rows": [{}, {"embeds": True}],
    "prompt": [{}, {"by_sample": True}],
    "dout": [{}, {"by_sample": True, "embeds": True}],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tensor", KIND_OF)
@pytest.mark.parametrize("name", BOTH)
def test_layouts(name, tensor, layout):
    for options in KIND_OF[tensor]:
        problem = with_layout(draw(batch=3, tokens=3, **options), tensor, layout)
        copy = getattr(problem, tensor).clone(memory_format=torch.contiguous_format)
        with backend(name):
            found, expected = results(problem), results(dataclasses.replace(problem, **{tensor: copy}))
            assert found["out"].is_contiguous()
        for key in expected:
            assert torch.equal(found[key], expected[key]), key


@KINDS
@pytest.mark.parametrize("padding_idx", [None, 3, -1])
@pytest.mark.parametrize("name", BOTH)
def test_a_table_that_learns_has_torchs_own_gradient(name, padding_idx, by_sample):
    problem = draw(by_sample=by_sample, batch=3)
    table, prompt = problem.rows.requires_grad_(), problem.prompt.requires_grad_()
    expected = torch.nn.functional.embedding(problem.ids, table, padding_idx)
    (expected,) = torch.autograd.grad(expected, table, problem.dout[:, COUNT:])
    with backend(name):
        out = prompt_embedding(problem.ids, table, prompt, padding_idx=padding_idx)
        found, dprompt = torch.autograd.grad(out, (table, prompt), problem.dout)
    assert torch.equal(found, expected) and dprompt.shape == prompt.shape
    assert padding_idx is None or not found[padding_idx].any()


@pytest.mark.parametrize("wanted", ["prompt", "rows", "both"])
@pytest.mark.parametrize("name", BOTH)
def test_only_what_is_wanted_has_a_gradient(name, wanted):
    problem = draw(embeds=True, batch=2, tokens=2)  # two numbers have one sum
    expected = results(problem, reference=True)
    prompt, rows = problem.prompt, problem.rows
    prompt.requires_grad_(wanted != "rows")
    rows.requires_grad_(wanted != "prompt")
    with backend(name):
        prepend_prompt(rows, prompt).backward(problem.dout)
    assert prompt.grad is None if wanted == "rows" else torch.equal(prompt.grad, expected["dprompt"])
    assert rows.grad is None if wanted == "prompt" else torch.equal(rows.grad, expected["drows"])


@pytest.mark.parametrize("by_sample", [False, True])
@pytest.mark.parametrize("learns", [False, True])
def test_gradcheck(learns, by_sample):
    problem = draw(batch=2, tokens=3, count=2, hidden=4, entries=5, by_sample=by_sample)
    table, prompt = problem.rows.double().requires_grad_(learns), problem.prompt.double().requires_grad_()
    embeds = torch.randn(2, 3, 4, dtype=DOUBLE, requires_grad=learns)
    assert torch.autograd.gradcheck(lambda *leaves: prompt_embedding(problem.ids, *leaves), (table, prompt))
    assert torch.autograd.gradcheck(prepend_prompt, (embeds, prompt))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("tensor", ["rows", "prompt", "dout"])
@pytest.mark.parametrize("name", BOTH)
def test_what_is_not_finite_stays_where_it_is(name, tensor, value):
    problem = draw(batch=2, tokens=4)
    problem.ids[1, 2] = 1
    getattr(problem, tensor)[1] = value
    with backend(name):
        found, expected = results(problem), results(problem, reference=True)
    for key in expected:
        assert torch.equal(found[key].isfinite(), expected[key].isfinite()), key
    assert sum(not t.isfinite().all() for t in found.values()) == 1


# Ids outside of the table

OUTSIDE = [-1, -ENTRIES, ENTRIES, 2**31 - 1]


@pytest.mark.parametrize("bad", OUTSIDE)
def test_an_id_outside_the_table_is_an_index_error_in_torch(bad):
    problem = draw()
    problem.ids[2, 4] = bad
    with backend("torch"), pytest.raises(IndexError, match="out of range"):
        prompt_embedding(problem.ids, problem.rows, problem.prompt)


@interpreted
@pytest.mark.parametrize(
    ("bad", "ids"), [*((bad, torch.int32) for bad in OUTSIDE), *((bad, torch.int64) for bad in (-1, 2**40, -(2**63)))]
)
def test_the_kernels_read_nothing_for_an_id_outside_the_table(bad, ids):
    """The row is NaN, its neighbours are right, and no address outside of the table is touched (tests/traffic.py)."""
    problem = draw(batch=3, tokens=5, ids=ids)
    expected = results(problem)["out"]
    problem.ids[2, 4] = bad
    with backend("triton"), count_traffic() as traffic:
        out = prompt_embedding(problem.ids, problem.rows, problem.prompt)
    assert out[2, COUNT + 4].isnan().all()
    out[2, COUNT + 4] = expected[2, COUNT + 4]
    assert torch.equal(out, expected)
    assert traffic.loaded(problem.rows) == (3 * 5 - 1) * HIDDEN * 4


@interpreted
def test_offsets_of_more_than_32_bits():
    """Rows that lie 2**30 elements apart, in a storage of which only those are ever touched."""
    from fastpeft.kernels import prompt_embedding as kernels

    fill, torch.utils.deterministic.fill_uninitialized_memory = (
        torch.utils.deterministic.fill_uninitialized_memory,
        False,
    )
    try:
        storage = torch.empty(3 * 2**30, dtype=torch.float16)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
    table = storage.as_strided((3, HIDDEN), (2**30, 1))
    table.copy_(draw("fp16", entries=3).rows)
    ids, prompt = torch.tensor([[2, 0, 1], [2, 2, 1]]), table[1:].clone()
    alone = table.clone()
    expected = torch.cat((prompt.expand(2, -1, -1), alone[ids]), 1)
    assert torch.equal(kernels.prepend(ids, table, prompt), expected)
    by_sample = table[:, None]  # 3 samples of one row each
    assert torch.equal(kernels.prepend(None, by_sample, by_sample), alone[:, None].expand(3, 2, HIDDEN))
    dout = table[:, None].expand(3, 2, HIDDEN)
    assert torch.equal(
        kernels.grad_prompt(dout, 1, torch.float32), kernels.grad_prompt(alone[:, None], 1, torch.float32)
    )


def test_problems_are_what_they_say():
    """So that a layout or a draw that lost its point is seen."""
    problem = draw(by_sample=True)
    assert problem.prompt.shape == (BATCH, COUNT, HIDDEN) and problem.ids.unique().numel() > 5
    for layout in LAYOUTS:
        assert isinstance(changed := with_layout(problem, "rows", layout), Problem)
        assert not changed.rows.is_contiguous() or layout == "batch-last"
