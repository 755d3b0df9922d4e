"""A step of generation, one query a sample, by its own kernels: as right as eager attention with every modifier, the
prefix read once for the batch, each key once, and what a static cache has not filled not at all."""

import pytest
import torch

from fastpeft import dispatch
from fastpeft.kernels import _prefix_attention_decode as kernels
from fastpeft.kernels import prefix_attention as general
from fastpeft.ops import prefix_attention
from fastpeft.oracle import Bounds
from tests.interpreter import GuardedTorch, backwards
from tests.ops import prefix_attention_traffic as expected
from tests.ops.prefix_attention_cases import MODIFIERS, TOGETHER, assert_right, behind_padding, on, op_outcome, problem
from tests.ops.prefix_attention_traffic import Shape
from tests.traffic import count_traffic

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poison", "symmetric_products", "processors")]
HALF, SINGLE = torch.float16, torch.float32
STEP = {"batch": 3, "heads": 4, "kv_heads": 2, "queries": 1, "keys": 53}
SERVED = [name for name in MODIFIERS if name != "dropout"]
SETS = [(), *((name,) for name in SERVED), *(names for names in TOGETHER if "dropout" not in names)]


@pytest.fixture
def processors(monkeypatch):
    """Many, so that keys and prefix are split."""
    monkeypatch.setattr(kernels, "processor_count", lambda tensor: 64)


def name_of(modifiers):
    return "+".join(modifiers) or "plain"


@pytest.mark.parametrize("dtype", [HALF, SINGLE])
@pytest.mark.parametrize("modifiers", SETS, ids=name_of)
def test_as_right_as_eager(modifiers, dtype):
    cases = [problem(*modifiers, seed=seed, dtype=dtype, **STEP) for seed in range(3)]
    with on("triton"), count_traffic() as traffic:
        assert_right(cases, ())
    assert set(traffic.kernels()) == {"_decode_kernel", "_merge_parts_kernel"}


# In fp32 a key's gradient is one number times q, and heavy-tailed: u is a difference of nearly equal sums.
@pytest.mark.parametrize(("dtype", "bounds"), [(HALF, Bounds()), (SINGLE, Bounds(rms=1.25, peak=3))])
def test_gradients_follow_from_what_it_keeps(dtype, bounds):
    with on("triton"):
        assert_right([problem("sinks", seed=seed, dtype=dtype, **STEP, prefix=9) for seed in range(8)], bounds=bounds)


@pytest.mark.parametrize(("batch", "heads", "kv_heads"), [(1, 2, 2), (9, 4, 1), (5, 20, 1), (2, 34, 2)])
def test_rows_of_many_samples_and_heads(batch, heads, kv_heads):
    """Fewer and more than a tile's 16, of a group alone as well."""
    with on("triton"):
        assert_right(
            [problem("alibi", batch=batch, heads=heads, kv_heads=kv_heads, queries=1, keys=20, dtype=HALF)], ()
        )


SHAPES = [
    (Shape(6, 4, 2, queries=1, keys=70, prefix=35, depth=20, data=2), 6),
    (Shape(40, 4, 2, queries=1, keys=16, prefix=16, depth=16, data=2), 2),  # the rows are five tiles of 16
]


@pytest.mark.parametrize(("shape", "splits"), SHAPES)
def test_the_batch_reads_the_prefix_once(shape, splits, monkeypatch):
    monkeypatch.setattr(kernels, "processor_count", lambda tensor: 24)
    case = problem(**{name: getattr(shape, name) for name in Shape._fields[:7]}, dtype=HALF)
    with count_traffic() as traffic:
        kernels.forward(case.tensors, case.scores)
    parts, merged = expected.decode(shape, 16, 16, splits)
    assert (traffic.of("_decode_kernel"), traffic.of("_merge_parts_kernel")) == (parts, merged)


def test_what_a_static_cache_has_not_filled_is_not_read():
    case = problem(dtype=HALF, **STEP, start=20, window=7)
    with count_traffic() as traffic:
        kernels.forward(case.tensors, case.scores)
    loads, _ = traffic.of("_decode_kernel")
    row = 3 * 2 * 20 * 2  # samples, kv heads, D, bytes
    assert loads["k_ptr"] == loads["v_ptr"] <= 16 * row  # one tile from key 14 on
    assert "pk_ptr" not in loads  # the window has left the prefix


def test_a_window_that_counts_from_the_first_token():
    """Of samples that begin at key 19 and at key 0, the window of the first reaches back to the prefix."""
    sizes = {**STEP, "batch": 2, "keys": 27}
    case = problem(dtype=HALF, **sizes, **behind_padding(2, 27))
    with on("triton"):
        assert_right([case], ())
        apart = problem(dtype=HALF, **sizes, **{**behind_padding(2, 27), "positions": None})
        found, other = (op_outcome(each, ())["out"] for each in (case, apart))
    assert torch.equal(found[1], other[1]) and not torch.allclose(found[0], other[0])


def test_nothing_visible_is_zero():
    padding = torch.ones(3, 53, dtype=torch.bool)
    padding[1] = False
    case = problem(dtype=HALF, **STEP, window=5, padding=padding)
    with on("triton"):
        out = op_outcome(case, ())["out"]
    assert not out[1].any() and out[[0, 2]].abs().amax((1, 2, 3)).all()
    _, lse = kernels.forward(case.tensors, case.scores)
    assert (lse[1] == -torch.inf).all() and lse[[0, 2]].isfinite().all()
    empty = problem(dtype=HALF, batch=2, heads=2, kv_heads=1, queries=1, keys=1, start=0, window=1)
    empty = empty._replace(scores=empty.scores._replace(start=5))  # behind all keys
    with on("triton"):
        assert not op_outcome(empty, ())["out"].any()


@pytest.mark.parametrize("modifiers", [("window", "segments", "softcap"), ("bias", "prefix-bias", "gaps", "sinks")])
def test_stays_inside_and_does_not_depend_on_program_order(modifiers, monkeypatch, overflow_checks):
    case = problem(*modifiers, dtype=HALF, **STEP)
    with on("triton"):
        wanted = op_outcome(case, ())["out"]
        with backwards():
            assert torch.equal(op_outcome(case, ())["out"], wanted)
        guarded = GuardedTorch()
        monkeypatch.setattr(kernels, "torch", guarded)
        monkeypatch.setattr(general, "torch", guarded)
        with count_traffic() as traffic:
            assert torch.equal(op_outcome(case, ())["out"], wanted)
    assert len(guarded.allocations) == 4 and guarded.trespassed() == 0
    assert traffic.atomics == 0


def test_when_it_is_chosen():
    def plan(*modifiers, gated=False, **sizes):
        case = problem(*modifiers, **{**STEP, **sizes})
        return dispatch.prefix_attention_plan(case.tensors, case.scores, case.dropout, gated=gated).forward

    with on("triton"):
        assert plan() == plan("window", "bias") == "decode"
        assert plan("dropout") == plan(queries=2) == plan(gated=True) == "fused"
    with on("triton", "fused"):
        assert plan() == "fused"


def test_compiled_it_is_the_same():
    case = problem(dtype=HALF, **STEP)
    leaves = [t.requires_grad_() for t in case.tensors[:5]]

    def run(function):
        out = function(*leaves)
        return out, *torch.autograd.grad(out, leaves, case.dout_BHSD)

    with on("triton"):
        compiled = torch.compile(prefix_attention, fullgraph=True, backend="aot_eager")
        assert all(torch.equal(one, two) for one, two in zip(run(compiled), run(prefix_attention), strict=True))
