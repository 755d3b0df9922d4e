"""The kernels of `prefix_attention` are as right as eager attention: every modifier alone and beside every other, every
shape, layout and subset of gradients.

The criterion is `fastpeft.oracle`'s. The kernels run in the interpreter, with NaN in all uninitialised memory.
"""

import pytest
import torch

from fastpeft.ops import _gated_prompt_attention_triton as path
from fastpeft.ops._prefix_attention_scores import Tensors
from fastpeft.ops.gated_prompt_attention import gated_prompt_attention_reference
from fastpeft.ops.prefix_attention import Call
from fastpeft.oracle import Bounds, compare
from tests.ops.prefix_attention_cases import (
    MODIFIERS,
    NAMES,
    PLANS,
    TOGETHER,
    assert_right,
    on,
    outcomes,
    problem,
    triton_keep,
)

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poison", "symmetric_products")]
HALF, SINGLE = torch.float16, torch.float32
SMALL = {"batch": 2, "heads": 2, "kv_heads": 1}


@pytest.mark.parametrize("modifier", ["plain", *MODIFIERS])
def test_kernels(modifier):
    draws = 3 if modifier == "pinned" else 1
    with on("triton", "fused"):
        assert_right([problem(*{modifier} - {"plain"}, seed=seed, dtype=HALF, **SMALL) for seed in range(draws)])


@pytest.mark.parametrize("modifiers", TOGETHER, ids="+".join)
def test_kernels_with_modifiers_together(modifiers):
    with on("triton", "fused"):
        assert_right([problem(*modifiers, dtype=HALF, **SMALL)])


@pytest.mark.parametrize("modifiers", [(), *TOGETHER], ids=lambda modifiers: "+".join(modifiers) or "plain")
def test_kernels_in_fp32(modifiers):
    # Where few keys are seen the greatest error of u is one row's, a heavy-tailed number in eager as in ours.
    few = {"window", "gaps", "bias"} <= set(modifiers)
    draws, bounds = (16, Bounds(peak=2.5)) if few else (4, Bounds())
    with on("triton", "fused"):
        assert_right([problem(*modifiers, seed=seed, **SMALL) for seed in range(draws)], bounds=bounds)


@pytest.mark.parametrize("dtype", [HALF, SINGLE])
def test_gradients_of_sinks(dtype):
    """One number a head, so those of every modifier are judged as one draw."""
    sizes = {"batch": 1, "heads": 16, "kv_heads": 4, "queries": 19, "prefix": 18, "dtype": dtype}
    names = [name for name in MODIFIERS if name not in ("sinks", "own-prefixes")]
    cases = [problem("sinks", name, seed=seed, **sizes) for seed, name in enumerate(names)]
    with on("triton", "fused"):
        drawn = [outcomes(case, ("sinks",), seed) for seed, case in enumerate(cases)]
    gradients = ([torch.cat([draw[i]["dsinks"] for draw in drawn])] for i in range(3))
    assert not compare("dsinks", *gradients).faults()


@pytest.mark.parametrize("modifiers", [(), ("bidirectional",), ("bidirectional", "cached", "own-prefixes"), ("sinks",)])
def test_merged_with_a_vendors_flash(modifiers):
    with on("triton", "merge"):
        assert_right([problem(*modifiers, dtype=HALF, depth=24)])


GATED = [((), 4), (("bidirectional", "own-prefixes"), 1), (("left-padding", "sinks", "dropout"), 4)]


@pytest.mark.parametrize("strategy", ["fused", "merge"])
@pytest.mark.parametrize(("modifiers", "gates"), GATED)
def test_gated_prompt(modifiers, gates, strategy):
    if strategy == "merge" and "dropout" in modifiers:
        modifiers = ("sinks",)
    outcomes = [gated_outcomes(problem(*modifiers, seed=seed, depth=24), gates, strategy, seed) for seed in range(2)]
    found = [
        compare(name, *([outcome[i][name].flatten() for outcome in outcomes] for i in range(3)))
        for name in outcomes[0][0]
    ]
    # In fp32 the vendor's backward has the error of L, the kernels' that of a few sums: both small beside a mistake.
    faults = [fault for each in found for fault in each.faults(Bounds(rms=8, peak=16, row=8, gain=1e-5))]
    assert not faults, "\n".join([*faults, *map(str, found)])


def gated_outcomes(case, gates, strategy, seed):
    """Of the kernels, of the reference in the same dtype and in float64: {"out": result, "dgate": gradient, ...}."""
    call = Call(case.scores, case.dropout, PLANS[strategy])
    generator = torch.Generator().manual_seed(seed)
    gate = torch.randn(gates, generator=generator)
    keep, p = triton_keep(case, seed)
    keep = None if keep is None else keep[..., case.tensors.pk_BGPD.shape[2] :]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        drawn = path.draw_seed(gate) if case.dropout else None
    out, own, lse = path.forward(case.tensors, gate, call, drawn)
    needs = Tensors(*(t is not None for t in case.tensors))
    gradients = path.backward(case.dout_BHSD, case.tensors, gate, own, lse, call, drawn, needs, True)
    names = [name for name in ("gate", *NAMES) if name == "gate" or case.tensors[NAMES.index(name)] is not None]

    def reference(dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (gate, *case.tensors) if t is not None]
        rest = iter(leaves[1:])
        tensors = Tensors(*(None if t is None else next(rest) for t in case.tensors))
        out = gated_prompt_attention_reference(tensors, leaves[0], case.scores, keep, p)
        return [out.detach(), *torch.autograd.grad(out, leaves, case.dout_BHSD.to(dtype))]

    got = [out, *(each for each in gradients if each is not None)]
    names = ["out", *(f"d{name}" for name in names)]
    return [dict(zip(names, each, strict=True)) for each in (got, reference(SINGLE), reference(torch.float64))]
