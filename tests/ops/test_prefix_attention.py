"""The kernels of `prefix_attention` are as right as eager attention: every modifier alone and beside every other, every
shape, layout and subset of gradients.

The criterion is `fastpeft.oracle`'s. The kernels run in the interpreter, with NaN in all uninitialised memory.
"""

import pytest
import torch

from fastpeft.oracle import Bounds, compare
from tests.ops.prefix_attention_cases import (
    MODIFIERS,
    QUERIES,
    TOGETHER,
    assert_right,
    behind_padding,
    on,
    outcomes,
    problem,
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


@pytest.mark.parametrize("modifiers", [(), ("bidirectional", "own-prefixes"), ("cached", "alibi")])
def test_windows_that_count_from_the_first_token(modifiers):
    keys = QUERIES + 17 * ("cached" in modifiers)
    with on("triton", "fused"):
        assert_right([problem(*modifiers, dtype=HALF, **SMALL, **behind_padding(2, keys))])


# The same kernels as in half precision, with other products: every modifier once, and the rows with the fewest keys.
IN_FP32 = [(), *(TOGETHER[number] for number in (0, 4, 5, 6, 13))]


def test_every_modifier_is_computed_in_fp32():
    assert set().union(*IN_FP32) == set(MODIFIERS)


@pytest.mark.parametrize("modifiers", IN_FP32, ids=lambda modifiers: "+".join(modifiers) or "plain")
def test_kernels_in_fp32(modifiers):
    # Where few keys are seen the greatest error of u is one row's, a heavy-tailed number in eager as in ours.
    few = {"window", "gaps", "bias"} <= set(modifiers)
    draws, bounds = (16, Bounds(peak=2.5)) if few else (8 if "own-prefixes" in modifiers else 4, Bounds())
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
