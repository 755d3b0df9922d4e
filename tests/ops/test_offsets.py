"""More than 2**31 elements: no kernel computes an address in 32 bits.

Shown three ways. Every tensor that a kernel reads, stretched along each of its dimensions so that its last elements are
2**31 apart; the last program of a grid whose output has that many elements; and, in `test_aot.py`, the IR of every
kernel that ships, read by the lint of `tests/ttir.py`. Integer overflow in the interpreter raises, and the bits must be
those of the same call in small. `prompt_embedding`'s reads are stretched in `test_prompt_embedding.py`.
"""

import pytest
import torch
import triton
import triton.language as tl

from fastpeft.attention_oracle import GRADIENTS, AttentionProblem, _op
from fastpeft.dispatch import Plan, backend, override_plan
from fastpeft.kernels import (
    _segments,
    lora_linear,
    lora_projections,
    mixed_lora_linear,
    prefix_attention,
    prompt_embedding,
)
from fastpeft.ops._prefix_attention_scores import Scores, Tensors
from fastpeft.ops.lora_linear import apply_lora
from tests.counting import count, how_many
from tests.far import LENGTH, Far, last_programs
from tests.ops import lora_mlp_cases as mlp
from tests.ops import lora_projections_cases as projections
from tests.ops import mixed_lora_linear_cases as mixed
from tests.ttir import narrow_offsets, narrow_products

HALF = torch.float16
N = LENGTH
pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("overflow_checks")]


def normal(*shape) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(HALF)


def bits(function, leaves: dict, dout: torch.Tensor) -> list[torch.Tensor]:
    """The result of function(leaves) and the gradients of all of them, under one seed."""
    leaves = {name: t.detach().requires_grad_() for name, t in leaves.items()}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        out = function(leaves)
        return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), dout)]


def assert_far_as_near(function, leaves: dict, dout: torch.Tensor, name: str, dim: int, plan: str | None) -> None:
    with backend("triton"), override_plan(Plan(plan, plan, "forced by a test") if plan else None):
        near = bits(function, leaves, dout)
        given = {**leaves, "dout": dout}
        given[name] = Far(HALF).far(given[name], dim)
        far = bits(function, {each: given[each] for each in leaves}, given["dout"])
    assert any(t.any() for t in near[1:])
    for i, pair in enumerate(zip(near, far, strict=True)):
        assert torch.equal(*pair), i
    count("tensors of 2**31 elements")


def lora(leaves: dict) -> torch.Tensor:
    shared = [leaves.get(name) for name in ("x", "weight", "bias", "residual")]
    return apply_lora(*shared, leaves["a"], leaves["b"], 0.5, 0.3)


LORA = {"x": normal(N, N), "a": normal(N, N), "b": normal(N, N)}
BASE = {**LORA, "weight": normal(N, N), "bias": normal(N)}
MATRICES = [*((BASE, name, dim) for name in ("x", "weight", "a", "b", "dout") for dim in (0, 1)), (BASE, "bias", 0)]
MATRICES += [({**LORA, "residual": normal(N, N)}, "residual", dim) for dim in (0, 1)]


@pytest.mark.parametrize(
    ("leaves", "name", "dim"), MATRICES[:: how_many(2, 1)], ids=lambda value: "" if isinstance(value, dict) else None
)
def test_lora_linear(leaves, name, dim):
    assert_far_as_near(lora, leaves, normal(N, N), name, dim, "fused")


STREAMED = [(name, dim, False) for name in ("x", "residual", "dout") for dim in (0, 2)]
SHARED = [(name, dim, True) for name in ("weight", "A1", "B1") for dim in (0, 1)]
SHARED += [("bias", 0, True), ("A0", 1, True), ("B0", 0, True)]  # the first adapter has rank 2


@pytest.mark.parametrize(("name", "dim", "base"), STREAMED + SHARED)
def test_mixed_lora_linear(name, dim, base):
    problem = mixed.draw("fp16", shape=(1, N), outputs=N, ranks=(2, 3), rows=(1, 0, -1), dropout=True, base=base)
    leaves = {each: t.detach() for each, t in problem.leaves().items()}
    assert_far_as_near(lambda given: mixed.call(problem, given), leaves, normal(N, 1, N), name, dim, None)


