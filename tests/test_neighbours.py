"""Models that other libraries have changed too: what would pass an adapter by is refused, the rest goes on beside."""

import types

import pytest
import torch
import transformers

import fastpeft
from fastpeft import neighbours
from fastpeft.integrations.trainer import Trainer
from fastpeft.tuners import lora_injection
from tests.models import batch, differences, snapshot, tiny
from tests.peft_pair import close, quietly

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
ALONE = {"rope": False, "swiglu": False, "rms_norm": False}  # Triton's interpreter runs the fused cross-entropy


def with_liger(model):
    """Its fused cross-entropy on this instance."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    quietly(apply_liger_kernel_to_llama, model=model, fused_linear_cross_entropy=True, **ALONE)
    return model


def of(package: str):
    """A function as that package might have it."""

    def apply_lora_mlp_swiglu(self, x):
        return x

    apply_lora_mlp_swiglu.__module__ = f"{package}.kernels.lora"
    return apply_lora_mlp_swiglu


@pytest.mark.parametrize("package", ["unsloth", "unsloth_zoo", "axolotl"])
def test_functions_that_would_pass_an_adapter_by_are_refused(package, monkeypatch):
    neighbours.check_neighbours(tiny())
    model = tiny()
    mlp = model.model.layers[1].mlp
    mlp.forward = types.MethodType(of(package), mlp)
    with pytest.raises(fastpeft.PatchError, match=rf"patch: model.layers.1.mlp.forward is {package}'s, which computes"):
        neighbours.check_neighbours(model)
    model = tiny()
    model.model.layers[0].self_attn.apply_qkv = of(package)
    with pytest.raises(fastpeft.PatchError, match=rf"model.layers.0.self_attn.apply_qkv is {package}'s"):
        neighbours.check_neighbours(model)
    model = tiny()
    monkeypatch.setattr(type(model.model.layers[0].mlp), "forward", of(package))
    with pytest.raises(fastpeft.PatchError, match=rf"model.layers.0.mlp.forward is {package}'s"):
        neighbours.check_neighbours(model)


def test_ligers_head_is_known_on_instances_on_classes_and_behind_adapters(monkeypatch):
    assert not neighbours.has_fused_head(tiny())
    assert neighbours.has_fused_head(with_liger(tiny()))
    assert neighbours.has_fused_head(fastpeft.patch(with_liger(tiny()), fastpeft.LoraConfig(**LORA)))
    from liger_kernel.transformers.model.llama import lce_forward

    patched = fastpeft.patch(tiny(), fastpeft.LoraConfig(**LORA))
    assert not neighbours.has_fused_head(patched)
    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", lce_forward)
    assert neighbours.has_fused_head(tiny()) and neighbours.has_fused_head(patched)


@pytest.mark.parametrize(
    "where", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}], ids=["lora", "all"]
)
def test_an_adapter_on_a_head_that_liger_does_not_call_is_refused(where, tmp_path):
    config = fastpeft.LoraConfig(**{**LORA, **where})
    model = with_liger(tiny())
    said = "the adapter changes the model's head, and Liger's fused .*in a Trainer liger_kernel_config="
    with pytest.raises(fastpeft.PatchError, match=f"patch: {said}"):
        neighbours.check_head(model, lora_injection.plan(model, config))
    neighbours.check_head(tiny(), lora_injection.plan(tiny(), config))
    neighbours.check_head(model, lora_injection.plan(model, fastpeft.LoraConfig(**LORA)))
    patched = fastpeft.patch(tiny(), config)
    neighbours.check_liger(patched, fused=False)
    arguments = transformers.TrainingArguments(str(tmp_path), use_liger_kernel=True, use_cpu=True, report_to=[])
    with pytest.raises(fastpeft.PatchError, match=f"train: {said}"):
        Trainer(patched, arguments, train_dataset=[{}]).train()
    assert "forward" not in patched.__dict__


@pytest.mark.interpreter
@pytest.mark.parametrize("first", ["liger", "patch"])
@pytest.mark.parametrize(
    "config",
    [
        fastpeft.LoraConfig(**LORA),
        fastpeft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        fastpeft.AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    ],
    ids=["lora", "prompt", "adalora"],
)
def test_ligers_cross_entropy_goes_on_beside_adapters(config, first):
    found = []
    for liger in (False, True):
        model = tiny()
        if liger and first == "liger":
            with_liger(model)
        torch.manual_seed(1)
        fastpeft.patch(model, config).train()
        if liger and first == "patch":
            neighbours.put_behind(with_liger(model))
        assert "forward" not in model.__dict__
        quietly(model, **batch()).loss.backward()
        loss = quietly(model, **batch()).loss
        found.append((loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    assert neighbours.has_fused_head(model)
    close(found[1][0], found[0][0], 1e-5)
    assert found[1][1].keys() == found[0][1].keys() and found[0][1]
    greatest = max(float(grad.abs().max()) for grad in found[0][1].values())
    for name, grad in found[0][1].items():
        close(found[1][1][name], grad, 1e-4, floor=1e-6 * greatest)


@pytest.mark.parametrize("version", ["5.24.0", "5.24.0.dev0", "6.0"])
def test_virtual_tokens_are_refused_where_transformers_would_get_them_wrong(version, monkeypatch):
    import transformers

    model = tiny()
    before = snapshot(model)
    monkeypatch.setattr(transformers, "__version__", version)
    for config in (
        fastpeft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
        fastpeft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    ):
        with pytest.raises(fastpeft.PatchError, match=f"with transformers {version}, which has renamed caches"):
            fastpeft.patch(model, config)
    assert differences(before, snapshot(model)) == []
    fastpeft.patch(model, fastpeft.LoraConfig(r=2, target_modules=["q_proj"]))
