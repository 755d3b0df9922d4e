"""What `prefix_attention` promises besides numbers, on the torch path: autograd's rules, its errors, autocast, empty
tensors, and that it writes into nothing of its caller's."""

import pytest
import torch

from fastpeft.attention_oracle import GRADIENTS, attention_outcomes
from fastpeft.errors import OpError
from fastpeft.ops import gated_prompt_attention, prefix_attention
from tests.ops.attention_cases import FIVE, draws, path

pytestmark = pytest.mark.usefixtures("poison")
BOTH = ("flash", "blocks")
VECTORS = ("padding_mask", "segment_ids", "alibi_slopes", "key_positions")


def arguments(*modifiers, **options):
    """The keyword arguments of a call on random tensors, and dout."""
    (problem,) = draws(modifiers, **options)
    given = {name: getattr(problem, name) for name in problem.present()}
    return given | problem.options | {"dropout": problem.dropout, "training": True}, problem.dout


def leaves_of(given):
    return [t.requires_grad_() for name, t in given.items() if name in GRADIENTS]


@pytest.mark.parametrize("half", BOTH)
@pytest.mark.parametrize(
    "modifiers", [(), ("left", "packed", "window", "positions", "sinks", "bias"), ("dropout", "softcap", "alibi")],
    ids="-".join,
)  # fmt: skip
def test_a_graph_can_be_used_twice_and_inputs_are_left_alone(modifiers, half):
    given, dout = arguments(*modifiers)
    leaves, vectors = leaves_of(given), [given[name] for name in VECTORS if name in given]
    before = [t.detach().clone() for t in (*leaves, *vectors, dout)]
    with path(half):
        out = prefix_attention(**given)
        kept = out.detach().clone()
        first = torch.autograd.grad(out, leaves, dout, retain_graph=True)
        second = torch.autograd.grad(out, leaves, dout)
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    assert torch.equal(out, kept)
    for t, copy in zip((*leaves, *vectors, dout), before, strict=True):
        assert t._version == 0 and torch.equal(t, copy)


@pytest.mark.parametrize("half", BOTH)
@pytest.mark.parametrize("layout", ["heads first", "rows first"])
@pytest.mark.parametrize("modifiers", [(), ("window",), ("sinks",), ("left",)], ids="-".join)
def test_the_result_is_stored_row_by_row(modifiers, layout, half):
    given, _ = arguments(*modifiers)
    if layout == "rows first":
        given["query"] = given["query"].transpose(1, 2).contiguous().transpose(1, 2)
    with path(half):
        out = prefix_attention(**given)
        assert out.transpose(1, 2).is_contiguous()
        assert prefix_attention(**(given | {"key": given["key"][:, :, :0], "value": given["value"][:, :, :0]})
                                if not modifiers else given).transpose(1, 2).is_contiguous()  # fmt: skip


def test_a_second_derivative_is_refused():
    given, _ = arguments()
    leaves = leaves_of(given)
    (dq,) = torch.autograd.grad(prefix_attention(**given).square().sum(), leaves[0], create_graph=True)
    with pytest.raises(OpError, match="first derivatives only"):
        dq.sum().backward()


@pytest.mark.parametrize("half", BOTH)
def test_nothing_is_recorded_where_nothing_wants_a_gradient(half):
    given, _ = arguments("left")
    with path(half):
        plain = prefix_attention(**given)
        assert not plain.requires_grad
        with torch.inference_mode():
            assert torch.equal(prefix_attention(**given), plain)
        leaves_of(given)
        with torch.no_grad():
            assert not prefix_attention(**given).requires_grad


