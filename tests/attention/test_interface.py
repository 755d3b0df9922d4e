"""The switch to our attention function, and what happens when somebody moves it."""

import pytest
import torch

import fastpeft
from tests.models import batch, tiny


def patched(family="llama"):
    config = fastpeft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    return fastpeft.patch(tiny(family), config).eval()


@torch.no_grad()
def test_another_implementation_after_patching_does_not_lose_the_prefix_silently():
    model, inputs = patched(), batch()
    model.set_attn_implementation("eager")
    with pytest.raises(fastpeft.PatchError, match="set to 'eager' after patching"):
        model(**inputs)
    with fastpeft.disable_adapter(model):
        base = tiny("llama")
        base.set_attn_implementation("eager")
        assert torch.equal(model(**inputs).logits, base(**inputs).logits)


@torch.no_grad()
def test_a_model_that_shares_the_configuration_computes_what_it_did():
    base, inputs = tiny("llama"), batch()
    other = type(base)(base.config).eval()
    before = other(**inputs).logits
    fastpeft.patch(base, fastpeft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    assert torch.equal(other(**inputs).logits, before)
    fastpeft.unpatch(base)
    assert base.config._attn_implementation == "sdpa"
