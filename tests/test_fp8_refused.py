"""What `quantise_base_fp8` refuses, before anything has changed; and what is interrupted in it."""

import contextlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastpeft
from fastpeft.errors import OpError, PatchError, TargetError
from tests.models import batch, differences, snapshot
from tests.test_fp8 import ALL, K, Model, N, frozen, in_fp8, lora, rows


def changed(change) -> nn.Module:
    """A patched model, of which something is otherwise."""
    model = fastpeft.patch(Model(), lora(target_modules=["head"]))
    with torch.no_grad():
        change(model)
    return model


def _own_forward(model):
    model.layer.forward = lambda x: F.linear(x, model.layer.weight)


def _tied(model):
    model.other = nn.Linear(K, N)
    model.other.weight = model.layer.weight


def _bits(model):
    import bitsandbytes

    model.layer = bitsandbytes.nn.Linear8bitLt(K, N, has_fp16_weights=False).requires_grad_(False).to("cpu")


def _encoder(model):
    model.layer = nn.TransformerEncoderLayer(32, 4, 64).requires_grad_(False).linear1


def _set(value):
    return lambda model: model.layer.weight.__setitem__((1, 2), value)


def _replaced(make):
    return lambda model: model.add_module("layer", make().requires_grad_(False))


def _offloaded(model):
    from accelerate import cpu_offload

    cpu_offload(model.layer, "cpu")


REFUSED = {
    "NaN": (_set(torch.nan), TargetError, r"layer.weight has NaN or infinite values"),
    "infinity": (_set(-torch.inf), TargetError, r"layer.weight has NaN or infinite values"),
    "trained": (lambda model: model.layer.requires_grad_(True), TargetError, r"layer.weight is trained .*patch the"),
    "tied": (_tied, TargetError, r"another module shares the weight of layer \(tied weights\)"),
    "float64": (lambda model: model.double(), TargetError, r"layer has a weight of torch.float64, and float32"),
    "small": (_replaced(lambda: nn.Linear(4, N).half()), TargetError, r"\(24, 4\), which with a scale .* no smaller"),
    "meta": (lambda model: model.layer.to("meta"), TargetError, r"layer is on the meta device or offloaded"),
    "offloaded": (_offloaded, TargetError, r"layer is on the meta device or offloaded"),
    "bitsandbytes": (_bits, TargetError, r"layer is quantised already, by bitsandbytes; leave it out"),
    "float8": (
        lambda model: fastpeft.quantise_base_fp8(model, ["layer"]), TargetError, r"quantised already, by fastpeft",
    ),
    "embedding": (_replaced(lambda: nn.Embedding(K, N)), TargetError, r"layer is a Embedding, and only torch.nn.Lin"),
    "a forward": (_own_forward, TargetError, r"layer has a forward of its own on the instance"),
    "a forward, adapted": (
        lambda model: (_own_forward(model), model.add_adapter("b", lora())), TargetError, r"in front of which its adap",
    ),
    "an encoder's": (
        _replaced(lambda: nn.TransformerEncoderLayer(32, 4, 64)), TargetError, r"layer is a TransformerEncoderLayer, ",
    ),
    "pissa": (
        lambda model: model.add_adapter("b", lora(init_lora_weights="pissa")), PatchError, r"has changed the weight of",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_in_float8_is_refused(case):
    change, kind, message = REFUSED[case]
    model = changed(change)
    before = snapshot(model)
    with pytest.raises(kind, match=message):
        fastpeft.quantise_base_fp8(model, ["layer"])
    assert differences(before, snapshot(model)) == []


def test_more_refusals():
    model = Model().requires_grad_(False)
    before = snapshot(model)
    for arguments, kind, message in [
        ((nn.Linear,), PatchError, "model is a type; a torch.nn.Module is needed"),
        (
            (model, ["layr"]),
            TargetError,
            r"\{'layr'\} matches no torch.nn.Linear of this Model; name some .*; did you mean 'layer'",
        ),
        ((model, ["layer"], ["layer"]), TargetError, "matches no torch.nn.Linear"),
        ((model, []), TargetError, "names nothing"),
        ((model, None), TargetError, "target_modules=None names nothing"),
        ((model, 3), fastpeft.ConfigError, "target_modules=3: must be a list"),
        ((model, "("), fastpeft.ConfigError, "not a regular expression"),
        ((frozen("gpt2"),), TargetError, "'all-linear' matches no torch.nn.Linear of this GPT2LMHeadModel"),
        (
            (fastpeft.quantise_base_fp8(frozen()),),
            TargetError,
            "every linear layer's weight is in float8; there is no more",
        ),
    ]:
        with pytest.raises(kind, match=message):
            fastpeft.quantise_base_fp8(*arguments)
    with pytest.raises(PatchError, match="keep='yes' must be True or False"):
        fastpeft.quantise_base_fp8(model, keep="yes")
    with pytest.raises(PatchError, match="no layer has its weight in float8"):
        fastpeft.dequantise_base_fp8(model)
    with pytest.raises(PatchError, match="dequantise_base_fp8: model is a NoneType"):
        fastpeft.dequantise_base_fp8(None)
    assert differences(before, snapshot(model)) == []
    whole = fastpeft.patch(Model(), lora())
    for other in (nn.Sequential(whole), whole.layer, nn.Sequential(whole.layer)):
        for function in (fastpeft.quantise_base_fp8, fastpeft.dequantise_base_fp8):
            with pytest.raises(PatchError, match="is of a patched model, and this .* give the patched model itself"):
                function(other)
    saved = fastpeft.patch(Model(), lora(modules_to_save=["head"]))
    with pytest.raises(TargetError, match=r"head is trained whole or otherwise \(SavedLinear\)"):
        fastpeft.quantise_base_fp8(saved, ["head"])
    encoder = nn.Sequential(nn.TransformerEncoderLayer(32, 4, 64)).requires_grad_(False)
    left = pytest.warns(UserWarning, match="leaves '0.self_attn.out_proj' as they are: only layers of torch.nn")
    with left, pytest.raises(TargetError, match="0.linear1 is in a TransformerEncoderLayer, which reads its weight"):
        fastpeft.quantise_base_fp8(encoder)


def test_a_weight_that_was_made_something_else_is_refused_in_the_call():
    model = fastpeft.quantise_base_fp8(Model().requires_grad_(False))
    model.requires_grad_(True)
    with pytest.raises(OpError, match="weight wants a gradient"):
        model(rows())
    with torch.no_grad():
        assert model(rows()).isfinite().all()
    model.layer.weight = nn.Parameter(model.layer.weight.bfloat16(), requires_grad=False)
    with pytest.raises(OpError, match="weight is torch.bfloat16; torch.float8_e4m3fn is needed"):
        model(rows())


def test_what_is_interrupted_is_in_float8_as_far_as_it_went(monkeypatch):
    """And goes on from there."""
    from fastpeft import fp8

    model, real, done = frozen(), fp8.to_fp8, []

    def interrupted(*arguments):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(real(*arguments))

    monkeypatch.setattr(fp8, "to_fp8", interrupted)
    with contextlib.suppress(KeyboardInterrupt):
        fastpeft.quantise_base_fp8(model)
    monkeypatch.undo()
    assert in_fp8(model) == ALL[:3] and model(**batch()).loss.isfinite()
    fastpeft.quantise_base_fp8(model)
    whole = fastpeft.quantise_base_fp8(frozen())
    assert torch.equal(model(**batch()).logits, whole(**batch()).logits)
