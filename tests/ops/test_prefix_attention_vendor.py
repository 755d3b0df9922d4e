"""`prefix_attention` where the vendor's flash takes part: merged with a prefix, or over concatenated keys. That it is
right, what it keeps and allocates, what it refuses, and which vendor is asked for what."""

import pytest
import torch
from torch.nn.attention.bias import CausalVariant

from fastpeft.dispatch import prefix_attention_plan
from fastpeft.errors import BackendError
from fastpeft.ops import _vendor_flash as vendor
from fastpeft.ops import gated_prompt_attention, prefix_attention
from fastpeft.oracle import Bounds
from tests.memory import Allocations, saved_for_backward
from tests.ops.prefix_attention_cases import assert_right, on, op_outcome, problem

pytestmark = pytest.mark.interpreter
HALF = torch.float16
FIVE = ("q_BHSD", "k_BGTD", "v_BGTD", "pk_BGPD", "pv_BGPD")
# In fp32 the vendor's backward has the error of L, the kernels' that of a few sums: both small beside a mistake.
SINGLE = Bounds(rms=2, peak=4, row=4, gain=1e-5)

CONCATENATED = [
    ((), {}),
    ((), {"heads": 2, "kv_heads": 2}),
    ((), {"heads": 4, "kv_heads": 1}),
    (("scale", "cached"), {}),
    (("cached", "own-prefixes"), {}),
    (("bidirectional", "cached"), {}),
    (("bidirectional", "own-prefixes"), {}),
    ((), {"queries": 1, "keys": 40}),
    ((), {"queries": 5, "keys": 5, "prefix": 1}),
]


@pytest.mark.parametrize(("modifiers", "changes"), CONCATENATED)
def test_concatenated(modifiers, changes, poison):
    with on("triton", "concat"):
        assert_right([problem(*modifiers, seed=seed, dtype=HALF, depth=24, **changes) for seed in range(2)])


@pytest.mark.parametrize(
    ("strategy", "modifiers"),
    [
        ("merge", ("bidirectional", "cached")),
        ("merge", ("sinks", "own-prefixes")),
        ("concat", ("cached",)),
        ("concat", ("bidirectional", "own-prefixes")),
    ],
)
def test_in_fp32(strategy, modifiers, poison):
    with on("triton", strategy):
        assert_right([problem(*modifiers, seed=seed, depth=24) for seed in range(4)], bounds=SINGLE)


def leaves_of(case):
    return [getattr(case.tensors, name).detach().requires_grad_() for name in FIVE]


def test_concatenated_keys_are_not_kept():
    case = problem("cached", "own-prefixes", dtype=HALF, depth=24, kv_heads=1)
    leaves = leaves_of(case)
    batch, heads, queries, depth = leaves[0].shape
    joined = 2 * batch * (leaves[1].shape[2] + leaves[3].shape[2]) * depth
    with on("triton", "concat"):
        with saved_for_backward(besides=leaves) as saved, Allocations() as allocations:
            out = prefix_attention(*leaves)
            assert sorted(saved.values()) == [4 * batch * heads * queries, out.nbytes]
            assert allocations.live == sum(saved.values())
            assert allocations.sizes.count(joined) == 2
            gradients = torch.autograd.grad(out, leaves, case.dout_BHSD)
        assert allocations.sizes.count(joined) == 6  # again, and their gradients
    assert out.transpose(1, 2).is_contiguous()
    for leaf, gradient in zip(leaves[3:], gradients[3:], strict=True):
        assert gradient.untyped_storage().nbytes() == leaf.nbytes


@pytest.mark.parametrize("dtype", [HALF, torch.float32])
@pytest.mark.parametrize(
    ("strategy", "modifiers"), [("merge", ()), ("concat", ("cached",)), ("concat", ("own-prefixes",))]
)
def test_compiled(strategy, modifiers, dtype):
    case = problem(*modifiers, dtype=dtype, queries=9, depth=16)
    leaves = leaves_of(case)
    torch._dynamo.reset()
    with on("triton", strategy):
        outs = prefix_attention(*leaves), torch.compile(prefix_attention, fullgraph=True, backend="aot_eager")(*leaves)
    first, second = (torch.autograd.grad(out, leaves, case.dout_BHSD) for out in outs)  # by the forward's strategy
    assert torch.equal(*outs) and all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    assert outs[0].stride() == outs[1].stride()


# What is refused

KERNELS_OWN = {
    "bias": "a bias",
    "alibi": "ALiBi",
    "softcap": "a softcap",
    "window": "a window",
    "left-padding": "padding",
    "segments": "segments",
    "dropout": "dropout",
}
REFUSED = [
    *((strategy, (name,), {}, words) for strategy in ("merge", "concat") for name, words in KERNELS_OWN.items()),
    *((strategy, (), {"depth": 20}, "head dimension 20 is no multiple of 8") for strategy in ("merge", "concat")),
    ("merge", ("cached",), {}, "for queries that begin where the keys do"),
    ("merge", (), {"start": 1}, "for queries that begin where the keys do"),
    ("concat", ("prefix-bias",), {}, "a prefix bias"),
    ("concat", ("sinks",), {}, "a sink"),
    ("concat", (), {"start": 1}, "for queries that are the last of the keys"),
    ("concat", (), {"queries": 7, "keys": 5}, "for queries that are the last of the keys"),
]