OF_TWO = [(name, dim) for name in ("x", "weight1", "A1", "B1") for dim in (0, 1)] + [
    ("bias0", 0),
    ("dout", 1),
    ("dout", 2),
]


@pytest.mark.parametrize("held", [True, False], ids=["held", "apart"])
@pytest.mark.parametrize(("name", "dim"), OF_TWO[:: how_many(2, 1)])
def test_lora_projections(name, dim, held, monkeypatch):
    """With the rank-r terms of dX beside dA, and apart from it."""
    monkeypatch.setattr(lora_projections, "holds_tail", lambda rank, mode: held)
    prepare = lora_projections._grad_all_columns_launch.__wrapped__  # which keeps nothing
    monkeypatch.setattr(lora_projections, "_grad_all_columns_launch", prepare)
    problem = projections.draw("fp16", shape=(N, N), outputs=(N, N), ranks=(2, N), dropout=True)
    leaves = {each: t.detach() for each, t in problem.leaves().items()}
    stacked = lambda given: torch.stack(projections.call(problem, given))  # noqa: E731
    assert_far_as_near(stacked, leaves, normal(2, N, N), name, dim, "prewrite")


SIDES = [(name, dim) for name in ("x", "gate.lora_A", "up.lora_B", "down.lora_A", "down.lora_B") for dim in (0, 1)]
SIDES += [("gate.bias", 0), ("dout", 0), ("dout", 1)]


@pytest.mark.parametrize(("name", "dim"), SIDES[:: how_many(2, 1)])
def test_lora_mlp(name, dim):
    problem = mlp.draw("fp16", shape=(N, N), inner=N, outputs=N, ranks=(N, N, N), dropout=True)
    leaves = {each: t.detach() for each, t in problem.leaves().items()}
    assert_far_as_near(lambda given: mlp.call(problem, given), leaves, normal(N, N), name, dim, "prewrite")


ROWS = {"query": (N, N, N, N), "key": (N, N, N, N), "value": (N, N, N, N)}
VIRTUAL = {"prefix_key": (N, N, N, N), "prefix_value": (N, N, N, N)}
BIASES = {"bias": (N, N, N, N), "prefix_bias": (N, N, N, N)}
STRETCHED = [(name, dim) for name in (*ROWS, *VIRTUAL, *BIASES, "dout") for dim in range(4)]


def attention(shapes: dict, name: str, dim: int, plan: str, **more) -> None:
    few = {0: 1 if dim else N, 1: N if dim == 1 else 1}  # samples and heads, where they are not what is stretched
    shapes = {each: (few[0], few[1], *shape[2:]) if len(shape) == 4 else (few[1],) for each, shape in shapes.items()}
    leaves = {each: normal(*shape) for each, shape in shapes.items()}
    problem = AttentionProblem(*(leaves[each] for each in (*ROWS, *VIRTUAL)), None, **more)
    blank = dict.fromkeys(GRADIENTS)
    assert_far_as_near(
        lambda given: _op(problem, {**blank, **given}), leaves, normal(*shapes["query"]), name, dim, plan
    )


@pytest.mark.parametrize(("name", "dim"), STRETCHED[:: how_many(3, 1)])
def test_prefix_attention(name, dim):
    attention({**ROWS, **VIRTUAL, **BIASES}, name, dim, "fused", dropout=0.3)


OF_ONE_QUERY = [(name, dim) for name, dim in STRETCHED[:20] if (name, dim) != ("query", 2)]


@pytest.mark.parametrize(("name", "dim"), OF_ONE_QUERY[how_many(2, 0) :: how_many(3, 1)])
def test_one_query(name, dim):
    attention({**ROWS, **VIRTUAL, "query": (N, N, 1, N)}, name, dim, "decode")


@pytest.mark.parametrize(
    ("name", "dim"),
    [("query", 2), ("prefix_key", 1), ("prefix_key", 2), ("prefix_value", 0), ("prefix_value", 3), ("dout", 0)],
)
def test_gated_prompt_attention(name, dim):
    attention({**ROWS, **VIRTUAL, "gate": (N,)}, name, dim, "fused", gate=normal(1))


