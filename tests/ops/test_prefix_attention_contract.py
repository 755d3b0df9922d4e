"""What the kernels of `prefix_attention` promise besides their numbers: rows that see nothing, layouts, subsets of
gradients, memory they stay within, and results that do not depend on the order of programs."""

import itertools

import pytest
import torch

from fastpeft import dispatch
from fastpeft.errors import BackendError
from fastpeft.kernels import prefix_attention as kernels
from fastpeft.ops import _prefix_attention_triton as path
from fastpeft.ops._prefix_attention_scores import Tensors
from fastpeft.ops.prefix_attention import Call
from fastpeft.oracle import Bounds
from tests.interpreter import GuardedTorch, backwards
from tests.ops.prefix_attention_cases import NAMES, PLANS, assert_right, on, op_outcome, problem
from tests.traffic import count_traffic

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poison", "symmetric_products")]
HALF = torch.float16
SMALL = {"batch": 2, "heads": 2, "kv_heads": 1}
# Every branch of every kernel: masks that need tests, biases, and the loops of whole tiles.
MANY = [
    ("window", "gaps", "alibi", "softcap", "sinks", "dropout"),
    ("bias", "prefix-bias"),
    ("own-prefixes", "segments"),
]


# The rows before see one to four keys. There u is a difference of nearly equal sums. In fp32 the kernels make it of the
# same products as autograd does; in half precision δ = Σ dout∘out comes from a rounded result, as in every flash.
BLIND = {torch.float32: Bounds(), HALF: Bounds(rms=1.25, row=6)}


@pytest.mark.parametrize(("dtype", "bounds"), BLIND.items())
def test_a_row_that_sees_nothing_is_zero_and_gives_nothing(dtype, bounds):
    padding = torch.ones(2, 37, dtype=torch.bool)
    padding[0, 20:] = False
    cases = [problem("window", "bias", seed=seed, dtype=dtype, padding=padding, **SMALL) for seed in range(8)]
    # Of the first sample the last real key, 19, leaves the window of row 24.
    cases = [case._replace(scores=case.scores._replace(window=5)) for case in cases]
    blind, case = slice(24, None), cases[0]
    with on("triton", "fused"):
        found = op_outcome(case)
        assert_right(cases, bounds=bounds)
    assert not found["out"][0, :, blind].any() and not found["dquery"][0, :, blind].any()
    assert not found["dkey"][0, :, 20:].any() and not found["dvalue"][0, :, 20:].any()
    assert all(each.isfinite().all() for each in found.values())
    _, lse = kernels.forward(case.tensors, case.scores)
    assert (kernels.natural_lse(lse)[0, :, blind] == -torch.inf).all()


def _fused(tensor):
    """A [B, H, S, D] as a slice of one projection's [B, S, H, 3, D], with NaN beside it."""
    batch, heads, rows, depth = tensor.shape
    storage = torch.full((batch, rows, heads, 3, depth), float("nan"), dtype=tensor.dtype)
    storage[..., 1, :] = tensor.transpose(1, 2)
    return storage[..., 1, :].transpose(1, 2)


LAYOUTS = {
    "fused": _fused,
    "depth-first": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "one-sample": lambda t: t[:1].expand_as(t),
    "one-row": lambda t: t[:, :, :1].expand_as(t),
}


