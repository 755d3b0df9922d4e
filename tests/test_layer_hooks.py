"""Layers that something else already stands in front of: hooks of torch's and of accelerate's, forwards on instances,
weights that are kept elsewhere or computed; before patching, after it, and gone again."""

import copy
import types

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import (
    AlignDevicesHook,
    ModelHook,
    add_hook_to_module,
    attach_align_device_hook,
    remove_hook_from_module,
)
from torch import nn

import fastpeft
from tests.models import batch, differences, snapshot, tiny
from tests.peft_pair import close, randomise, result

TARGETS = ["q_proj", "v_proj", "down_proj", "embed_tokens"]


def config(**settings) -> fastpeft.LoraConfig:
    return fastpeft.LoraConfig(**{"r": 4, "target_modules": TARGETS, **settings})


def patched(model=None, task="CAUSAL_LM", **settings):
    """A patched model (of `tiny`) whose adapter does something, always the same."""
    torch.manual_seed(11)
    model = fastpeft.patch(tiny(task=task) if model is None else model, config(**settings))
    randomise(model)
    return model


def forward_of_instance(module):
    original = module.forward

    def forward(self, *args, **kwargs):
        return original(*args, **kwargs) * 3

    module.forward = types.MethodType(forward, module)


def test_a_forward_on_the_instance_is_the_base():
    model = tiny()
    layer = model.model.layers[0].self_attn.q_proj
    x = torch.randn(2, 32)
    delta = patched().model.layers[0].self_attn.q_proj(x) - layer(x)
    forward_of_instance(layer)
    expected = layer(x)
    before = snapshot(model)
    patched(model)
    close(layer(x), expected + delta, 1e-6)
    with fastpeft.disable_adapter(model):
        assert torch.equal(layer(x), expected)
    fastpeft.unpatch(model)
    assert differences(before, snapshot(model)) == []


@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["lm_head"]}], ids=["lora", "saved"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_run_once_and_see_what_goes_in_and_out(when, settings):
    calls = []
    model = tiny()
    layers = [model.model.layers[0].self_attn.q_proj, model.lm_head]

    def hook_up():
        for layer in layers:
            layer.register_forward_pre_hook(lambda module, args: calls.append(("pre", module, args[0].shape[-1])))
            layer.register_forward_hook(lambda module, args, output: calls.append(("out", module, output)))
            layer.register_full_backward_hook(lambda module, before, after: calls.append(("back", module, after)))

    if when == "before":
        hook_up()
    patched(model, **settings)
    if when == "after":
        hook_up()
    output = model(**batch())
    output.loss.backward()
    assert [(kind, module) for kind, module, _ in calls] == [
        *(("pre", layers[0]), ("out", layers[0]), ("pre", layers[1]), ("out", layers[1])),
        *(("back", layers[1]), ("back", layers[0])),
    ]
    assert torch.equal(calls[3][2], output.logits)
    plain = fastpeft.merge_and_unload(model)
    calls.clear()
    plain(**batch())
    assert [kind for kind, _, _ in calls] == ["pre", "out"] * 2  # also around a head that took the original's place


def aligned(module, **settings):
    return add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", **settings))


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"lora_dropout": 0.2}], ids=["plain", "dora", "dropout"])
def test_accelerate_hooks_from_before_stay_in_front(settings):
    expected = patched(**settings)
    model = tiny()
    for module in model.modules():
        aligned(module)
    before = snapshot(model)
    patched(model, **settings)
    inputs = batch()
    assert torch.equal(result(model, inputs), result(expected, inputs))
    assert all(row.reason.count("own class") == 0 for row in fastpeft.report(model).layers)  # not hidden from the op
    for layer in (model.model.layers[0].self_attn.q_proj, model.model.embed_tokens):
        aligned(layer)  # again, over the first, as dispatching a model a second time does
    assert torch.equal(result(model, inputs), result(expected, inputs))
    fastpeft.unpatch(model)
    for layer in (model.model.layers[0].self_attn.q_proj, model.model.embed_tokens):
        layer._hf_hook, layer.forward = None, None
    found = [line for line in differences(before, snapshot(model)) if "_hf_hook" not in line]
    assert found == []


def test_accelerate_hooks_from_before_may_go():
    expected = result(patched(), batch())
    model = tiny()
    base = result(model, batch())
    for module in model.modules():
        aligned(module)
    patched(model)
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(result(model, batch()), expected)
    fastpeft.unpatch(model)
    assert torch.equal(result(model, batch()), base)


@pytest.mark.parametrize("removed", ["not", "before unpatching", "after unpatching"])
def test_accelerate_hooks_from_after(removed):
    expected = result(patched(), batch())
    model = tiny()
    base = result(model, batch())
    before = snapshot(model)
    patched(model)
    for module in list(model.modules()):
        aligned(module)
    assert torch.equal(result(model, batch()), expected)
    if removed == "before unpatching":
        remove_hook_from_module(model, recurse=True)
        assert torch.equal(result(model, batch()), expected)
    fastpeft.unpatch(model)
    assert torch.equal(result(model, batch()), base)
    if removed == "after unpatching":
        remove_hook_from_module(model, recurse=True)
        assert torch.equal(result(model, batch()), base)
    if removed != "not":  # accelerate leaves the classes' forwards on the instances
        for module in model.modules():
            assert module.__dict__.pop("forward", module.forward).__func__ is type(module).forward
        assert differences(before, snapshot(model)) == []