@pytest.mark.parametrize("half", BOTH)
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_dtype_and_gives_gradients_in_the_tensors(narrow, half):
    given, dout = arguments("left", "alibi", "sinks")
    with path(half):
        narrowed = {name: t.to(narrow) if name in FIVE else t for name, t in given.items()}
        expected = prefix_attention(**narrowed)
        leaves = leaves_of(given)
        with torch.autocast("cpu", narrow):
            out = prefix_attention(**given)
            assert out.dtype == narrow and torch.equal(out, expected)
            inside = torch.autograd.grad(out, leaves, dout.to(narrow), retain_graph=True)
        outside = torch.autograd.grad(out, leaves, dout.to(narrow))
    assert [t.dtype for t in outside] == [torch.float32] * len(leaves)
    assert all(torch.equal(one, two) for one, two in zip(inside, outside, strict=True))


@pytest.mark.parametrize("op", ["prefix", "gated"])
def test_autocast_takes_a_prefix_of_another_dtype(op):
    """As a matrix product does: trained in fp32, met by a projection's half precision."""
    given, _ = arguments()
    mixed = {name: t.to(torch.bfloat16) if name in ("query", "key", "value") else t for name, t in given.items()}

    def run(arguments):
        five = [arguments[name] for name in FIVE]
        return prefix_attention(*five) if op == "prefix" else gated_prompt_attention(*five, torch.ones(1))

    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(mixed), run(given))
    with pytest.raises(OpError, match="virtual keys is torch.float32, query torch.bfloat16"):
        run(mixed)


