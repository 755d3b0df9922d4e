"""The kernels of `gated_prompt_attention` are as right as eager attention: every modifier of the sequence alone and
beside every other, by both strategies, with the gate's gradient.

The criterion is `fastpeft.oracle`'s. The kernels run in the interpreter, with NaN in all uninitialised memory.
"""

import pytest
import torch

from fastpeft.ops import _gated_prompt_attention_triton as path
from fastpeft.ops._prefix_attention_scores import Tensors
from fastpeft.ops.gated_prompt_attention import gated_prompt_attention_reference
from fastpeft.ops.prefix_attention import Call
from fastpeft.oracle import Bounds, compare
from tests.ops.prefix_attention_cases import FEW, MODIFIERS, NAMES, PLANS, TOGETHER, heads_of, problem, triton_keep

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poison", "symmetric_products")]
HALF, SINGLE = torch.float16, torch.float32
SMALL = {"batch": 2, "heads": 2, "kv_heads": 1}

# A prompt's own softmax has the scale and nothing else.
ALONE = [name for name in MODIFIERS if name not in ("pinned", "prefix-bias")]
GATED = sorted({tuple(name for name in names if name in ALONE) for names in TOGETHER} | {(), *((n,) for n in ALONE)})
SEVERAL = [((), 2), (("bidirectional", "own-prefixes"), 1), (("left-padding", "sinks", "dropout"), 2)]


def name_of(modifiers):
    return "+".join(modifiers) or "plain"


# Rows of one to four keys, whose u = dbias shows what δ = Σ dout∘out has of the result's rounding, as in every flash.
FEW_KEYS = Bounds(rms=1.25, row=3)


@pytest.mark.parametrize("modifiers", GATED, ids=name_of)
def test_kernels(modifiers):
    bounds, draws = Bounds(), 3 if "bias" in modifiers else 1
    if {"segments", "bias"} <= set(modifiers):
        bounds, draws = FEW_KEYS, 8
    assert_right([problem(*modifiers, seed=seed, dtype=HALF, **SMALL) for seed in range(draws)], 2, "fused", bounds)


@pytest.mark.parametrize(("modifiers", "gates"), SEVERAL)
def test_kernels_in_fp32(modifiers, gates):
    assert_right([problem(*modifiers, seed=seed, **SMALL) for seed in range(2)], gates, "fused")


@pytest.mark.parametrize(
    ("modifiers", "gates"), [((), 4), (("bidirectional", "own-prefixes", "cached"), 1), (("sinks",), 4)]
)
def test_beside_a_vendors_flash(modifiers, gates):
    assert_right([problem(*modifiers, depth=24, dtype=HALF)], gates, "merge")


def assert_right(cases, gates: int, strategy: str, bounds: Bounds = Bounds()):  # noqa: B008
    """One number is what there is of a gate's and a sink's gradient for each head."""
    drawn = [outcomes(case, gates, strategy, seed) for seed, case in enumerate(cases)]
    by_row = cases[0].dout_BHSD.dtype != SINGLE
    found = [
        compare(name, *([head for draw in drawn for head in heads_of(name, draw[i][name], by_row)] for i in range(3)))
        for name in drawn[0][0]
    ]
    faults = [fault for each in found for fault in each.faults(FEW if each.name in ("dgate", "dsinks") else bounds)]
    assert not faults, "\n".join([*faults, *map(str, found)])


def outcomes(case, gates, strategy, seed):
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
        leaves = [t.to(dtype or t.dtype).requires_grad_() for t in (gate, *case.tensors) if t is not None]
        rest = iter(leaves[1:])
        tensors = Tensors(*(None if t is None else next(rest) for t in case.tensors))
        out = gated_prompt_attention_reference(tensors, leaves[0], case.scores, keep, p)
        return [out.detach(), *torch.autograd.grad(out, leaves, case.dout_BHSD.to(out.dtype))]

    got = [out, *(each for each in gradients if each is not None)]
    names = ["out", *(f"d{name}" for name in names)]
    return [dict(zip(names, each, strict=True)) for each in (got, reference(None), reference(torch.float64))]