@pytest.mark.parametrize("strategy", dispatch.ATTENTION_STRATEGIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernels_with_layout_equal_those_with_contiguous_tensors(layout, strategy):
    depth = 20 if strategy == "fused" else 24
    case = problem(dtype=HALF, queries=21, keys=21, prefix=18, depth=depth, own=True, **SMALL)
    laid = [LAYOUTS[layout](t) for t in case.tensors[:5]]
    laid_out = case._replace(tensors=Tensors(*laid, None, None, None), dout_BHSD=LAYOUTS[layout](case.dout_BHSD))
    plain = laid_out._replace(
        tensors=Tensors(*(t.contiguous() for t in laid), None, None, None), dout_BHSD=laid_out.dout_BHSD.contiguous()
    )
    with on("triton", strategy):
        got, expected = op_outcome(laid_out), op_outcome(plain)
    for name in got:
        assert torch.equal(got[name], expected[name]), name


@pytest.mark.parametrize("modifiers", MANY, ids="+".join)
def test_kernels_stay_inside_and_do_not_depend_on_program_order(modifiers, monkeypatch, overflow_checks):
    case = problem(*modifiers, dtype=HALF, queries=21, keys=37, prefix=18, **SMALL)
    with on("triton", "fused"):
        expected = op_outcome(case)
        with backwards():
            reordered = op_outcome(case)
        guarded = GuardedTorch()
        monkeypatch.setattr(kernels, "torch", guarded)
        with count_traffic() as traffic:  # raises where an active lane leaves its tensor
            inside = op_outcome(case)
    for name in expected:
        assert torch.equal(expected[name], reordered[name]), name
        assert torch.equal(expected[name], inside[name]), name
    assert len(guarded.allocations) >= 5 and guarded.trespassed() == 0
    assert traffic.atomics == 0


@pytest.mark.parametrize("strategy", dispatch.ATTENTION_STRATEGIES)
def test_every_subset_of_gradients(strategy):
    names = NAMES if strategy == "fused" else NAMES[:5]
    modifiers = ("bias", "prefix-bias", "sinks") if strategy == "fused" else ()
    case = problem(*modifiers, dtype=HALF, queries=5, prefix=3, depth=16, batch=1, heads=2, kv_heads=1)
    call = Call(case.scores, 0.0, PLANS[strategy])
    out, lse = path.forward(case.tensors, call, None)

    def gradients(needs):
        return path.backward(case.dout_BHSD, case.tensors, out, lse, call, None, Tensors(*needs))

    given = [t is not None for t in case.tensors]
    full = gradients(given)
    sizes = (0, 1, len(names) - 1) if strategy == "fused" else range(len(names))
    for wanted in itertools.chain.from_iterable(itertools.combinations(range(len(names)), size) for size in sizes):
        got = gradients([i in wanted for i in range(8)])
        for i, (each, whole) in enumerate(zip(got, full, strict=True)):
            assert (each is None) == (i not in wanted)
            assert each is None or torch.equal(each, whole), (wanted, NAMES[i])


def test_the_shapes_between_tiles():
    for queries, keys, prefix, depth in (
        (1, 1, 1, 1),
        (1, 40, 3, 8),
        (16, 16, 16, 16),
        (17, 33, 32, 33),
        (5, 3, 100, 64),
    ):
        case = problem(dtype=HALF, queries=queries, keys=keys, prefix=prefix, depth=depth, **SMALL)
        with on("triton", "fused"):
            found = op_outcome(case)
        with on("torch"):
            expected = op_outcome(case)
        for name in found:
            torch.testing.assert_close(found[name], expected[name], atol=4e-3, rtol=4e-3)


@pytest.mark.parametrize("missing", ["batch", "keys", "queries"])
def test_nothing_to_attend(missing):
    case = problem(dtype=HALF, queries=5, keys=7, **SMALL)
    cut = {
        "batch": lambda t, kind: t[:0] if kind != "prefix" else t,
        "keys": lambda t, kind: t[:, :, :0] if kind == "key" else t,
        "queries": lambda t, kind: t[:, :, :0] if kind == "query" else t,
    }[missing]
    kinds = ("query", "key", "key", "prefix", "prefix")
    tensors = Tensors(*(cut(t, kind) for t, kind in zip(case.tensors, kinds, strict=False)), None, None, None)
    case = case._replace(tensors=tensors, dout_BHSD=cut(case.dout_BHSD, "query"), scores=case.scores._replace(start=0))
    with on("triton", "fused"):
        found = op_outcome(case)
    for name, tensor in zip(NAMES, tensors, strict=True):
        assert tensor is None or found[f"d{name}"].shape == tensor.shape
    assert all(each.isfinite().all() for each in found.values())


def test_dropout_keeps_what_it_should():
    mask = path.keep_mask(torch.tensor([7]), 0.3, 2, 2, 50, 33, 100, "cpu")
    assert mask.shape == (2, 2, 50, 133)
    assert abs(mask.float().mean() - 0.7) < 5 * (0.21 / mask.numel()) ** 0.5
    assert not torch.equal(mask[0, 0], mask[0, 1]) and not torch.equal(mask[0], mask[1])
    assert not torch.equal(mask, path.keep_mask(torch.tensor([8]), 0.3, 2, 2, 50, 33, 100, "cpu"))


# Which strategy


def _plan(case, device="cpu"):
    class OnGpu(torch.Tensor):
        is_cuda = True

    tensors = case.tensors
    if device == "cuda":
        tensors = tensors._replace(q_BHSD=tensors.q_BHSD.as_subclass(OnGpu))
    return dispatch.prefix_attention_plan(tensors, case.scores, case.dropout)


def test_cpu_tensors_run_in_torch_unless_triton_is_demanded():
    case = problem(queries=5)
    assert _plan(case) is None
    with on("triton"):
        assert _plan(case).forward == "fused"
    with on("torch"):
        assert _plan(case) is None


@pytest.mark.parametrize(
    ("modifiers", "changes", "expected"),
    [
        ((), {"queries": 300}, "merge"),
        ((), {"queries": 64}, "fused"),
        (("bidirectional", "cached"), {"queries": 300}, "merge"),
        (("cached",), {"queries": 300}, "fused"),
        (("sinks",), {"queries": 300}, "merge"),
        ((), {"queries": 300, "dtype": torch.float32}, "fused"),
        ((), {"queries": 300, "depth": 20}, "fused"),
        *(((name,), {"queries": 300}, "fused") for name in (
            "window", "left-padding", "segments", "alibi", "bias", "softcap", "dropout"
        )),
    ],
)  # fmt: skip
def test_the_plan_on_a_gpu(modifiers, changes, expected, monkeypatch):
    monkeypatch.setattr(dispatch, "triton_refusal", lambda *_: None)
    case = problem(*modifiers, **{"dtype": HALF, "depth": 16, **SMALL, **changes})
    with on("triton"):
        plan = _plan(case, "cuda")
    assert plan.forward == plan.backward == expected
    assert plan.source


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"depth": 257}, "head dimension 257 is above 256"), ({"dtype": torch.float64}, "torch.float64 is not served")],
)
def test_what_the_kernels_cannot_serve_is_refused_with_the_reason(changes, reason):
    case = problem(queries=3, keys=3, prefix=2, **changes, **SMALL)
    with on("triton"), pytest.raises(BackendError, match=reason):
        _plan(case)