def test_autocast_leaves_fp64_alone():
    given, _ = arguments(dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert prefix_attention(**given).dtype == torch.float64


@pytest.mark.parametrize("half", BOTH)
def test_fp32_blocks_stay_fp32_under_autocast_of_other_ops(half):
    """Inside the op nothing is cast again: its own products are not autocast's."""
    given, _ = arguments("softcap", dtype=torch.bfloat16)
    with path(half):
        plain = prefix_attention(**given)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(prefix_attention(**given), plain)


@pytest.mark.parametrize("half", BOTH)
@pytest.mark.parametrize("modifiers", [(), ("left", "window", "sinks"), ("packed", "alibi"), ("dropout", "bias")],
                         ids="-".join)  # fmt: skip
@pytest.mark.parametrize("sizes", [{"batch": 0}, {"queries": 0, "keys": 12}], ids=str)
def test_nothing_to_compute(sizes, modifiers, half):
    given, dout = arguments(*modifiers, **sizes)
    leaves = leaves_of(given)
    with path(half):
        out = prefix_attention(**given)
        gradients = torch.autograd.grad(out, leaves, dout)
    assert out.shape == given["query"].shape
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert gradient.shape == leaf.shape and not gradient.any()


@pytest.mark.parametrize("half", BOTH)
def test_what_is_not_finite_spreads_only_to_rows_that_see_it(half):
    for name, place in (("prefix_value", (0, 3)), ("value", (0, 0, 12)), ("query", (1, 2, 5))):
        (problem,) = draws()
        getattr(problem, name)[place] = float("nan")
        with path(half):
            got, eager, _ = attention_outcomes(problem, FIVE)
        assert torch.equal(got["out"].isnan(), eager["out"].isnan()), name


@pytest.mark.parametrize("half", BOTH)
@pytest.mark.parametrize("low", [-torch.inf, torch.finfo(torch.float32).min])
def test_a_mask_given_as_a_bias(low, half):
    """Hugging Face writes the smallest number of the dtype where eager masks have -inf."""
    (problem,) = draws(dtype=torch.float32)
    hidden = torch.rand(2, 1, 19, 19, generator=torch.Generator().manual_seed(0)) < 0.4
    hidden[1, :, 7] = True
    given = {name: getattr(problem, name) for name in FIVE}
    with path(half):
        out = prefix_attention(**given, causal=False, bias=torch.zeros(2, 1, 19, 19).masked_fill(hidden, low))
        plain = prefix_attention(**given, causal=False)
    assert out.isfinite().all() and not torch.allclose(out, plain)
    weights = prefix_attention(**(given | {"value": torch.zeros_like(problem.value)}), causal=False,
                               bias=torch.full((2, 1, 19, 19), low))  # fmt: skip
    alone = prefix_attention(**(given | {"key": problem.key[:, :, :0], "value": problem.value[:, :, :0]}))
    torch.testing.assert_close(weights, alone)
    torch.testing.assert_close(out[1, :, 7], alone[1, :, 7])


B, H, G, S, T, P, D = 2, 4, 2, 5, 7, 3, 8


def call(**changes):
    t = torch.zeros
    given = {"query": t(B, H, S, D), "key": t(B, G, T, D), "value": t(B, G, T, D)}
    given |= {"prefix_key": t(G, P, D), "prefix_value": t(G, P, D)}
    return prefix_attention(**(given | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.zeros(H, S, D)}, r"query has shape \(4, 5, 8\); \(B, H, S, D\) is needed"),
        ({"query": torch.zeros(B, H, S, D, dtype=torch.int64)}, "query is torch.int64; floating point is needed"),
        ({"key": torch.zeros(B, 3, T, D)}, r"key has shape \(2, 3, 7, 8\); .* a divisor of 4, T, 8\) is needed"),
        ({"key": torch.zeros(B, 0, T, D)}, r"key has shape \(2, 0, 7, 8\)"),
        ({"key": torch.zeros(3, G, T, D)}, r"key has shape \(3, 2, 7, 8\)"),
        ({"key": torch.zeros(B, G, T, 9)}, r"key has shape \(2, 2, 7, 9\)"),
        ({"value": torch.zeros(B, G, 6, D)}, r"value has shape \(2, 2, 6, 8\), expected \(2, 2, 7, 8\)"),
        ({"prefix_key": torch.zeros(H, P, D)}, r"virtual keys have shape \(1, 4, 3, 8\); \(2, P, 8\) or"),
        ({"prefix_key": torch.zeros(3, G, P, D)}, r"virtual keys have shape \(3, 2, 3, 8\)"),
        ({"prefix_key": torch.zeros(G, 0, D)}, "the prefix has P = 0 virtual tokens; at least 1 is needed"),
        ({"prefix_value": torch.zeros(G, 4, D)}, r"virtual values has shape \(1, 2, 4, 8\), expected \(1, 2, 3, 8\)"),
        ({"prefix_value": torch.zeros(B, G, P, D)}, r"virtual values has shape \(2, 2, 3, 8\), expected"),
        ({"key": torch.zeros(B, G, T, D).half()}, "key is torch.float16, query torch.float32; cast one of them"),
        ({"prefix_key": torch.zeros(G, P, D).half()}, "virtual keys is torch.float16, query torch.float32"),
        ({"value": torch.zeros(B, G, T, D, device="meta")}, "value is on meta, query on cpu; move one of them"),
        ({"bias": torch.zeros(S, T)}, r"bias has shape \(5, 7\); \(2 or 1, 4 or 1, 5, 7\) is needed"),
        ({"bias": torch.zeros(1, H, S, T + P)}, r"bias has shape \(1, 4, 5, 10\)"),
        ({"bias": torch.zeros(1, 2, S, T)}, r"bias has shape \(1, 2, 5, 7\)"),
        ({"prefix_bias": torch.zeros(1, H, S, T)}, r"prefix_bias has shape \(1, 4, 5, 7\); .* 5, 3\) is needed"),
        ({"sinks": torch.zeros(G)}, r"sinks has shape \(2,\), expected \(4,\)"),
        ({"sinks": torch.zeros(H, device="meta")}, "sinks is on meta, query on cpu"),
        ({"padding_mask": torch.ones(B, S, dtype=torch.bool)}, r"padding_mask has shape \(2, 5\), expected \(2, 7\)"),
        ({"padding_mask": torch.ones(B, T)}, "padding_mask is torch.float32; torch.bool is needed"),
        ({"padding_mask": torch.ones(B, T, dtype=torch.bool, device="meta")}, "padding_mask is on meta"),
        ({"segment_ids": torch.zeros(T, dtype=torch.int64)}, r"segment_ids has shape \(7,\), expected \(2, 7\)"),
        ({"segment_ids": torch.zeros(B, T, dtype=torch.int64), "query_start": 3},
         r"query_start is 3; with segment_ids 0 to T - S = 2 is needed"),
        ({"alibi_slopes": torch.zeros(G)}, r"alibi_slopes has shape \(2,\), expected \(4,\)"),
        ({"key_positions": torch.zeros(B, P)}, r"key_positions has shape \(2, 3\), expected \(2, 7\)"),
        ({"scale": float("nan")}, "scale is nan; a finite number is needed"),
        ({"softcap": 0.0}, "softcap is 0.0; a positive number or None is needed"),
        ({"softcap": float("inf")}, "softcap is inf"),
        ({"sliding_window": 0}, "sliding_window is 0; at least 1, or None is needed"),
        ({"prefix_window": "stay"}, "prefix_window is 'stay'; 'slide' or 'pin' is needed"),
        ({"dropout": 1.0}, r"dropout is 1.0; a probability in \[0, 1\) is needed"),
        ({"dropout": float("nan")}, "dropout is nan"),
    ],
)  # fmt: skip
def test_errors_name_the_argument_and_what_was_expected(changes, message):
    with pytest.raises(OpError, match=f"prefix_attention: .*{message}"):
        call(**changes)


