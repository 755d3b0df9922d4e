"""The torch path of `prefix_attention` is right: every modifier alone and in pairs, forward and every gradient.

In float64 against the definition to 1e-12, which no mistake survives; in fp32, fp16 and bf16 by `fastpeft.oracle`'s
yardstick. Each on both of its halves, CPU flash attention and products in blocks.
"""

import dataclasses
import itertools

import pytest
import torch

from fastpeft.attention_oracle import GRADIENTS, MODIFIERS, attention_outcomes, sdpa
from fastpeft.ops import _prefix_attention_flash as flash
from fastpeft.ops import _prefix_attention_torch as torch_path
from fastpeft.ops import prefix_attention
from fastpeft.ops.prefix_attention import Call
from fastpeft.oracle import Bounds
from tests.ops.attention_cases import FIVE, FLASH, ONLY_IN_BLOCKS, assert_exact, assert_right, draws, path, small_blocks

pytestmark = pytest.mark.usefixtures("poison")
BOTH = ("flash", "blocks")
SINGLES = [(), *((name,) for name in MODIFIERS)]
PAIRS = list(itertools.combinations(MODIFIERS, 2))
DOUBLE, SINGLE, HALF, BRAIN = torch.float64, torch.float32, torch.float16, torch.bfloat16


def name_of(value):
    return "-".join(value) or "plain" if isinstance(value, tuple) else str(value).removeprefix("torch.")


def all_but_sinks(modifiers):
    return tuple(name for name in draws(modifiers)[0].present() if name != "sinks")


@pytest.mark.parametrize("modifiers", [*SINGLES, *PAIRS], ids=name_of)
def test_formulas(modifiers):
    (problem,) = draws(modifiers, dtype=DOUBLE, queries=17, depth=8)
    for half in ("blocks",) if ONLY_IN_BLOCKS & set(modifiers) else BOTH:
        with path(half), small_blocks():
            assert_exact(problem)


@pytest.mark.parametrize("dtype", [SINGLE, HALF, BRAIN], ids=name_of)
@pytest.mark.parametrize("modifiers", SINGLES, ids=name_of)
def test_products_in_blocks_are_as_right_as_eager(modifiers, dtype):
    with path("blocks"):
        assert_right(draws(modifiers, 100 if dtype == SINGLE else 24, dtype=dtype), wanted=all_but_sinks(modifiers))


# One number for each head, the sum of a few hundred with different signs: it takes many draws to know its error.
@pytest.mark.parametrize("half", BOTH)
def test_the_gradient_of_sinks_is_as_right_as_eager(half):
    with path(half):
        assert_right(draws(("sinks",), 400, heads=8, depth=8), wanted=("sinks",))


@pytest.mark.parametrize("modifiers", [pair for pair in PAIRS if "softcap" in pair or "sinks" in pair], ids=name_of)
def test_pairs_in_blocks_are_as_right_as_eager(modifiers):
    with path("blocks"):
        assert_right(draws(modifiers, 96), wanted=all_but_sinks(modifiers))


@pytest.mark.parametrize("modifiers", [m for m in SINGLES if not ONLY_IN_BLOCKS & set(m)], ids=name_of)
def test_flash_attention_is_as_right_as_sdpa(modifiers):
    with path("flash"):
        assert_right(draws(modifiers, 48), FLASH, FIVE, sdpa)


@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=name_of)
@pytest.mark.parametrize("modifiers", [m for m in SINGLES if not ONLY_IN_BLOCKS & set(m)], ids=name_of)
def test_flash_attention_in_half_precision_is_as_right_as_eager(modifiers, dtype):
    with path("flash"):
        assert_right(draws(modifiers, 32, dtype=dtype), FLASH)


@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=name_of)
def test_the_prefix_gradients_of_many_rows_are_added_up_in_fp32(dtype):
    with path("flash"):
        problems = draws((), 4, dtype=dtype, queries=1500, batch=1, heads=1, groups=1, depth=8)
        assert_right(problems, Bounds(), ("prefix_key", "prefix_value"))
        with small_blocks():
            assert_right(draws(("window",), 16, dtype=dtype, queries=59), FLASH)


@pytest.mark.parametrize("half", BOTH)
@pytest.mark.parametrize(
    ("queries", "keys", "start"),
    [(5, 19, None), (5, 19, 0), (5, 19, 3), (5, 19, 18), (19, 5, None), (7, 9, -3), (3, 9, -3), (4, 6, 20), (5, 0, 0)],
)
@pytest.mark.parametrize("modifiers", [(), ("left",), ("bidirectional",), ("window",), ("pin", "bias"), ("alibi",)],
                         ids=name_of)  # fmt: skip
def test_queries_and_keys_of_different_number(modifiers, queries, keys, start, half):
    (problem,) = draws(modifiers, dtype=DOUBLE, queries=queries, keys=keys)
    problem.options["query_start"] = start
    with path(half), small_blocks():
        assert_exact(problem)