# Outputs of more than 2**31 elements, of which only the last tile is made


def test_the_end_of_a_large_product():
    rows, columns = (1 << 16) + 16, 1 << 15
    p, q, residual = normal(rows, 3), normal(columns, 3), normal(columns).expand(rows, -1)
    with last_programs():
        out = lora_linear.tail(p, q, HALF, residual=residual)
    assert out.numel() > 1 << 31
    assert torch.equal(out[-16:, -32:], lora_linear.tail(p[-16:], q[-32:], HALF, residual=residual[-16:, -32:]))


def test_the_end_of_a_large_low_rank_product():
    rows = (1 << 23) + 16
    x, a = normal(1, 5).expand(rows, -1), normal(256, 5)
    with last_programs():
        out = lora_linear.shrink(x, a, 0.5, HALF)
    assert out.numel() > 1 << 31
    assert torch.equal(out[-16:], lora_linear.shrink(x[-16:], a, 0.5, HALF))


def test_the_end_of_a_large_sum_of_terms():
    rows, columns = (1 << 16) + 16, 1 << 15
    t, a = [normal(rows, 3), normal(rows, 2)], [normal(3, columns), normal(2, columns)]
    with last_programs():
        out = lora_projections.tail_all(t, a, [None, None], HALF, HALF)
    assert out.numel() > 1 << 31
    t, a = [each[-16:] for each in t], [each[:, -32:] for each in a]
    assert torch.equal(out[-16:, -32:], lora_projections.tail_all(t, a, [None, None], HALF, HALF))


def test_the_end_of_large_low_rank_products_of_projections():
    """The second's S lies behind 2**31 elements of the first's."""
    rows = (1 << 23) + 16
    x, a = normal(1, 5).expand(rows, -1), [normal(256, 5), normal(3, 5)]
    with last_programs():
        first, second = lora_projections.shrink_all(x, a, HALF, [None, None])
    assert first.numel() > 1 << 31
    for found, expected in zip(
        (first, second), lora_projections.shrink_all(x[-16:], a, HALF, [None, None]), strict=True
    ):
        assert expected.all() and torch.equal(found[-16:], expected)


def test_the_end_of_large_gradients_of_projections():
    t, x = [normal(1, 256), normal(1, 3)], torch.empty(1, WIDE, dtype=HALF)
    a = [torch.empty(256, WIDE, dtype=HALF), torch.empty(3, WIDE, dtype=HALF)]
    x[:, -32:] = normal(32)
    with last_programs():
        (*_, second), _ = lora_projections.grad_all_columns(t, x, a, [None, None], with_tail=False)
    small = [each[:, -32:] for each in a]
    (*_, expected), _ = lora_projections.grad_all_columns(t, x[:, -32:], small, [None, None], with_tail=False)
    assert second.storage_offset() > 1 << 31
    assert expected.all() and torch.equal(second[2, -32:], expected[2])


def test_the_end_of_a_large_mixed_product():
    rows, columns = (1 << 16) + 16, 1 << 15
    layout = _segments.Layout(((0,),), (), rows, (3,), (0.5,), (0.0,))
    small = layout._replace(tokens=16)
    p, q = normal(rows, 3), normal(columns * 3)
    out = torch.empty(rows, columns, dtype=HALF)
    with last_programs():
        mixed_lora_linear.expand(p.view(-1), q, layout, out, HALF, of_b=True)
    assert out.numel() > 1 << 31
    expected = torch.empty(16, 32, dtype=HALF)
    mixed_lora_linear.expand(p[-16:].reshape(-1), q[-32 * 3 :], small, expected, HALF, of_b=True)
    assert torch.equal(out[-16:, -32:], expected)


WIDE = (1 << 23) + 32  # columns, which times 256 ranks are more than 2**31
OF_B = pytest.mark.parametrize("of_b", [False, True], ids=["A", "B"])


def _one_adapter(rank: int, tokens: int) -> _segments.Layout:
    return _segments.Layout(((0,),), (), tokens, (rank,), (0.5,), (0.0,))


