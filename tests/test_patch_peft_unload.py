"""peft's `unload` and `merge_and_unload`, of models that were patched, fused and re-homed: the base model that they
return is the one that they return of a model that never was."""

import io
import pickle

import peft
import pytest
import safetensors.torch
import torch
from torch import nn

import fastpeft
from fastpeft.tuners.fusions import part_all
from tests.fused import LORA, called
from tests.models import tiny
from tests.peft_pair import quietly, randomise

VERBS = pytest.mark.parametrize("verb", ["unload", "merge_and_unload"])
MADE = {
    "lora": lambda: peft.get_peft_model(tiny(), peft.LoraConfig(task_type="CAUSAL_LM", **LORA), **FP32),
    "adalora": lambda: peft.get_peft_model(
        tiny(), peft.AdaLoraConfig(task_type="CAUSAL_LM", init_r=4, total_step=9, target_modules="all-linear"), **FP32
    ),
    "mixed": lambda: peft.get_peft_model(tiny(), peft.LoraConfig(**LORA), mixed=True),
}
FP32 = {"autocast_adapter_dtype": False}


def made(method: str) -> nn.Module:
    torch.manual_seed(11)
    model = quietly(MADE[method])
    randomise(model)
    return model.eval()


def together(model: nn.Module) -> nn.Module:
    """Patched, fused, called, and re-homed."""
    fastpeft.fuse(quietly(fastpeft.patch, model))
    called(model)
    return fastpeft.rehome(model)


def is_together(model: nn.Module) -> bool:
    kinds = {type(module).__name__ for module in model.modules()}
    return "FusedLlamaMLP" in kinds and not all(each.is_contiguous() for each in model.parameters())


def state_of(model: nn.Module) -> dict[str, tuple]:
    """Of every module its class and what hangs on it, of every tensor its strides, its storage's size and its bits."""
    found = {}
    for name, module in model.named_modules():
        attributes = {key for key, value in vars(module).items() if value}
        hooks = [len(value) for key, value in sorted(vars(module).items()) if key.endswith("_hooks")]
        found[name, "module"] = type(module), attributes, hooks
    for name, tensor in model.state_dict().items():
        found[name, "tensor"] = tensor.stride(), tensor.untyped_storage().nbytes(), tensor.numpy().tobytes()
    return found


def saved(model: nn.Module) -> bytes:
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.getvalue()


@VERBS
@pytest.mark.parametrize("method", MADE)
def test_nothing_is_left_in_the_base(method, verb, tmp_path):
    expected, model = made(method), together(made(method))
    assert is_together(model)
    expected, found = (getattr(each, verb)() for each in (expected, model))
    assert state_of(found) == state_of(expected)
    assert saved(found) == saved(expected) and b"fastpeft" not in pickle.dumps(found)
    files = [tmp_path / "expected", tmp_path / "found"]
    for each, file in zip((expected, found), files, strict=True):
        safetensors.torch.save_model(each, str(file))
    assert files[0].read_bytes() == files[1].read_bytes()
    torch.testing.assert_close(called(found), called(expected), rtol=0, atol=0)
    again = peft.get_peft_model(found, peft.LoraConfig(task_type="CAUSAL_LM", **LORA))
    quietly(fastpeft.patch, again)


def test_a_refused_merge_changes_nothing():
    model = together(made("lora"))
    model.base_model.model.quantization_method = "gptq"  # of which peft says no
    expected = called(model)
    with pytest.raises(ValueError, match="gptq"):
        model.merge_and_unload()
    assert is_together(model)
    torch.testing.assert_close(called(model), expected, rtol=0, atol=0)


def test_the_patch_that_is_left_in_the_wrapper_can_be_taken_back():
    model = together(made("lora"))
    base = model.unload()
    before = state_of(base)
    part_all(base)
    assert state_of(base) == before
    fastpeft.unpatch(model)
    assert b"fastpeft" not in pickle.dumps(model) and state_of(base) == before