class Counting(ModelHook):
    calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


def test_a_hooked_head_is_trained():
    inputs = batch("SEQ_CLS")
    model = tiny(task="SEQ_CLS")
    add_hook_to_module(model.score, Counting())
    before = snapshot(model)
    patched(model, task_type="SEQ_CLS", target_modules=["q_proj"])
    expected = patched(tiny(task="SEQ_CLS"), task_type="SEQ_CLS", target_modules=["q_proj"])
    assert torch.equal(result(model, inputs), result(expected, inputs))
    model(**inputs).loss.backward()
    assert model.score.modules_to_save["default"].weight.grad.any() and model.score.weight.grad is None
    assert model.score._hf_hook.calls == 2
    fastpeft.unpatch(model)
    assert differences(before, snapshot(model)) == []


@torch.no_grad()
@pytest.mark.parametrize(
    "settings", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}], ids=["lora", "dora", "head"]
)
def test_a_patched_model_can_be_offloaded(settings):
    model = patched(**settings)
    expected = result(model, batch())
    cpu_offload(model, execution_device="cpu")
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.weight.is_meta and layer.lora_A["default"].weight.is_meta
    assert torch.equal(result(model, batch()), expected)
    assert layer.weight.is_meta and layer.lora_A["default"].weight.is_meta
    with pytest.raises(fastpeft.PatchError, match="offloaded"):
        fastpeft.merge(model)


def test_an_offloaded_model_can_be_patched():
    expected = patched(init_lora_weights=False)
    model = cpu_offload(tiny(), execution_device="cpu")
    base = result(model, batch()).detach()
    patched(model, init_lora_weights=False)
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.weight.is_meta and layer.lora_A["default"].weight.device.type == "cpu"
    assert torch.equal(result(model, batch()), result(expected, batch()))
    for each in (model, expected):
        each(**batch()).loss.backward()
    assert torch.equal(
        layer.lora_A["default"].weight.grad,
        dict(expected.named_parameters())["model.layers.0.self_attn.q_proj.lora_A.default.weight"].grad,
    )
    fastpeft.unpatch(model)
    assert layer.weight.is_meta and type(layer) is nn.Linear
    assert torch.equal(result(model, batch()), base)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_dora": True}, "offloaded.*use_dora"),
        ({"init_lora_weights": "pissa", "target_modules": ["q_proj"]}, "offloaded.*'pissa'"),
        ({"modules_to_save": ["lm_head"]}, "lm_head.*offloaded"),
    ],
)
def test_what_needs_an_offloaded_weight_is_refused(settings, words):
    model = cpu_offload(tiny(), execution_device="cpu")
    before = snapshot(model)
    with pytest.raises(fastpeft.TargetError, match=words):
        fastpeft.patch(model, config(**settings))
    assert differences(before, snapshot(model)) == []


def test_a_part_may_be_offloaded_through_its_hooks():
    expected = result(patched(), batch())
    model = tiny()
    attach_align_device_hook(model.model.layers[1], execution_device="cpu", offload=True)
    patched(model)
    assert torch.equal(result(model, batch()), expected)


def test_weight_norm_in_a_trained_head():
    model = tiny(task="SEQ_CLS")
    nn.utils.parametrizations.weight_norm(model.score)
    patched(model, task_type="SEQ_CLS", target_modules=["q_proj"])
    model(**batch("SEQ_CLS")).loss.backward()
    head = model.score.modules_to_save["default"]
    norms, directions = head.parametrizations.weight.original0, head.parametrizations.weight.original1
    assert norms.grad.any() and directions.grad.any()
    before = result(model, batch("SEQ_CLS"))
    with torch.no_grad():
        norms.mul_(2)
    close(result(model, batch("SEQ_CLS")), 2 * before, 1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weight_norm_of_the_old_kind_in_a_trained_head_is_refused():
    model = tiny(task="SEQ_CLS")
    nn.utils.weight_norm(model.score)
    before = snapshot(model)
    with pytest.raises(fastpeft.TargetError, match=r"score has torch's old weight_norm.*parametrizations"):
        fastpeft.patch(model, config(task_type="SEQ_CLS"))
    assert differences(before, snapshot(model)) == []


@torch.no_grad()
def test_torchs_fused_encoder_layer_does_not_skip_the_adapter():
    # in eval mode it reads its linear layers' weights itself, and peft's adapter has no effect
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    base = model(x)
    config = fastpeft.LoraConfig(r=4, target_modules=["linear1", "linear2"])
    with pytest.raises(fastpeft.TargetError, match=r"linear1: .*set_fastpath_enabled\(False\)"):
        fastpeft.patch(model, config)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        randomise(fastpeft.patch(model, config))
        assert not torch.allclose(model(x), base)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_functional_calls_and_transforms_see_the_parameters_they_are_given():
    model = nn.Sequential(nn.Linear(6, 5))
    patched(model, target_modules=["0"])
    x = torch.randn(3, 6)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    doubled = {**parameters, "0.weight": 2 * parameters["0.weight"]}
    expected = copy.deepcopy(model)
    with torch.no_grad():
        expected[0].weight.mul_(2)
    close(torch.func.functional_call(model, doubled, (x,)), expected(x), 1e-6)
