"""`prefix_attention`'s compiled kernels on a GPU, by every strategy: the criterion of `fastpeft.oracle` at larger, odd
sizes and in bf16, and what only a GPU can show: determinism under real parallelism, 64-bit offsets, CUDA graphs."""

import pytest
import torch

from fastpeft.attention_oracle import attention_outcomes
from fastpeft.dispatch import ATTENTION_STRATEGIES, backend
from fastpeft.ops import prefix_attention
from tests.cuda.attention import (
    BOUNDS,
    DEVICE,
    DTYPES,
    MODIFIERS,
    SINGLE,
    SINGLE_VENDOR,
    VENDOR,
    VENDORS,
    assert_repeatable,
    assert_right,
    leaves_of,
    on,
    problem_of,
    results_of,
)
from tests.cuda.launches import assert_replays

pytestmark = pytest.mark.cuda

# (head dimension, virtual tokens): every number of them at 128, one at each other dimension.
GRID = [(128, 1), (128, 30), (128, 100), (128, 200), (64, 30), (96, 100), (256, 200), (80, 1)]
LARGE_BATCH, LARGE_QUERIES, LARGE_HEADS, LARGE_DEPTH = 5, 16_384, 208, 128  # 2**31 elements and some


@pytest.mark.parametrize("strategy", ATTENTION_STRATEGIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("depth", "prefix"), GRID)
def test_as_right_as_eager(depth, prefix, dtype, strategy):
    half = BOUNDS[strategy]
    single = SINGLE if strategy == "fused" else SINGLE_VENDOR
    with on(strategy):
        assert_right(problem_of(depth=depth, prefix=prefix, dtype=dtype), bounds=single if dtype == "fp32" else half)


@pytest.mark.parametrize("modifiers", MODIFIERS, ids="+".join)
def test_modifiers(modifiers):
    with on():
        assert_right(problem_of(*modifiers))


@pytest.mark.parametrize("modifiers", [("alibi", "left"), ("dropout", "window"), ("bias", "sinks")], ids="+".join)
def test_modifiers_in_fp32(modifiers):
    with on():
        assert_right(problem_of(*modifiers, dtype="fp32"))


@pytest.mark.parametrize("modifiers", [(), ("sinks",), ("by-sample",), ("bidirectional",)], ids="+".join)
def test_modifiers_of_the_merge(modifiers):
    with on("merge"):
        assert_right(problem_of(*modifiers, queries=512), bounds=VENDOR)


@pytest.mark.parametrize(
    "modifiers", [(), ("by-sample",), ("bidirectional",), ("bidirectional", "by-sample")], ids="+".join
)
@pytest.mark.parametrize(("queries", "keys"), [(512, 512), (77, 500), (1, 500), (15, 15)])
def test_modifiers_and_caches_of_the_concatenation(queries, keys, modifiers):
    with on("concat"):
        assert_right(problem_of(*modifiers, queries=queries, keys=keys), bounds=VENDOR)


@pytest.mark.parametrize("vendor", VENDORS.values(), ids=VENDORS, indirect=True)
@pytest.mark.parametrize("queries", [64, 331, 1000])
@pytest.mark.parametrize("strategy", ["merge", "concat"])
def test_every_vendor_takes_the_result_and_its_l(strategy, queries, vendor):
    """The layouts of L differ ([B, H, S, 1], [B, H, S], padded to 32 rows), and where a causal mask begins; a wrong
    result or gradient would show it."""
    with on(strategy):
        assert_right(problem_of(queries=queries, depth=128), bounds=VENDOR)
        assert_right(problem_of(queries=queries, groups=8), bounds=VENDOR)


@pytest.mark.parametrize(("heads", "groups"), [(8, 8), (8, 1), (12, 4)])
def test_groups_of_heads(heads, groups):
    for strategy in ATTENTION_STRATEGIES:
        with on(strategy):
            assert_right(problem_of(heads=heads, groups=groups), bounds=BOUNDS[strategy])


@pytest.mark.parametrize(("queries", "keys"), [(1, 500), (1, 1), (77, 500), (15, 15)])
def test_cached_and_short(queries, keys):
    with on():
        assert_right(problem_of("left", queries=queries, keys=keys))
        assert_right(problem_of(queries=queries, keys=keys))


@pytest.mark.parametrize("modifiers", [m for m in MODIFIERS if "dropout" not in m], ids="+".join)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_step_of_generation(dtype, modifiers):
    sizes = {"batch": 16, "heads": 32, "groups": 8, "queries": 1, "keys": 777, "depth": 128, "prefix": 100}
    with on():
        assert_right(problem_of(*modifiers, dtype=dtype, **sizes), ())