# Compiled


@pytest.mark.parametrize("half", BOTH)
@pytest.mark.parametrize("gate", [None, (H,)], ids=["prefix", "gated"])
@pytest.mark.parametrize(
    "modifiers", [(), ("left", "window", "sinks"), ("packed", "positions", "bias"), ("softcap", "bidirectional")],
    ids="-".join,
)  # fmt: skip
def test_compiled_as_one_graph(modifiers, gate, half):
    given, dout = arguments(*modifiers, gate=gate)
    op = prefix_attention
    if gate:
        op, pinned = gated_prompt_attention, given.pop("prefix_window", None)
        given = {name.replace("prefix", "prompt"): t for name, t in given.items()}
        assert pinned in (None, "slide")
    leaves = [t.requires_grad_() for name, t in given.items() if name.replace("prompt", "prefix") in GRADIENTS]

    def doubled(**given):
        return op(**given) * 2

    torch._dynamo.reset()
    with path(half):
        expected = doubled(**given)
        out = torch.compile(doubled, fullgraph=True, backend="aot_eager")(**given)
        gradients = [torch.autograd.grad(each, leaves, dout) for each in (expected, out)]
    assert torch.equal(out, expected)
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)  # dout may lie in memory in another order


def test_compiled_with_dropout():
    given, dout = arguments("dropout")
    leaves = leaves_of(given)
    torch._dynamo.reset()
    compiled = torch.compile(prefix_attention, fullgraph=True, backend="aot_eager")
    with path("flash"):
        torch.manual_seed(1)
        out = compiled(**given)
        torch.manual_seed(1)
        again = compiled(**given)
        assert torch.equal(out, again) and not torch.equal(out, compiled(**given))
        first, second = (torch.autograd.grad(each, leaves, dout) for each in (out, again))
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


def test_the_operators_keep_torchs_rules():
    given, _ = arguments("left", "window")
    leaves_of(given)
    args = (None, *(given[name] for name in FIVE[:3]), *(given[name][None] for name in FIVE[3:]), None, None, None,
            given["padding_mask"], None, None, None, None, None, True, 0.25, 0, 6, False, None, 0.0, "")  # fmt: skip
    torch.library.opcheck(torch.ops.fastpeft.attention.default, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("modifiers", [("left", "window"), ("packed", "alibi")], ids="-".join)
def test_compiled_for_any_length(modifiers):
    torch._dynamo.reset()
    compiled = torch.compile(prefix_attention, fullgraph=True, backend="aot_eager", dynamic=True)
    for queries, keys in ((9, 9), (13, 13), (1, 17), (1, 18)):
        given, _ = arguments(*modifiers, queries=queries, keys=keys)
        assert torch.equal(compiled(**given), prefix_attention(**given))
