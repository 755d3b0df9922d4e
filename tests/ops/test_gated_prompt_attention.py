"""`gated_prompt_attention` (LLaMA-Adapter): right in float64 to 1e-12 with every modifier and gate, by the yardstick in
fp32, fp16 and bf16; the gate's gradient at zero; what it saves; its errors."""

import dataclasses
import itertools

import pytest
import torch

from fastpeft.attention_oracle import MODIFIERS, attention_outcomes
from fastpeft.dispatch import backend
from fastpeft.errors import BackendError, OpError
from fastpeft.ops import gated_prompt_attention, prefix_attention
from fastpeft.oracle import Bounds
from tests.memory import saved_for_backward
from tests.ops.attention_cases import FIVE, FLASH, ONLY_IN_BLOCKS, assert_exact, assert_right, draws, path, small_blocks

pytestmark = pytest.mark.usefixtures("poison")
BOTH = ("flash", "blocks")
OF_THE_SEQUENCE = [m for m in MODIFIERS if m not in ("pin", "prefix-bias")]
SINGLES = [(), *((name,) for name in OF_THE_SEQUENCE)]
HEADS = 4


def name_of(value):
    return "-".join(value) or "plain" if isinstance(value, tuple) else str(value).removeprefix("torch.")


def problem_of(modifiers=(), gate=(HEADS,), **options):
    problem = draws(modifiers, gate=gate, **options)[0]
    problem.options.pop("prefix_window", None)
    return problem


def gated_draws(modifiers, count, **options):
    problems = draws(modifiers, count, gate=(HEADS,), **options)
    for problem in problems:
        problem.options.pop("prefix_window", None)
    return problems


@pytest.mark.parametrize("modifiers", [*SINGLES, *itertools.combinations(OF_THE_SEQUENCE, 2)], ids=name_of)
def test_formulas(modifiers):
    problem = problem_of(modifiers, dtype=torch.float64, queries=13, depth=8)
    for half in ("blocks",) if ONLY_IN_BLOCKS & set(modifiers) else BOTH:
        with path(half), small_blocks():
            assert_exact(problem)


@pytest.mark.parametrize("gate", [(), (1,), (HEADS,)], ids=str)
@pytest.mark.parametrize("half", BOTH)
def test_gates(gate, half):
    for batch, queries, keys in ((2, 9, 9), (3, 1, 17), (1, 4, 11)):
        problem = problem_of((), gate, dtype=torch.float64, batch=batch, queries=queries, keys=keys)
        with path(half):
            got = assert_exact(problem)
        assert got["dgate"].shape == gate


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("half", BOTH)
def test_as_right_as_eager(half, dtype):
    eager = sdpa if half == "flash" and dtype == torch.float32 else None  # as in the tests of `prefix_attention`
    with path(half):
        assert_right(gated_draws((), 48, dtype=dtype), FLASH if half == "flash" else Bounds(), eager=eager)


def sdpa(problem, leaves):
    def attend(q, *keys, **options):
        return torch.nn.functional.scaled_dot_product_attention(q, *keys, enable_gqa=True, **options)

    q, k, v, pk, pv = (leaves[name] for name in FIVE)
    prompt = (t[None].expand(len(q), -1, -1, -1) for t in (pk, pv))
    return attend(q, k, v, is_causal=True) + leaves["gate"].view(-1, 1, 1) * attend(q, *prompt)


@pytest.mark.parametrize("half", BOTH)
def test_an_fp32_gate_on_half_precision(half):
    problems = [dataclasses.replace(p, gate=p.gate.float()) for p in gated_draws((), 32, dtype=torch.bfloat16)]
    with path(half):
        assert attention_outcomes(problems[0], ("gate",))[0]["dgate"].dtype == torch.float32
        assert_right(problems, FLASH)


@pytest.mark.parametrize("half", BOTH)
def test_at_gate_zero_the_gate_alone_has_a_gradient(half):
    problem = problem_of((), dtype=torch.float64)
    problem = dataclasses.replace(problem, gate=torch.zeros_like(problem.gate))
    with path(half):
        got = assert_exact(problem)
    assert (got["dgate"] != 0).all() and not got["dprefix_key"].any() and not got["dprefix_value"].any()


def test_it_is_not_one_softmax():
    problem = problem_of()
    five = [getattr(problem, name) for name in FIVE]
    with path("flash"):
        assert not torch.allclose(gated_prompt_attention(*five, torch.ones(())), prefix_attention(*five), atol=0.1)


