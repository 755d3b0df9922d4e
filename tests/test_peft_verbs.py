"""Methods and functions that scripts written for peft call, on a patched model and on peft's beside it."""

import dataclasses

import peft
import pytest
import torch
from safetensors.torch import load_file

import fastpeft
from fastpeft import weighted
from tests import distributed_work as work
from tests.models import batch, tiny
from tests.peft_pair import WEIGHTS, close, quietly, result
from tests.test_distributed import partition

TARGETS = ["q_proj", "v_proj", "embed_tokens"]


def settings(**more) -> dict:
    return {"r": 4, "lora_alpha": 8, "target_modules": list(TARGETS), "task_type": "CAUSAL_LM", **more}


@torch.no_grad()
def fill(model) -> None:
    """Give every adapter values of its own, the same in both libraries."""
    for name, parameter in sorted(model.named_parameters()):
        for position, adapter in enumerate(model.peft_config):
            if f".{adapter}." in f"{name}.":
                generator = torch.Generator().manual_seed(position + len(parameter) + parameter.numel())
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def three(**more):
    """(peft's model, ours), each with the adapters "default", "b" and "c"."""
    models = []
    for library in (peft, fastpeft):
        torch.manual_seed(2)
        make = peft.get_peft_model if library is peft else fastpeft.patch
        model = quietly(make, tiny(), library.LoraConfig(**settings(**more)))
        quietly(model.add_adapter, "b", library.LoraConfig(**settings(lora_alpha=3)))
        quietly(model.add_adapter, "c", library.LoraConfig(**settings(target_modules=["q_proj", "up_proj"])))
        fill(model)
        models.append(model.eval())
    return models


SPARSE = {"density": 0.6}
COMBINATIONS = {
    "linear": {},
    "cat": {},
    "svd": {"svd_rank": 3},
    "ties": SPARSE,
    "dare_linear": SPARSE,
    "dare_ties": {**SPARSE, "majority_sign_method": "frequency"},
    "magnitude_prune": SPARSE,
    "ties_svd": SPARSE,
    "dare_linear_svd": SPARSE,
    "dare_ties_svd": SPARSE,
    "magnitude_prune_svd": {**SPARSE, "svd_clamp": 0.9},
}


@pytest.mark.parametrize("kind", COMBINATIONS)
def test_a_weighted_adapter_is_that_of_peft(kind):
    models = three(lora_alpha=5)
    outputs, dicts = [], []
    for model in models:
        torch.manual_seed(9)
        quietly(
            model.add_weighted_adapter, ["default", "b", "c"], [0.7, -0.4, 1.5], "mixed", combination_type=kind,
            **COMBINATIONS[kind],
        )  # fmt: skip
        assert list(model.active_adapters) == ["default"]
        model.set_adapter("mixed")
        outputs.append(quietly(result, model, batch()))
        get = peft.get_peft_model_state_dict if model is models[0] else fastpeft.get_peft_model_state_dict
        dicts.append(quietly(get, model, adapter_name="mixed"))
    expected, found = dicts
    assert found.keys() == expected.keys()
    assert kind in weighted.KINDS and set(COMBINATIONS) == set(weighted.KINDS)
    if kind.endswith("svd"):  # of which the factors' signs are free
        close(outputs[1], outputs[0], 1e-4)
        assert {key: tensor.shape for key, tensor in found.items()} == {k: t.shape for k, t in expected.items()}
    else:
        close(outputs[1], outputs[0], 1e-5)
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-6, msg=key)
    configs = [model.peft_config["mixed"] for model in models]
    for name in ("r", "lora_alpha", "target_modules"):
        assert getattr(configs[1], name) == getattr(configs[0], name), name


