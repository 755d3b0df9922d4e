"""`prompt_embedding`'s compiled kernels on a GPU: copies bit for bit and sums by the criterion of `fastpeft.oracle` at
larger, odd sizes and in bf16, and what only a GPU can show: determinism, 64-bit offsets, CUDA graphs, the allocator."""

import dataclasses

import pytest
import torch

from fastpeft.dispatch import backend
from fastpeft.ops import prepend_prompt, prompt_embedding
from fastpeft.oracle import Bounds
from tests.cuda.launches import assert_replays
from tests.ops.prompt_embedding_cases import DTYPES, LAYOUTS, assert_right, draw, op_on, results, with_layout

pytestmark = pytest.mark.cuda

DEVICE = "cuda"
SIZES = {"batch": 5, "tokens": 331, "count": 30, "hidden": 1031, "entries": 5003}
ALIGNED = {"batch": 4, "tokens": 512, "count": 30, "hidden": 4096, "entries": 32000}
KINDS = pytest.mark.parametrize("by_sample", [False, True], ids=["shared", "by sample"])
SOURCES = pytest.mark.parametrize("embeds", [False, True], ids=["ids", "embeds"])
# fp32 sums of a few numbers in another order: the worst row's error is that of one or two of them.
SINGLE = Bounds(rms=1.25, peak=3.0, row=3.0)


def drawn(dtypes="bf16-fp32", sizes=SIZES, **options):
    return draw(dtypes, device=DEVICE, **sizes | options)


@SOURCES
@KINDS
@pytest.mark.parametrize("sizes", [SIZES, ALIGNED], ids=["odd", "aligned"])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_as_right_as_eager(dtypes, sizes, by_sample, embeds):
    with backend("triton"):
        assert_right([drawn(dtypes, sizes, by_sample=by_sample, embeds=embeds)], SINGLE)


@SOURCES
@KINDS
@pytest.mark.parametrize("name", ["triton", "torch"])
def test_behind_padding(name, by_sample, embeds):
    with backend(name):
        assert_right([drawn(by_sample=by_sample, embeds=embeds, starts=True)], SINGLE)


@pytest.mark.parametrize("change", [
    {"batch": 1}, {"batch": 300, "tokens": 3}, {"tokens": 0}, {"tokens": 1, "count": 1}, {"count": 3000},
    {"hidden": 1}, {"hidden": 48}, {"hidden": 8192}, {"hidden": 2049}, {"ids": torch.int32},
], ids=str)  # fmt: skip
def test_sizes(change):
    with backend("triton"):
        assert_right([drawn(**change)], SINGLE)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tensor", ["ids", "rows", "prompt", "dout"])
def test_layouts(tensor, layout):
    problem = with_layout(draw("bf16-fp32", **SIZES | {"tokens": 33}), tensor, layout)
    fields = [field.name for field in dataclasses.fields(problem)]
    there = {name: tensor for name in fields if (tensor := getattr(problem, name)) is not None}
    moved = {name: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=DEVICE) for name, t in there.items()}
    for name, t in there.items():
        if 0 in t.stride():  # nothing is written to a tensor that overlaps itself
            moved[name] = LAYOUTS[layout](t.to(DEVICE))
        else:
            moved[name].copy_(t)
    with backend("triton"):
        assert_right([dataclasses.replace(problem, **moved)], SINGLE)


@pytest.mark.parametrize("bad", [-1, 5003, 2**40, -(2**63)])
def test_an_id_outside_the_table_reads_nothing_and_gives_a_row_of_nan(bad):
    problem = drawn(batch=3, tokens=7)
    expected = results(problem)["out"]
    problem.ids[1, 4] = bad
    with backend("triton"):
        out = prompt_embedding(problem.ids, problem.rows, problem.prompt)
    place = SIZES["count"] + 4
    assert out[1, place].isnan().all()
    out[1, place] = expected[1, place]
    assert torch.equal(out, expected)


def test_on_the_gpu_triton_is_what_auto_means():
    problem = drawn("fp32")
    with backend("auto"):
        automatic = results(problem)
    with backend("triton"):
        for name, tensor in results(problem).items():
            assert torch.equal(automatic[name], tensor)


@SOURCES
def test_the_torch_backend_gives_the_same_rows(embeds):
    problem = drawn(embeds=embeds)
    with backend("torch"):
        assert_right([problem], SINGLE)


def test_fifty_repeats_are_equal_bit_for_bit():
    problem = drawn("fp32", batch=67)
    with backend("triton"):
        first = results(problem)
        for _ in range(50):
            for name, tensor in results(problem).items():
                assert torch.equal(first[name], tensor), name


@pytest.mark.parametrize("by_sample", [False, True])
def test_a_table_that_learns(by_sample):
    problem = drawn(by_sample=by_sample)
    with backend("triton"):
        found = results(problem, table=True)["drows"]
    expected = results(problem, reference=True, table=True)["drows"]
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)  # bf16 sums of torch's, in an order of its own


def test_cuda_graphs():
    problem = drawn(sizes=ALIGNED)
    op, (prompt, _) = op_on(problem)

    def step():
        out = op(prompt, problem.rows)
        return out.detach(), *torch.autograd.grad(out, prompt, problem.dout)

    with backend("triton"):
        assert_replays(step)


@SOURCES
def test_compiled_as_one_graph(embeds):
    problem = drawn(embeds=embeds)
    op, leaves = op_on(problem)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    torch._dynamo.reset()
    outs = op(*leaves), torch.compile(op, fullgraph=True)(*leaves)
    gradients = [torch.autograd.grad(out, wanted, problem.dout) for out in outs]
    assert torch.equal(*outs) and all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


@SOURCES
def test_the_allocator_hands_out_the_result_and_nothing_beside_it(embeds):
    problem = drawn(sizes=ALIGNED, embeds=embeds)
    op, leaves = op_on(problem)
    with backend("triton"):
        op(*leaves)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = op(*leaves)
        assert torch.cuda.max_memory_allocated() - before <= out.nbytes + 512
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(out, leaves[0], problem.dout)
        assert torch.cuda.max_memory_allocated() - before <= problem.prompt.nbytes + 512


@pytest.mark.xdist_group("large")  # one after the other
def test_offsets_beyond_32_bits():
    """A result of more than 2**31 elements, whose last rows are looked at, from a table and a gradient as large."""
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    batch, tokens, count, hidden, entries = 3, 90_000, 30, 8192, 270_000
    table = torch.zeros(entries, hidden, dtype=torch.bfloat16, device=DEVICE)
    table[-5:].normal_()
    prompt = torch.randn(count, hidden, device=DEVICE, requires_grad=True)
    ids = torch.full((batch, tokens), entries - 1, device=DEVICE)
    ids[-1, -3:] = torch.arange(entries - 4, entries - 1, device=DEVICE)
    with backend("triton"):
        out = prompt_embedding(ids, table, prompt)
        assert out.numel() > 2**31 and table.numel() > 2**31
        assert torch.equal(out[-1, -3:], table[-4:-1]) and torch.equal(out[0, -1], table[-1])
        assert torch.equal(out[-1, :count], prompt.detach().bfloat16())
        dout = out.detach().fill_(0)  # nothing was saved of it
        dout[-1, :count], dout[0, :count] = 2.0, 1.0
        (dprompt,) = torch.autograd.grad(out, prompt, dout)
        assert (dprompt == 3.0).all()
        del out, table
        again = prepend_prompt(dout[:, count:], prompt)
        assert torch.equal(again[-1, :count], prompt.detach().bfloat16()) and not again[-1, count:].any()