@pytest.mark.parametrize("half", BOTH)
def test_every_subset_of_gradients(half):
    problem = problem_of(("left", "sinks"), dtype=torch.float64, queries=9, depth=8)
    names = ("query", "key", "prefix_key", "prefix_value", "gate", "sinks")
    with path(half):
        full = assert_exact(problem)
        for wanted in (s for size in range(len(names) + 1) for s in itertools.combinations(names, size)):
            got, _, _ = attention_outcomes(problem, wanted)
            for name in got:
                torch.testing.assert_close(got[name], full[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("half", BOTH)
@pytest.mark.parametrize("modifiers", [("left", "window"), ("dropout",)], ids=name_of)
def test_gradcheck(modifiers, half):
    problem = problem_of(modifiers, dtype=torch.float64, queries=5, depth=3, prefix=2)

    def op(*leaves):
        torch.manual_seed(1)
        return gated_prompt_attention(*leaves, **problem.options, dropout=problem.dropout, training=True)

    with path(half):
        leaves = [getattr(problem, name).requires_grad_() for name in (*FIVE, "gate")]
        assert torch.autograd.gradcheck(op, leaves)


def test_saved_are_the_tensors_the_sequences_own_result_and_its_logarithms():
    problem = problem_of(queries=67)
    leaves = [getattr(problem, name).requires_grad_() for name in (*FIVE, "gate")]
    with path("flash"), saved_for_backward(besides=leaves) as saved:
        out = gated_prompt_attention(*leaves)
    batch, heads, queries, _ = problem.query.shape
    assert sorted(saved.values()) == sorted([out.nbytes, batch * heads * queries * 4])
    assert out.untyped_storage().data_ptr() not in saved  # which is O_s, not O


@pytest.mark.parametrize("half", BOTH)
def test_a_graph_can_be_used_twice_and_inputs_are_left_alone(half):
    problem = problem_of(("left",))
    leaves = [getattr(problem, name).requires_grad_() for name in (*FIVE, "gate")]
    dout = problem.dout.clone()
    with path(half):
        out = gated_prompt_attention(*leaves, **problem.options)
        assert out.transpose(1, 2).is_contiguous()
        first = torch.autograd.grad(out, leaves, dout, retain_graph=True)
        second = torch.autograd.grad(out, leaves, dout)
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    assert [t._version for t in (*leaves, dout)] == [0] * 7


def test_autocast():
    problem = problem_of()
    leaves = [getattr(problem, name).requires_grad_() for name in (*FIVE, "gate")]
    with path("flash"), torch.autocast("cpu", torch.bfloat16):
        out = gated_prompt_attention(*leaves)
        narrow = gated_prompt_attention(*(leaf.bfloat16() for leaf in leaves[:5]), leaves[5])
    assert out.dtype == torch.bfloat16 and torch.equal(out, narrow)
    out.backward(problem.dout.bfloat16())
    assert all(leaf.grad.dtype == torch.float32 and leaf.grad.isfinite().all() for leaf in leaves)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"gate": torch.zeros(3)},
            r"gate is torch.float32 of shape \(3,\); floating point of shape \(\), \(1,\) or \(4,",
        ),
        ({"gate": torch.zeros(1, 4, 1, 1)}, r"gate is torch.float32 of shape \(1, 4, 1, 1\)"),
        ({"gate": torch.zeros(4, dtype=torch.int64)}, "gate is torch.int64"),
        ({"gate": torch.zeros(4, device="meta")}, "gate is on meta, query on cpu; move one of them"),
        ({"prompt_key": torch.zeros(2, 0, 16)}, "gated_prompt_attention: the prefix has P = 0 virtual tokens"),
        ({"prompt_value": torch.zeros(2, 6, 16)}, "gated_prompt_attention: the virtual values has shape"),
        ({"dropout": 1.0}, r"gated_prompt_attention: dropout is 1.0; a probability in \[0, 1\) is needed"),
        ({"scale": float("inf")}, "gated_prompt_attention: scale is inf"),
    ],
)
def test_errors_name_the_argument_and_what_was_expected(changes, message):
    problem = problem_of()
    names = ("query", "key", "value", "prompt_key", "prompt_value", "gate")
    given = {name: getattr(problem, name.replace("prompt", "prefix")) for name in names}
    with pytest.raises(OpError, match=message):
        gated_prompt_attention(**(given | changes))


@pytest.mark.interpreter
@pytest.mark.parametrize("modifiers", [("left", "window"), ("sinks", "dropout"), ("bias", "alibi")], ids=name_of)
def test_on_the_kernels(modifiers):
    problem = problem_of(modifiers, batch=1, queries=9)
    with backend("triton"):
        got, _, truth = attention_outcomes(problem, problem.present())
    for name in got:
        torch.testing.assert_close(got[name].double(), truth[name], rtol=1e-5, atol=1e-5)


@pytest.mark.interpreter
def test_compiled_on_the_kernels():
    problem = problem_of(batch=1, queries=9)
    leaves = [getattr(problem, name).requires_grad_() for name in (*FIVE, "gate")]
    torch._dynamo.reset()
    with backend("triton"):
        compiled = torch.compile(gated_prompt_attention, fullgraph=True, backend="aot_eager")
        outs = gated_prompt_attention(*leaves), compiled(*leaves)
        first, second = (torch.autograd.grad(out, leaves, problem.dout) for out in outs)
    assert torch.equal(*outs) and all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


@pytest.mark.interpreter
def test_a_demand_for_kernels_in_vain_is_refused_in_words():
    problem = problem_of(dtype=torch.float64)
    with pytest.raises(BackendError, match="cannot serve this call: torch.float64 is not served"):
        gated_prompt_attention(*(getattr(problem, name) for name in (*FIVE, "gate")), patched_backend="triton")