def _behind_a_wide_one(of_b: bool) -> tuple[_segments.Layout, torch.Tensor, torch.Tensor]:
    """(a layout of an adapter of rank 256 and one of rank 3, on a row each; their matrices of WIDE columns, of which
    only the second's last 32 are made; these alone)."""
    layout = _segments.Layout(((0,), (1,)), (), 1, (256, 3), (2.0, 0.5), (0.0, 0.0))
    matrices, end = torch.empty(259 * WIDE, dtype=HALF), normal(3 * 32)
    if of_b:
        matrices[-3 * 32 :] = end
    else:
        matrices.view(259, WIDE)[256:, -32:] = end.view(3, 32)
    return layout, matrices, end


@OF_B
def test_the_end_of_large_mixed_matrices_expanded(of_b):
    layout, matrices, end = _behind_a_wide_one(of_b)
    p, out, expected = normal(259), torch.empty(2, WIDE, dtype=HALF), torch.empty(1, 32, dtype=HALF)
    with last_programs():
        mixed_lora_linear.expand(p, matrices, layout, out, HALF, of_b=of_b)
    mixed_lora_linear.expand(p[256:], end, _one_adapter(3, 1), expected, HALF, of_b=of_b)
    assert expected.all() and torch.equal(out[1:, -32:], expected)


@OF_B
def test_the_end_of_large_mixed_matrices_shrunk(of_b, monkeypatch):
    layout, matrices, end = _behind_a_wide_one(of_b)
    x = torch.empty(2, WIDE, dtype=HALF)
    x[1, -32:] = normal(32)
    expected = mixed_lora_linear.shrink(x[1:, -32:], end, _one_adapter(3, 1), of_b=of_b)
    monkeypatch.setattr(mixed_lora_linear, "processor_count", lambda tensor: WIDE)  # a run for every block of columns
    monkeypatch.setattr(mixed_lora_linear, "add_up", lambda sums: [out.copy_(parts[-1]) for parts, out, *_ in sums])
    with last_programs():
        out = mixed_lora_linear.shrink(x, matrices, layout, of_b=of_b)
    assert expected.all() and torch.equal(out[256:], expected)


@OF_B
def test_the_end_of_a_large_gradient_of_mixed_matrices(of_b):
    t, x = normal(256), torch.empty(1, WIDE, dtype=HALF)
    x[:, -32:] = normal(32)
    with last_programs():
        out = mixed_lora_linear.grad_columns(t, x, _one_adapter(256, 1), of_b=of_b)
    assert out.numel() > 1 << 31
    expected = mixed_lora_linear.grad_columns(t, x[:, -32:], _one_adapter(256, 1), of_b=of_b)
    assert expected.all() and torch.equal(out[-32:], expected[-32:])


def test_the_end_of_a_large_mixed_low_rank_product():
    """S or T of 2**23 rows of rank 256 and behind them 16 of rank 3: written, and read twice."""
    samples = 1 << 19
    layout = _segments.Layout((tuple(range(samples)), (samples,)), (), 16, (256, 3), (2.0, 0.5), (0.0, 0.0))
    small, rows = _one_adapter(3, 16), 16 * (samples + 1)
    x, matrices = normal(1, 1).expand(rows, -1), normal(259)
    with last_programs():
        s = mixed_lora_linear.shrink(x, matrices, layout)
        out = mixed_lora_linear.expand(s, matrices, layout, torch.empty(rows, 1, dtype=HALF), HALF)
        gradient = mixed_lora_linear.grad_columns(s, x, layout)
    assert s.numel() > 1 << 31
    expected = mixed_lora_linear.shrink(x[-16:], matrices[256:], small)
    assert expected.all() and torch.equal(s[-48:], expected)
    last = mixed_lora_linear.expand(expected, matrices[256:], small, torch.empty(16, 1, dtype=HALF), HALF)
    assert last.all() and torch.equal(out[-16:], last)
    assert torch.equal(gradient[256:], mixed_lora_linear.grad_columns(expected, x[-16:], small))


def _many_samples(samples: int) -> tuple[Tensors, torch.Tensor]:
    """(tensors of so many samples, all the same, of 8 heads of 16 rows of 256; the gradient of a result)."""
    one = [normal(1, 8, 16, 256 + i).narrow(3, 0, 256) for i in range(4)]
    q, k, v, dout = (t.expand(samples, -1, -1, -1) for t in one)
    return Tensors(q, k, v, normal(1, 8, 5, 256), normal(1, 8, 5, 256), None, None, None), dout