@pytest.mark.parametrize("half", BOTH)
@pytest.mark.parametrize("modifiers", [*SINGLES, ("left", "window"), ("packed", "window"), ("alibi", "by-sample")],
                         ids=name_of)  # fmt: skip
def test_one_query_at_the_end_of_a_cache(modifiers, half):
    for batch, groups in ((3, 1), (1, 2), (2, 4)):
        (problem,) = draws(modifiers, dtype=DOUBLE, queries=1, keys=23, batch=batch, groups=groups)
        with path(half):
            assert_exact(problem)


def test_one_query_reads_the_shared_prefix_once_for_the_batch(monkeypatch):
    seen = []

    def recorded(q, k, v, **options):
        seen.append((tuple(q.shape), tuple(k.shape)))
        return original(q, k, v, **options)

    original = flash._flash
    monkeypatch.setattr(flash, "_flash", recorded)
    (problem,) = draws(("left",), queries=1, keys=23, batch=3, heads=8, groups=2, prefix=5)
    with path("flash"):
        attention_outcomes(problem, ())
    assert seen == [((3, 2, 4, 16), (3, 2, 23, 16)), ((1, 2, 12, 16), (1, 2, 5, 16))]


@pytest.mark.parametrize("half", BOTH)
@pytest.mark.parametrize(
    "shape",
    [
        {"prefix": 1},
        {"prefix": 700, "queries": 9},
        {"heads": 6, "groups": 6},
        {"heads": 6, "groups": 1, "batch": 1},
        {"depth": 1},
        {"depth": 37},
        {"depth": 256, "queries": 5},
        {"queries": 1},
        {"batch": 5, "queries": 2},
    ],
    ids=str,
)
def test_shapes(shape, half):
    for modifiers in ((), ("window", "left"), ("alibi", "sinks")):
        (problem,) = draws(modifiers, dtype=DOUBLE, **shape)
        with path(half), small_blocks():
            assert_exact(problem)


@pytest.mark.parametrize("ids", [[0] * 13, [5, 5, 2, 2, 2, 5, 5, 5, 5, 1, 1, 1, 1], list(range(13)), [0] * 6 + [9] * 7])
@pytest.mark.parametrize("half", BOTH)
def test_segment_ids_of_any_order(ids, half):
    (problem,) = draws((), dtype=DOUBLE, queries=13)
    problem.options["segment_ids"] = torch.tensor([ids, sorted(ids)])
    with path(half), small_blocks():
        assert_exact(problem)


# Layouts


def gappy(t):
    """The same values in every second row and third column of storage that holds NaN otherwise."""
    storage = torch.full((*t.shape[:-2], 2 * t.shape[-2], 3 * t.shape[-1]), float("nan"), dtype=t.dtype)
    storage[..., ::2, ::3] = t
    return storage[..., ::2, ::3]


LAYOUTS = {
    "rows before heads": lambda t: t.transpose(-3, -2).contiguous().transpose(-3, -2),
    "columns before rows": lambda t: t.transpose(-2, -1).contiguous().transpose(-2, -1),
    "gappy": gappy,
    "one number": lambda t: t[..., :1, :1].expand_as(t),
}


@pytest.mark.parametrize("half", BOTH)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [*FIVE, "bias", "prefix_bias", "dout"])
def test_layouts(name, layout, half):
    (problem,) = draws(("bias", "prefix-bias", "left"), dtype=DOUBLE)
    problem = dataclasses.replace(problem, **{name: LAYOUTS[layout](getattr(problem, name))})
    with path(half):
        assert_exact(problem)


# Rows that see nothing


@pytest.mark.parametrize("half", BOTH)
@pytest.mark.parametrize("dtype", [DOUBLE, SINGLE, BRAIN], ids=name_of)
def test_a_row_that_sees_nothing_is_zero_and_has_no_gradient(dtype, half):
    """Beyond the window of the prefix, where all keys within the window are padding."""
    (problem,) = draws((), dtype=dtype, queries=23)
    padding = torch.ones(2, 23, dtype=torch.bool)
    padding[0, 4:20] = False
    problem.options.update(padding_mask=padding, sliding_window=5)
    with path(half):
        got, expected, truth = attention_outcomes(problem, FIVE)
    empty = (truth["out"] == 0).all(-1)
    assert empty[0, 0].nonzero().flatten().tolist() == list(range(8, 20)) and not empty[1].any()
    for name in got:
        assert got[name].isfinite().all(), name
    assert not got["out"][empty].any() and not got["dquery"][empty].any()
    if dtype == DOUBLE:
        with path(half):
            assert_exact(problem)


