"""Bases in float8 beside other things: dtypes, state dicts, fusions, torch.compile, accelerate's hooks, peft."""

import copy

import peft
import pytest
import torch
from torch import nn

import fastpeft
from fastpeft import quantised
from fastpeft.errors import PatchError, TargetError
from tests.fused import seen as seen
from tests.models import batch, differences, snapshot, tiny
from tests.peft_pair import quietly, randomise
from tests.test_fp8 import ALL, FP8, K, Model, N, R, error, frozen, in_fp8, lora, patched, rows


def test_the_dtypes_stay_whatever_the_model_s_is(tmp_path):
    model = fastpeft.quantise_base_fp8(patched(), ["layer"])
    codes, scale = model.layer.weight.float().clone(), model.layer.weight_scale.clone()
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.float32):
        model.to(dtype)
        assert model.layer.weight.dtype == FP8 and model.layer.weight_scale.dtype == torch.float32
        assert model.layer.bias.dtype == model.layer.lora_A["default"].weight.dtype == dtype
        assert torch.equal(model.layer.weight.float(), codes) and torch.equal(model.layer.weight_scale, scale)
        assert quantised.dense_weight(model.layer).dtype == model.layer.compute_dtype == dtype
        assert model(rows(dtype=dtype)).dtype == dtype
    torch.save(model, tmp_path / "model.pt")
    for other in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert torch.equal(other(rows()), model(rows())) and type(other.layer) is type(model.layer)
    assert model.to("meta").layer.weight.is_meta and model.layer.weight_scale.is_meta


def test_state_dicts():
    model, other = Model().requires_grad_(False), Model().requires_grad_(False)
    dense = {name: each.clone() for name, each in model.state_dict().items()}
    fastpeft.quantise_base_fp8(model, ["layer"])
    with torch.no_grad():
        other.layer.weight.mul_(-3)
    fastpeft.quantise_base_fp8(other, ["layer"], keep=True)
    states = model.state_dict()
    assert states.keys() == dense.keys() | {"layer.weight_scale"}
    assert states["layer.weight"].dtype == FP8 and states["layer.weight"].shape == (N * K,)
    assert states["layer.weight"].data_ptr() == model.layer.weight.data_ptr()
    other.load_state_dict(states)
    assert torch.equal(other(rows()), model(rows())) and other.layer.original is None
    y, scaleless = other(rows()), {name: each for name, each in states.items() if name != "layer.weight_scale"}
    weightless = {name: each for name, each in states.items() if name != "layer.weight"}
    short = {**states, "layer.weight": states["layer.weight"][1:]}
    for wrong, found in [
        (dense, "torch.float32 of 792 numbers with no scale"),
        (scaleless, "torch.float8_e4m3fn of 792 numbers with no scale"),
        (weightless, "no weight with a scale"),
        (short, "torch.float8_e4m3fn of 791 numbers with a scale"),
    ]:
        for strict in (True, False):
            with pytest.raises(RuntimeError, match=rf"this state dict has {found}; fastpeft.dequantise_base_fp8"):
                other.load_state_dict(wrong, strict=strict)
    assert torch.equal(other(rows()), y)
    for strict in (True, False):
        with pytest.raises(RuntimeError, match="size mismatch for layer.weight"):
            Model().load_state_dict(states, strict=strict)
    other.load_state_dict({"head.bias": torch.zeros(5)}, strict=False)
    assert other.head.bias.eq(0).all()


def test_what_transformers_saves_of_it_is_not_loaded_as_something_else(tmp_path):
    """Codes without their scales would be taken for weights."""
    model = fastpeft.quantise_base_fp8(frozen())
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        type(model).from_pretrained(tmp_path)
    fastpeft.dequantise_base_fp8(model).save_pretrained(tmp_path)
    assert torch.equal(type(model).from_pretrained(tmp_path)(**batch()).logits, model(**batch()).logits)


def test_a_fused_model_goes_on_in_float8(seen):
    """Its projections together, now without their weights, and its MLPs layer by layer; and back."""
    model = fastpeft.patch(tiny(), lora(target_modules="all-linear"))
    randomise(model)
    twin = copy.deepcopy(model)
    fastpeft.fuse(model)
    for change in (lambda model: model, fastpeft.quantise_base_fp8, fastpeft.dequantise_base_fp8):
        for each in (model, twin):
            change(each)
        seen.clear()
        for _ in range(2):
            torch.testing.assert_close(model(**batch()).logits, twin(**batch()).logits, rtol=1e-5, atol=1e-5)
        assert seen[-2:] == ([3, 2] if change is fastpeft.quantise_base_fp8 else [3, 3])


