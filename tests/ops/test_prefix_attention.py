"""The kernels of `prefix_attention` are as right as eager attention: every modifier alone and beside every other, every
shape, layout and subset of gradients.

The criterion is `fastpeft.oracle`'s. The kernels run in the interpreter, with NaN in all uninitialised memory and 32-bit
overflow an error.
"""

import pytest
import torch

from tests.ops.prefix_attention_cases import MODIFIERS, TOGETHER, assert_right, on, problem

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poison")]
HALF, SINGLE = torch.float16, torch.float32
SMALL = {"batch": 2, "heads": 2, "kv_heads": 1}


@pytest.mark.parametrize("modifier", ["plain", *MODIFIERS])
def test_kernels(modifier):
    with on("triton", "fused"):
        assert_right([problem(*{modifier} - {"plain"}, dtype=HALF, **({} if modifier == "plain" else SMALL))])


@pytest.mark.parametrize("modifiers", TOGETHER, ids="+".join)
def test_kernels_with_modifiers_together(modifiers):
    with on("triton", "fused"):
        assert_right([problem(*modifiers, dtype=HALF, **SMALL)])


@pytest.mark.parametrize("modifier", ["plain", "alibi", "bias", "softcap", "window", "dropout"])
def test_kernels_in_fp32(modifier):
    with on("triton", "fused"):
        assert_right([problem(*{modifier} - {"plain"}, seed=seed, **SMALL) for seed in range(4)])