def test_thousands_of_virtual_tokens():
    for strategy in ATTENTION_STRATEGIES:
        with on(strategy):
            assert_right(problem_of(prefix=2048, queries=512, depth=128), bounds=BOUNDS[strategy])


@pytest.mark.parametrize("wanted", [("query",), ("key", "value"), ("prefix_key", "prefix_value"), ("value",)])
@pytest.mark.parametrize("strategy", ATTENTION_STRATEGIES)
def test_subsets_of_gradients(strategy, wanted):
    with on(strategy):
        assert_right(problem_of(), wanted, BOUNDS[strategy])


def test_strided_as_a_models_projections_are():
    problem = problem_of(depth=128)
    fused = torch.stack([problem.query] * 3, 3).transpose(1, 2).contiguous().transpose(1, 2)[:, :, :, 1]
    five = [getattr(problem, name) for name in ("query", "key", "value", "prefix_key", "prefix_value")]
    heads_last = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in five[1:3]]
    for strategy in ATTENTION_STRATEGIES:
        with on(strategy):
            expected = prefix_attention(*five)
            assert expected.transpose(1, 2).is_contiguous()
            assert torch.equal(expected, prefix_attention(fused, *heads_last, *five[3:]))


# Dropout is the kernels' own: nothing is merged then.
@pytest.mark.parametrize(("strategy", "dropout"), [*((name, 0.0) for name in ATTENTION_STRATEGIES), ("fused", 0.3)])
def test_twenty_repeats_are_equal_bit_for_bit(strategy, dropout):
    problem = problem_of(queries=1024, depth=128, batch=4)
    leaves = leaves_of(problem)

    def run():
        torch.manual_seed(3)
        return results_of(prefix_attention, leaves, problem.dout, dropout=dropout, training=True)

    assert_repeatable(run, strategy)


def test_on_the_gpu_triton_is_what_auto_means():
    leaves = leaves_of(problem_of())
    with backend("auto"):
        automatic = prefix_attention(*leaves)
    with backend("triton"):
        assert torch.equal(automatic, prefix_attention(*leaves))


@pytest.mark.xdist_group("large")
@pytest.mark.parametrize("strategy", ATTENTION_STRATEGIES)
def test_offsets_beyond_32_bits(strategy):
    """The last sample of q, which lies beyond 2**31 elements, alone gives the same."""
    if DEVICE == "cuda" and torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free GPU memory")
    sizes = {"heads": 4, "groups": 1, "queries": LARGE_QUERIES, "depth": LARGE_DEPTH}
    alone = problem_of(batch=1, **sizes)
    q = torch.zeros(LARGE_BATCH, LARGE_QUERIES, LARGE_HEADS, LARGE_DEPTH, dtype=alone.query.dtype, device=DEVICE)
    q[-1, :, -4:] = alone.query[0].transpose(0, 1)
    q = q.transpose(1, 2)[:, -4:].detach().requires_grad_()
    k, v = (t.expand(LARGE_BATCH, -1, -1, -1) for t in (alone.key, alone.value))
    single = leaves_of(alone)
    with on(strategy):
        out = prefix_attention(q, k, v, *single[3:])
        expected = prefix_attention(*single)
        dq = torch.autograd.grad(out, q, alone.dout.expand_as(out))[0][-1]
        wanted = torch.autograd.grad(expected, single[0], alone.dout)[0][0]
    torch.testing.assert_close(out[-1], expected[0], rtol=2e-2, atol=1e-3)
    torch.testing.assert_close(dq, wanted, rtol=2e-2, atol=1e-2 * float(wanted.abs().max()))


@pytest.mark.parametrize("strategy", ATTENTION_STRATEGIES)
def test_cuda_graphs(strategy):
    problem = problem_of(queries=512, depth=128)
    leaves = leaves_of(problem)

    with on(strategy):
        assert_replays(lambda: results_of(prefix_attention, leaves, problem.dout))


def test_the_generator_of_the_device_decides_on_dropout():
    problem = problem_of("dropout")
    with on():
        first, again, other = (attention_outcomes(problem, ("query",), seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first["dquery"], again["dquery"]) and not torch.equal(first["dquery"], other["dquery"])


def test_a_row_that_sees_nothing_is_zero():
    problem = problem_of("sinks", prefix=1)
    padding = torch.ones(len(problem.query), problem.query.shape[2], dtype=torch.bool, device=DEVICE)
    padding[0, :200] = False
    window = {"padding_mask": padding, "sliding_window": 17}
    leaves = leaves_of(problem)
    with on():
        out = prefix_attention(*leaves, **window)
        grads = torch.autograd.grad(out, leaves, problem.dout)
    assert not out[0, :, 17:200].any() and not grads[0][0, :, 17:200].any()
    assert all(t.isfinite().all() for t in (out, *grads))
