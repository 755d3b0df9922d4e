"""ALiBi's slopes are transformers', to the bit."""

import pytest
import torch

from fastpeft.attention.alibi import alibi_slopes


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 6, 12, 16, 25, 71])
def test_slopes_are_those_that_bloom_adds(heads):
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    theirs = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)  # 0 and 1 times the slope
    assert torch.equal(alibi_slopes(heads, torch.device("cpu")), theirs[:, 0, 1])