@pytest.mark.parametrize(("strategy", "modifiers", "changes", "words"), REFUSED)
def test_a_call_that_a_forced_strategy_cannot_serve_is_refused_in_words(strategy, modifiers, changes, words):
    case = problem(*modifiers, **{"dtype": HALF, "depth": 16, "queries": 5, "prefix": 3, **changes})
    with on("triton", strategy), pytest.raises(BackendError, match=f"{strategy}.* cannot serve this call: .*{words}"):
        op_outcome(case)


def test_without_a_causal_mask_queries_may_begin_anywhere():
    case = problem("bidirectional", dtype=HALF, depth=16, queries=7, keys=5, prefix=3, start=2)
    with on("triton", "concat"):
        assert_right([case])


def test_on_rocm_no_causal_mask_ends_at_the_bottom_right(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    for modifiers in ((), ("bidirectional",)):
        case = problem(*modifiers, dtype=HALF, depth=16, queries=5, prefix=3)
        with on("triton", "concat"):
            if modifiers:
                assert prefix_attention_plan(case.tensors, case.scores, 0.0).forward == "concat"
            else:
                with pytest.raises(BackendError, match="ROCm"):
                    prefix_attention_plan(case.tensors, case.scores, 0.0)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_gated_prompt_does_not_know_concatenation(compiled):
    leaves = [*leaves_of(problem(dtype=HALF, depth=16, queries=5, prefix=3)), torch.ones(1)]
    torch._dynamo.reset()
    op = torch.compile(gated_prompt_attention, backend="aot_eager") if compiled else gated_prompt_attention
    with on("triton"):
        expected = gated_prompt_attention(*leaves)
    with on("triton", "concat"):
        assert torch.equal(op(*leaves), expected)


# Which vendor

ON_HOPPER, ON_AMPERE = (9, 0), (8, 0)


@pytest.mark.parametrize(
    ("capability", "dtype", "keys", "causal", "expected"),
    [
        (ON_HOPPER, HALF, 40, True, "cudnn"),
        (ON_HOPPER, HALF, 50, True, "flash"),  # cuDNN's causal mask begins at the top left
        (ON_HOPPER, HALF, 50, False, "cudnn"),
        (ON_AMPERE, HALF, 40, True, "flash"),
        (ON_AMPERE, HALF, 50, True, "flash"),
        (ON_HOPPER, torch.float32, 40, False, "efficient"),
        (ON_AMPERE, torch.float32, 50, True, "efficient"),
    ],
)
def test_which_vendor_serves(capability, dtype, keys, causal, expected, monkeypatch):
    """Its operators' schemas, and the layouts that they say they have."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(vendor, "aten", recorder := Recorder())
    q, k = (
        torch.empty(2, rows, heads, 64, dtype=dtype, device="meta").transpose(1, 2)
        for rows, heads in ((40, 4), (keys, 2))
    )
    assert vendor.vendor_of(q, k, causal) == expected
    out, lse = vendor.forward(q, k, k, causal, 0.1)
    assert out.shape == q.shape and lse.shape == q.shape[:3] and lse.dtype == torch.float32
    gradients = vendor.backward(out, q, k, k, out, lse.contiguous(), causal, 0.1)
    assert [each.shape for each in gradients] == [q.shape, k.shape, k.shape]
    assert all(each.dtype == dtype for each in gradients)
    assert len(recorder.called) == 2 and all(expected in name for name in recorder.called)
    for given in recorder.called.values():
        if expected == "efficient":
            assert given["custom_mask_type"] == (vendor.BOTTOM_RIGHT if causal else vendor.NO_MASK)
        else:
            assert given["is_causal"] == causal


class Recorder:
    """Stands in for `torch.ops.aten` and remembers which operators were asked for, with what under which name."""

    def __init__(self):
        self.called = {}

    def __getattr__(self, name):
        operator = getattr(torch.ops.aten, name)

        def call(*args, **kwargs):
            names = [each.name for each in operator.default._schema.arguments]
            self.called[name] = dict(zip(names, args, strict=False)) | kwargs
            return without_meta(operator, *args, **kwargs) if name == LACKING else operator(*args, **kwargs)

        return call


LACKING = "_efficient_attention_backward"  # whose meta function has no `out`, in torch 2.13


def without_meta(operator, *args, **kwargs):
    """The gradients' shapes. That the operator takes the arguments shows in its complaint about the CPU."""
    on_cpu = [torch.zeros_like(each, device="cpu") if isinstance(each, torch.Tensor) else each for each in args]
    with pytest.raises(NotImplementedError, match="'CPU' backend"):
        operator(*on_cpu, **kwargs)
    _, q, k, v, *_ = args
    return *(torch.empty_like(each) for each in (q, k, v)), None


def test_the_memory_efficient_kernels_name_for_the_mask():
    assert int(CausalVariant.LOWER_RIGHT) == vendor.BOTTOM_RIGHT