@pytest.mark.parametrize("half", BOTH)
def test_a_sink_of_minus_infinity_is_none(half):
    (problem,) = draws((), dtype=DOUBLE, queries=9)
    problem.options.update(padding_mask=torch.arange(9) >= torch.tensor([[6], [0]]), sliding_window=2)
    sunk = dataclasses.replace(problem, sinks=torch.full((4,), -torch.inf, dtype=DOUBLE))
    with path(half):
        plain, _, _ = attention_outcomes(problem, FIVE)
        got, _, _ = attention_outcomes(sunk, (*FIVE, "sinks"))
    assert not got.pop("dsinks").any()
    for name in got:
        torch.testing.assert_close(got[name], plain[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("half", BOTH)
def test_the_logarithm_of_a_row_that_sees_nothing_is_minus_infinity(half):
    from fastpeft.attention_oracle import _scores, _tensors

    (problem,) = draws((), queries=9)
    problem.options.update(padding_mask=torch.zeros(2, 9, dtype=torch.bool), sliding_window=4)
    tensors = _tensors({name: getattr(problem, name) for name in GRADIENTS})
    with path(half):
        out, lse = torch_path.forward(tensors, Call(_scores(problem), 0.0, None), None)
    assert lse.isfinite()[..., :3].all() and (lse[..., 3:] == -torch.inf).all() and not out[:, :, 3:].any()
    assert lse.dtype == torch.float32 and lse.is_contiguous()


# Subsets of gradients


@pytest.mark.parametrize("half", BOTH)
@pytest.mark.parametrize(
    "modifiers", [(), ("left", "sinks", "window"), ("bias", "prefix-bias", "by-sample")], ids=name_of
)
def test_every_subset_of_gradients(modifiers, half):
    (problem,) = draws(modifiers, dtype=DOUBLE, queries=11, depth=8)
    extras = [name for name in ("bias", "prefix_bias", "sinks") if getattr(problem, name) is not None]
    with path(half):
        full = assert_exact(problem)
        for size in range(len(FIVE) + 1):
            for wanted in itertools.combinations(FIVE, size):
                for more in ([], extras) if extras else ([],):
                    got, _, _ = attention_outcomes(problem, (*wanted, *more))
                    for name in got:
                        torch.testing.assert_close(got[name], full[name], rtol=0, atol=1e-12)


def test_the_sequence_is_left_out_where_only_the_prefix_wants_a_gradient(monkeypatch):
    """The first layer of a frozen model."""
    seen = []
    original = flash._flash_backward
    monkeypatch.setattr(flash, "_flash_backward", lambda *a, **k: seen.append(a[2].shape[2]) or original(*a, **k))
    (problem,) = draws((), prefix=5)
    with path("flash"):
        attention_outcomes(problem, ("prefix_key", "prefix_value"))
    assert seen == [5]


@pytest.mark.parametrize("half", BOTH)
@pytest.mark.parametrize(
    "modifiers",
    [(), ("left", "sinks", "alibi"), ("softcap", "bias", "prefix-bias"), ("dropout", "packed")],
    ids=name_of,
)
def test_gradcheck(modifiers, half):
    (problem,) = draws(modifiers, dtype=DOUBLE, queries=6, depth=3, prefix=2, heads=2, groups=1)
    names = problem.present()

    def op(*leaves):
        torch.manual_seed(1)
        given = dict(zip(names, leaves, strict=True))
        five = [given.pop(name) for name in FIVE]
        return prefix_attention(*five, **given, **problem.options, dropout=problem.dropout, training=True)

    with path(half):
        assert torch.autograd.gradcheck(op, [getattr(problem, name).requires_grad_() for name in names])


# Dropout


def test_dropout_leaves_out_its_share_and_draws_anew():
    seeds = [torch_path.draw_seed(torch.zeros(1)) for _ in range(2)]
    masks = [torch_path.keep_mask(seed, 0.3, 2, 4, 50, 11, 50, "cpu") for seed in seeds]
    for mask in masks:
        assert abs(mask.double().mean() - 0.7) < 5 * (0.21 / mask.numel()) ** 0.5
    both = (~masks[0] & ~masks[1]).double().mean()
    assert abs(both - 0.09) < 0.01
    heads = masks[0].double()
    assert abs(((1 - heads[:, 0]) * (1 - heads[:, 1])).mean() - 0.09) < 0.015


def test_dropout_acts_only_in_training():
    (problem,) = draws(())
    five = [getattr(problem, name) for name in FIVE]
    with path("flash"):
        assert torch.equal(prefix_attention(*five, dropout=0.5), prefix_attention(*five))
        assert not torch.equal(prefix_attention(*five, dropout=0.5, training=True), prefix_attention(*five))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_a_checkpoint_recomputes_the_same(p, reentrant):
    from torch.utils.checkpoint import checkpoint

    (problem,) = draws(())
    results = []
    for recompute in (False, True):
        leaves = [getattr(problem, name).clone().requires_grad_() for name in FIVE]

        def op(*leaves):
            return prefix_attention(*leaves, dropout=p, training=True) * 2

        with path("flash"), torch.random.fork_rng():
            torch.manual_seed(3)
            out = checkpoint(op, *leaves, use_reentrant=reentrant) if recompute else op(*leaves)
            torch.randn(5)  # a later draw, which recomputation must not see
            out.backward(problem.dout)
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)