def test_one_graph():
    torch._dynamo.reset()
    model = fastpeft.quantise_base_fp8(patched(lora_dropout=0.5).train(), ["layer"])
    results = []
    for layer in (model.layer, torch.compile(lambda x: model.layer(x), backend="aot_eager", fullgraph=True)):
        torch.manual_seed(1)
        x = rows().requires_grad_()
        model.zero_grad()
        y = layer(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(each.grad.clone() for each in model.layer.parameters() if each.requires_grad)])
    assert len(results[0]) == 4
    assert all(error(mine, eager) < 1e-6 for mine, eager in zip(*results[::-1], strict=True))


@pytest.mark.parametrize("when", ["before the patch", "after it", "adapted"])
def test_accelerate_s_hooks_go_on(when):
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    model, calls = Model().requires_grad_(False), []

    class Hook(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(type(module).__name__)
            return args, kwargs

    expected = fastpeft.quantise_base_fp8(copy.deepcopy(model), ["layer"])(rows())
    if when == "adapted":
        fastpeft.patch(model, lora())
    if when != "after it":
        add_hook_to_module(model.layer, Hook())
    fastpeft.quantise_base_fp8(model, ["layer"])
    if when == "after it":
        add_hook_to_module(model.layer, Hook())
    assert torch.equal(model(rows()), expected) and len(calls) == 1 and calls[0].endswith("Fp8Linear")
    remove_hook_from_module(model.layer)
    assert torch.equal(model(rows()), expected) and len(calls) == 1


def peft_model(base: nn.Module, **settings) -> nn.Module:
    torch.manual_seed(1)
    config = peft.LoraConfig(r=R, lora_alpha=8, **{"target_modules": ["q_proj", "down_proj"], **settings})
    return quietly(peft.get_peft_model, base, config)


def test_peft_s_adapters_before_and_after(tmp_path):
    """peft sees a torch.nn.Linear and calls it; patched, the numbers stay."""
    models = [peft_model(fastpeft.quantise_base_fp8(frozen())), peft_model(tiny())]
    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    assert torch.equal(*(each.get_parameter(first) for each in models))
    for model in models:
        randomise(model)
    fastpeft.quantise_base_fp8(models[1])
    bases = [[path.replace(".base_layer", "") for path in in_fp8(model)] for model in models]
    assert bases[0] == bases[1] == [f"base_model.model.{path}" for path in ALL]
    expected = models[0](**batch())
    assert torch.equal(models[1](**batch()).logits, expected.logits)
    for model in models:
        fastpeft.patch(model)
        assert torch.equal(model(**batch()).logits, expected.logits)
        rows = fastpeft.report(model).layers
        assert len(rows) == 4 and all("the base product is its own class's" in row.reason for row in rows)
        model.train()(**batch()).loss.backward()
        assert sum(each.grad is not None for each in model.parameters()) == 8
        model.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(fastpeft.quantise_base_fp8(frozen()), tmp_path)
        assert torch.equal(again(**batch()).logits, expected.logits)
        fastpeft.dequantise_base_fp8(model)
        assert 0 < error(model.eval()(**batch()).logits, expected.logits) < 0.3


def test_what_peft_itself_cannot_do_with_float8_fails_aloud():
    """It reads the weight of a torch.nn.Linear, which torch does not add to; DoRA, which would be wrong, is refused."""
    model = peft_model(fastpeft.quantise_base_fp8(frozen()))
    with pytest.raises(RuntimeError, match="Promotion for Float8"):
        model.merge_adapter()
    for settings in ({"use_dora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}):
        with pytest.raises((RuntimeError, TypeError), match=r"Float8|float32, float16|float8"):
            peft_model(fastpeft.quantise_base_fp8(frozen()), **settings)
    model = peft_model(tiny(), use_dora=True)
    before = snapshot(model)
    with pytest.raises(TargetError, match=r"q_proj.base_layer carries DoraLinearVariant of peft, which reads its"):
        fastpeft.quantise_base_fp8(model)
    assert differences(before, snapshot(model)) == []
    model = peft_model(tiny())
    model.merge_adapter()
    with pytest.raises(PatchError, match=r"q_proj has default merged into its weights"):
        fastpeft.quantise_base_fp8(model)
