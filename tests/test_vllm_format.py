"""Adapters trained here are ones that vLLM can serve: the rules of its loader (vLLM 0.33, lora/peft_helper.py,
lora/lora_model.py and lora/utils.py), applied to what is saved. vLLM itself needs a GPU and is not installed."""

import json
import math
import re

import pytest
import torch
from safetensors import safe_open

import fastpeft
from tests.models import tiny

NEUTRAL_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
REFUSED = ("use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora")
WHOLE = ("classifier", "score")
BASES = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")


def problems(directory, linear: set[str]) -> list[str]:
    """What vLLM would refuse of an adapter, for a model whose linear layers have these names."""
    config = json.loads((directory / "adapter_config.json").read_text())
    found = [name for name in REFUSED if config.get(name)]
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in NEUTRAL_INITS:
        found.append(f"init_lora_weights={init}")
    if any(name not in WHOLE for name in config.get("modules_to_save") or ()):
        found.append("modules_to_save")
    if not isinstance(config["r"], int) or config["r"] <= 0 or not isinstance(config["target_modules"], list | str):
        found.append("r or target_modules")
    with safe_open(directory / "adapter_model.safetensors", framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    for name, shape in shapes.items():
        if name.endswith(BASES) or "base_layer" in name:
            continue
        match = re.fullmatch(r"base_model\.model\.(.*)\.(lora_A|lora_B)\.weight", name)
        match = match or re.fullmatch(r"base_model\.model\.(.*)\.(lora_embedding_A|lora_embedding_B)", name)
        whole = name.split(".")[-2] in WHOLE
        if match is None:
            found += [] if whole else [f"{name} is unsupported LoRA weight"]
        elif match[1].rpartition(".")[2] not in linear:
            found.append(f"{match[1]} is no linear layer")
        elif shape[0 if match[2].endswith("A") else 1] != rank_of(config, match[1]):
            found.append(f"{name} has another rank than the configuration says")
    return found


def rank_of(config: dict, module: str) -> int:
    """By the rule of peft, which vLLM repeats: a pattern is the end of a path, the first that matches counts."""
    patterns = config.get("rank_pattern") or {}
    return next((rank for key, rank in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), config["r"])


LINEAR = {
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "lm_head",
    "embed_tokens",
    "score",
}
SERVED = {
    "attention": ({"target_modules": ["q_proj", "v_proj"]}, "CAUSAL_LM"),
    "all-linear": ({"target_modules": "all-linear"}, "CAUSAL_LM"),
    "rslora and patterns": (
        {
            "target_modules": "all-linear",
            "use_rslora": True,
            "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {"v_proj": 9},
        },
        "CAUSAL_LM",
    ),
    "embeddings": ({"target_modules": ["q_proj", "embed_tokens"]}, "CAUSAL_LM"),
    "gaussian": ({"target_modules": ["q_proj"], "init_lora_weights": "gaussian"}, "CAUSAL_LM"),
    "a head": ({"target_modules": ["q_proj"]}, "SEQ_CLS"),
}
NOT_SERVED = {
    "use_dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "init_lora_weights=pissa": {"init_lora_weights": "pissa"},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
}


def saved(settings, task, folder):
    torch.manual_seed(0)
    model = fastpeft.patch(tiny("llama", task), fastpeft.LoraConfig(r=4, task_type=task, **settings))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("which", SERVED)
def test_what_is_saved_can_be_served(which, tmp_path):
    model = saved(*SERVED[which], tmp_path)
    assert problems(tmp_path, LINEAR) == []
    config, ours = json.loads((tmp_path / "adapter_config.json").read_text()), dict(model.named_modules())
    layer = ours["model.layers.0.self_attn.q_proj"]._fastpeft.adapters["default"]
    rank = rank_of(config, "model.layers.0.self_attn.q_proj")
    # the scaling that vLLM computes for itself
    assert layer.scaling == config["lora_alpha"] / (math.sqrt(rank) if config["use_rslora"] else rank)


@pytest.mark.parametrize("which", NOT_SERVED)
def test_the_rules_find_what_cannot(which, tmp_path):
    saved({"target_modules": ["q_proj"], **NOT_SERVED[which]}, "CAUSAL_LM", tmp_path)
    assert any(each.startswith(which) for each in problems(tmp_path, LINEAR))


def test_a_folder_of_another_name_serves_too(tmp_path):
    """vLLM is given the folder of one adapter: a model's second has one of its own."""
    model = saved({"target_modules": ["q_proj"]}, "CAUSAL_LM", tmp_path / "first")
    model.add_adapter("second", fastpeft.LoraConfig(r=2, target_modules=["v_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "both")
    for folder in ("both", "both/second"):
        assert problems(tmp_path / folder, LINEAR) == []