def test_the_end_of_a_large_attention():
    scores = Scores(causal=True, scale=0.05, start=0)
    outcomes = []
    for samples in (1, (1 << 16) + 1):
        tensors, dout = _many_samples(samples)
        with last_programs():
            out, lse = prefix_attention.forward(tensors, scores)
            delta, dq = prefix_attention.grad_query(dout, out, lse, tensors, scores)
        assert samples == 1 or min(out.numel(), dq.numel()) > 1 << 31
        outcomes.append([t[-1, -1] for t in (out, lse, delta, dq)])
    for small, large in zip(*outcomes, strict=True):
        assert small.any() and torch.equal(small, large)


def test_the_end_of_a_large_batch_of_prompts():
    samples = (1 << 24) + 1
    ids = torch.tensor([[1, 2]]).expand(samples, -1)
    table, prompt = normal(3, 43), normal(1, 43)
    with last_programs():
        out = prompt_embedding.prepend(ids, table, prompt)
    assert out.numel() > 1 << 31
    assert torch.equal(out[-1, 2], table[2])


# What must be found


@triton.jit
def _row_times_stride(x_ptr, out_ptr, stride, BLOCK: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, BLOCK), tl.load(x_ptr + tl.program_id(0) * stride + tl.arange(0, BLOCK)))


@triton.jit
def _flat(out_ptr, size, BLOCK: tl.constexpr):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + places, 1.0, mask=places < size)


def test_a_planted_product_of_32_bits_overflows():
    x = Far(HALF).far(normal(N, 16), 0)
    with pytest.raises(Exception, match="int32 overflow"):
        _row_times_stride[(N,)](x, torch.empty(16, dtype=HALF), x.stride(0), BLOCK=16)


def test_a_planted_index_of_32_bits_overflows():
    out = torch.empty((1 << 31) + 16, dtype=torch.int8)
    with last_programs(), pytest.raises(Exception, match="int32 overflow"):
        _flat[(triton.cdiv(out.numel(), 16),)](out, out.numel(), BLOCK=16)


IR = """
tt.func public @kernel(%x: !tt.ptr<f16>, %size: i32) {
  %block = arith.constant 16 : i32
  %lane = tt.make_range {end = 16 : i32, start = 0 : i32} : tensor<16xi32>
  %program = tt.get_program_id x : i32
BODY
}
"""
FIRST = "  %first = arith.muli %program, %block : i32\n  %many = tt.splat %first : i32 -> tensor<16xi32>\n"
BODIES = {
    "flat": (FIRST + "  %at = arith.addi %many, %lane : tensor<16xi32>\n"
             "  %p = tt.addptr %xs, %at : tensor<16x!tt.ptr<f16>>, tensor<16xi32>", True),
    "lanes": ("  %p = tt.addptr %xs, %lane : tensor<16x!tt.ptr<f16>>, tensor<16xi32>", False),
    "wide": (FIRST + "  %long = arith.extsi %many : tensor<16xi32> to tensor<16xi64>\n"
             "  %p = tt.addptr %xs, %long : tensor<16x!tt.ptr<f16>>, tensor<16xi64>", False),
    "remainder": ("  %r = arith.remsi %program, %size : i32\n  %p = tt.addptr %x, %r : !tt.ptr<f16>, i32", False),
    "within": (FIRST + "  %row = tt.addptr %x, %long : !tt.ptr<f16>, i64\n"
               "  %rows = tt.splat %row : !tt.ptr<f16> -> tensor<16x!tt.ptr<f16>>\n"
               "  %p = tt.addptr %rows, %many : tensor<16x!tt.ptr<f16>>, tensor<16xi32>", False),
}  # fmt: skip


@pytest.mark.parametrize(("body", "wrong"), BODIES.values(), ids=BODIES)
def test_the_lint_of_indices(body, wrong):
    ir = IR.replace("BODY", "  %xs = tt.splat %x : !tt.ptr<f16> -> tensor<16x!tt.ptr<f16>>\n" + body)
    assert bool(narrow_offsets(ir)) is wrong and narrow_products(ir) == []