def test_of_one_adapter_and_of_patterns_that_differ_in_kind_it_is_exact(tmp_path):
    model = fastpeft.patch(tiny(), fastpeft.LoraConfig(**settings(target_modules="all-linear", use_rslora=True)))
    model.add_adapter("b", fastpeft.LoraConfig(**settings(target_modules=r".*\.q_proj", layers_pattern=None)))
    fill(model)
    before = result(model.eval(), batch())
    fastpeft.add_weighted_adapter(model, ["default"], [1.0], "same", "ties")
    model.set_adapter("same")
    close(result(model, batch()), before, 1e-5)
    fastpeft.set_adapter(model, ["default", "b"])
    before = result(model, batch())
    fastpeft.add_weighted_adapter(model, ["default", "b"], [1.0, 1.0], "both", "cat")
    model.set_adapter("both")
    close(result(model, batch()), before, 1e-5)
    fastpeft.save_adapter(model, tmp_path, adapter_name="both")
    close(result(fastpeft.load_adapter(tiny(), tmp_path / "both"), batch()), before, 1e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"adapters": ["default", "x"]}, "there is no adapter 'x'; there are 'default', 'b', 'c', 'd'"),
        ({"adapters": [], "weights": []}, "no adapters are named"),
        ({"adapter_name": "b"}, "there is already an adapter 'b'; choose another name"),
        ({"weights": [1.0]}, r"weights=\[1.0\]; give a finite number for each of the 2 adapters"),
        ({"weights": [1.0, float("nan")]}, r"weights=\[1.0, nan\]; give a finite number for each"),
        ({"combination_type": "mean"}, "combination_type='mean'; choose one of cat, svd, linear"),
        ({"combination_type": "ties"}, "density=None; ties keeps a share of the values"),
        ({"combination_type": "ties", "density": 1.5}, "density=1.5; ties keeps a share"),
        ({"svd_rank": 0}, "svd_rank=0; a rank is an int of at least 1"),
        ({"svd_clamp": 1.5}, "svd_clamp=1.5; it is a quantile, from 0 to 1, or None"),
        (
            {"adapters": ["default", "ranks"], "combination_type": "linear"},
            r"linear needs adapters of one r, and at model.layers.1.self_attn.q_proj these have \[4, 2\]; use 'cat'",
        ),
        ({"majority_sign_method": "most"}, "majority_sign_method='most'; choose 'total' or 'frequency'"),
        (
            {"adapters": ["default", "d"], "combination_type": "linear"},
            r"linear needs adapters of one r, and these have \[4, 2\]",
        ),
        ({"adapters": ["default", "p"]}, "'p' is PROMPT_TUNING; only LoRAs are made of others"),
        ({"adapters": ["default", "dora"]}, "'dora' has use_dora=True, which cannot be added up"),
        ({"adapters": ["default", "whole"]}, "lm_head is trained whole by whole, which cannot be added up"),
    ],
)
def test_what_cannot_be_combined_is_refused(changes, said):
    _, model = three()
    uneven = {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "use_rslora": False}
    for name, more in (
        ("d", {"r": 2}),
        ("ranks", uneven),
        ("dora", {"use_dora": True}),
        ("whole", {"modules_to_save": ["lm_head"]}),
    ):
        if name == "d" or name in changes.get("adapters", ()):
            model.add_adapter(name, fastpeft.LoraConfig(**settings(target_modules=["q_proj"], **more)))
    if "p" in changes.get("adapters", ()):
        model = fastpeft.patch(tiny(), fastpeft.LoraConfig(**settings(target_modules=["q_proj"])))
        model.add_adapter("p", fastpeft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    before = set(model.peft_config)
    given = {"adapters": ["default", "b"], "weights": [0.5, 0.5], "adapter_name": "new", **changes}
    with pytest.raises(fastpeft.PatchError, match=f"add_weighted_adapter: {said}"):
        model.add_weighted_adapter(**given)
    assert set(model.peft_config) == before and not any(".new" in name for name, _ in model.named_parameters())


def test_status_has_the_fields_and_values_of_peft():
    def seen(model):
        whole = dataclasses.asdict(model.get_model_status())
        layers = [dataclasses.asdict(each) for each in model.get_layer_status()]
        for each in layers:
            if each["name"].startswith("model.model.") or each["name"] == "model.lm_head":  # below peft's LoraModel
                each["name"] = each["name"].removeprefix("model.")
            assert each.pop("module_type")
        assert whole.pop("adapter_model_type")
        return whole, {each["name"]: each for each in layers}

    hf, ours = three()
    assert seen(ours) == seen(hf) and seen(ours)[0]["num_adapter_layers"] == 7
    for model in (hf, ours):
        model.set_adapter("b")
    assert seen(ours) == seen(hf)
    with hf.disable_adapter(), ours.disable_adapter():
        assert seen(ours)[0]["enabled"] is seen(hf)[0]["enabled"] is False
    for model in (hf, ours):
        quietly(model.merge_adapter, ["b", "c"])
    assert seen(ours)[0]["merged_adapters"] == seen(hf)[0]["merged_adapters"]
    for model in (hf, ours):
        quietly(model.unmerge_adapter)
        next(p for name, p in model.named_parameters() if "lora_A.b" in name).requires_grad_(False)
    assert seen(ours)[0]["requires_grad"]["b"] == seen(hf)[0]["requires_grad"]["b"] == "irregular"
    assert [field.name for field in dataclasses.fields(ours.get_model_status())] == [
        field.name for field in dataclasses.fields(hf.get_model_status())
    ]
    with pytest.raises(fastpeft.PatchError, match="is not patched"):
        fastpeft.get_model_status(tiny())


def test_rescaling_is_that_of_peft_and_ends():
    hf, ours = three()
    before = result(ours, batch())
    with peft.helpers.rescale_adapter_scale(hf, 0.3), fastpeft.rescale_adapter_scale(ours, 0.3):
        close(result(ours, batch()), result(hf, batch()), 1e-5)
        assert not torch.equal(result(ours, batch()), before)
        ours.delete_adapter("c")
    assert torch.equal(result(ours, batch()), before)
    for value in (True, "2", float("inf")):
        with pytest.raises(fastpeft.PatchError, match="multiplier=.* must be a finite number"):
            fastpeft.rescale_adapter_scale(ours, value).__enter__()
    prompt = fastpeft.patch(tiny(), fastpeft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises(fastpeft.PatchError, match="only LoRA has a scale, and this model has no LoRA"):
        fastpeft.rescale_adapter_scale(prompt, 2).__enter__()
    ours.merge_adapter()
    with pytest.raises(fastpeft.PatchError, match="default is merged into the weights; unmerge first"):
        fastpeft.rescale_adapter_scale(ours, 2).__enter__()


def test_state_dicts_go_from_library_to_library():
    hf, ours = three()
    for adapter in ("default", "c"):
        expected = quietly(peft.get_peft_model_state_dict, hf, adapter_name=adapter)
        found = fastpeft.get_peft_model_state_dict(ours, adapter_name=adapter)
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    changed = {key: tensor.clone() + 0.1 for key, tensor in expected.items()}
    by_peft = quietly(peft.set_peft_model_state_dict, hf, changed, "c")
    by_us = fastpeft.set_peft_model_state_dict(ours, changed, "c")
    assert by_us.unexpected_keys == by_peft.unexpected_keys == [] == by_us.missing_keys
    for model in (hf, ours):
        model.set_adapter("c")
    close(result(ours, batch()), result(hf, batch()), 1e-5)
    moved = {name: tensor * 2 for name, tensor in ours.state_dict().items()}
    twice = fastpeft.get_peft_model_state_dict(ours, moved, "c")
    assert all(torch.equal(twice[key], changed[key] * 2) for key in changed)
    ours.set_adapter("c")
    named = fastpeft.get_peft_model_state_dict(ours, adapter_name=None, save_embedding_layers=True)
    assert changed.keys() < named.keys() and "base_model.model.lm_head.weight" in named
    del moved["model.layers.0.self_attn.q_proj.lora_A.c.weight"]
    with pytest.raises(fastpeft.PatchError, match="state_dict has no model.layers.0.self_attn.q_proj.lora_A.c.weight"):
        fastpeft.get_peft_model_state_dict(ours, moved, "c")


def test_a_state_dict_that_does_not_fit_changes_nothing():
    _, ours = three()
    before = {name: parameter.clone() for name, parameter in ours.named_parameters()}
    good = fastpeft.get_peft_model_state_dict(ours, adapter_name="c")
    key, first = next(iter(good.items()))
    for bad in (
        {name: tensor for name, tensor in good.items() if name != key},
        {**good, "other": first},
        {**good, key: first[:1]},
        {**good, key: first.tolist()},
        {**good, key: first.long()},
        {**good, key: torch.full_like(first, float("nan"))},
        {**good, list(good)[-1]: torch.full_like(good[list(good)[-1]], float("inf"), dtype=torch.float64)},
    ):
        with pytest.raises(fastpeft.AdapterFileError, match="peft_model_state_dict"):
            fastpeft.set_peft_model_state_dict(ours, bad, "c")
    for arguments, said in (
        ((good, "x"), "there is no adapter 'x'; there are 'default', 'b', 'c'"),
        ((good, "c", True), "ignore_mismatched_sizes=True cannot be honoured"),
    ):
        with pytest.raises(fastpeft.PatchError, match=said):
            fastpeft.set_peft_model_state_dict(ours, *arguments)
    with pytest.raises(fastpeft.PatchError, match="save_embedding_layers=False cannot be honoured"):
        fastpeft.get_peft_model_state_dict(ours, save_embedding_layers=False)
    assert all(torch.equal(parameter, before[name]) for name, parameter in ours.named_parameters())
    network = fastpeft.patch(
        tiny(), fastpeft.PrefixTuningConfig(num_virtual_tokens=2, prefix_projection=True, task_type="CAUSAL_LM")
    )
    table = fastpeft.get_peft_model_state_dict(network)
    with pytest.raises(fastpeft.PatchError, match="'default' comes out of a network, which such a dict does not hold"):
        fastpeft.set_peft_model_state_dict(network, table)
    with pytest.raises(fastpeft.PatchError, match="prompt_embeddings is computed; leave state_dict out"):
        fastpeft.get_peft_model_state_dict(network, network.state_dict())


@pytest.fixture
def saved(tmp_path):
    """(directory of a base model, of an adapter of it)"""
    tiny().save_pretrained(tmp_path / "base")
    model = type(tiny()).from_pretrained(tmp_path / "base")
    fastpeft.patch(model, fastpeft.LoraConfig(**settings(target_modules=["q_proj"])))
    fill(model)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter", result(model.eval(), batch())


def test_auto_classes_load_the_base_with_the_adapter(saved):
    base, adapter, expected = saved
    hf = quietly(peft.AutoPeftModelForCausalLM.from_pretrained, adapter)
    ours = fastpeft.AutoPeftModelForCausalLM.from_pretrained(adapter)
    close(result(ours, batch()), expected, 1e-6)
    close(result(ours, batch()), result(hf, batch()), 1e-5)
    assert not ours.training and not any(parameter.requires_grad for parameter in ours.parameters())
    trained = fastpeft.AutoPeftModelForCausalLM.from_pretrained(adapter, adapter_name="mine", is_trainable=True)
    assert list(trained.peft_config) == ["mine"] and any(parameter.requires_grad for parameter in trained.parameters())
    with pytest.raises(fastpeft.ConfigError, match="'CAUSAL_LM'; AutoPeftModelForSeq2SeqLM is for SEQ_2_SEQ_LM"):
        fastpeft.AutoPeftModelForSeq2SeqLM.from_pretrained(adapter)
    with pytest.raises(fastpeft.ConfigError, match="is not made: call AutoPeftModel.from_pretrained"):
        fastpeft.AutoPeftModel()
    config = fastpeft.PeftConfig.from_pretrained(adapter)
    assert config == fastpeft.LoraConfig.from_pretrained(adapter) and config.base_model_name_or_path == str(base)
    assert config.r == peft.PeftConfig.from_pretrained(adapter).r == 4
    with pytest.raises(fastpeft.ConfigError, match="a PrefixTuningConfig is for PREFIX_TUNING"):
        fastpeft.PrefixTuningConfig.from_pretrained(adapter)


def test_an_adapter_without_a_task_has_its_base_in_the_mapping(tmp_path):
    tiny().save_pretrained(tmp_path / "base")
    model = type(tiny()).from_pretrained(tmp_path / "base")
    fastpeft.patch(model, fastpeft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    loaded = fastpeft.AutoPeftModel.from_pretrained(tmp_path / "adapter")
    assert type(loaded).__name__ == "LlamaForCausalLM" and list(loaded.peft_config) == ["default"]
    text = (tmp_path / "adapter/adapter_config.json").read_text()
    for old, new, said in (
        ("transformers.models", "other.models", "auto_mapping=.* names no model of transformers"),
        (f'"{tmp_path / "base"}"', "null", "names no base model"),
    ):
        (tmp_path / "adapter/adapter_config.json").write_text(text.replace(old, new))
        with pytest.raises(fastpeft.ConfigError, match=said):
            fastpeft.AutoPeftModel.from_pretrained(tmp_path / "adapter")


def pair_alone():
    """(peft's model, ours) with one adapter."""
    models = []
    for library, make in ((peft, peft.get_peft_model), (fastpeft, fastpeft.patch)):
        torch.manual_seed(2)
        models.append(quietly(make, tiny(), library.LoraConfig(**settings(target_modules=["q_proj"]))))
    return models


def trained(model) -> set[str]:
    """The adapters of which something trains."""
    return {
        adapter
        for adapter in model.peft_config
        for name, parameter in model.named_parameters()
        if f".{adapter}." in name and parameter.requires_grad
    }


def test_the_meaning_of_the_verbs_is_that_of_peft(tmp_path):
    for model, library in zip(pair_alone(), (peft, fastpeft), strict=True):
        other = library.LoraConfig(**settings(target_modules=["q_proj", "v_proj"]))
        model.add_adapter("other", other)
        assert model.active_adapter == "default" and model.active_peft_config is model.peft_config["default"]
        assert trained(model) == {"default"}
        with pytest.raises(ValueError):
            model.add_adapter("other", library.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
        model.set_adapter("other")
        assert model.active_adapter == "other" and trained(model) == {"other"}
        model.set_adapter("other", inference_mode=True)
        assert trained(model) == set()
        model.set_adapter("default")
        fill(model)
        with torch.no_grad():
            before = result(model.eval(), batch())
            with model.disable_adapter():
                close(result(model, batch()), result(tiny(), batch()), 1e-6)
            assert torch.equal(result(model, batch()), before) and model.active_adapter == "default"
        assert isinstance(model.peft_config, dict) and model.peft_config["default"].r == 4
        assert model.config.hidden_size == model.get_base_model().config.hidden_size
        model.save_pretrained(tmp_path / library.__name__)
        quietly(model.delete_adapter, "default")
        assert list(model.active_adapters) == ["other"]
        loaded = (
            quietly(peft.PeftModel.from_pretrained, tiny(), tmp_path / "peft")
            if library is peft
            else fastpeft.load_adapter(tiny(), tmp_path / "fastpeft")
        )
        assert not loaded.training and trained(loaded) == set()
        keys = list((peft if library is peft else fastpeft).get_peft_model_state_dict(loaded))
        assert keys and all(key.startswith("base_model.model.model.layers.") for key in keys)


def test_input_gradients_and_checkpointing_go_together():
    for model in pair_alone():
        fill(model)
        model.train()
        model.enable_input_require_grads()
        quietly(model.gradient_checkpointing_enable, gradient_checkpointing_kwargs={"use_reentrant": True})
        model(**batch()).loss.backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients) and gradients


@pytest.mark.parametrize("method", ["lora-head", "p-tuning-lstm"])
def test_a_partitioned_model_gives_the_values_of_its_state_dict(method, tmp_path):
    """As transformers' Trainer saves, and as scripts do, under an engine that divides parameters."""
    model = work.patched(method)
    expected = {key: tensor.clone() for key, tensor in fastpeft.adapter_state_dict(model).items()}
    whole = partition(model)
    with pytest.raises(fastpeft.PatchError, match="is partitioned by DeepSpeed ZeRO-3"):
        model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, state_dict=whole)
    saved = load_file(tmp_path / WEIGHTS)
    assert saved.keys() == expected.keys() and all(torch.equal(saved[key], expected[key]) for key in saved)
    if method == "lora-head":
        found = fastpeft.get_peft_model_state_dict(model, whole)
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
