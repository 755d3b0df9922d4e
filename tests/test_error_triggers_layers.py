"""As tests/test_error_triggers.py, for what layers, and models of several adapters, refuse."""

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fastpeft
from fastpeft import filling
from fastpeft.errors import AdapterFileError, ConfigError, FastpeftError, OpError, PatchError, TargetError
from fastpeft.integrations import quantised
from fastpeft.integrations.peft import adalora_checkpoints
from fastpeft.ops import prefix_attention
from tests.models import tiny
from tests.peft_pair import quietly
from tests.test_error_triggers import Convolved, lora, patched, saved

PROMPT = {"num_virtual_tokens": 2, "task_type": "CAUSAL_LM"}
GROUPS = {"r": 3, "target_modules": ["mix"]}


def q_proj(model):
    return model.model.layers[0].self_attn.q_proj


def a_start_among_places(path):
    q, k = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 5, 4)
    places = torch.arange(5)[None]
    options = {"sliding_window": 2, "key_positions": places, "query_start": 3}
    prefix_attention(q, k, k, k[:, :, :2], k[:, :, :2], **options)


def training_of_another_model(path):
    model = quietly(peft.get_peft_model, tiny(), peft.AdaLoraConfig(total_step=9, target_modules=["q_proj"]))
    save_file({"a": torch.zeros(1)}, path / "state.safetensors")
    adalora_checkpoints.restore_training(model, str(path / "state.safetensors"))


def an_offloaded_weight_merged(path):
    model = patched()
    q_proj(model).weight = nn.Parameter(torch.empty(32, 32, device="meta"))
    model.merge_adapter()


def an_offloaded_quantised_weight_merged(path):
    import bitsandbytes

    model = nn.ModuleDict({"mix": bitsandbytes.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32)})
    fastpeft.patch(model.to("cpu"), lora(target_modules=["mix"]))
    model["mix"]._parameters["weight"] = nn.Parameter(torch.empty(64, 64, device="meta"), requires_grad=False)
    fastpeft.merge(model)


def a_computed_weight_merged(path):
    model = tiny()
    torch.nn.utils.parametrizations.weight_norm(q_proj(model))
    fastpeft.patch(model, lora()).merge_adapter()


def after(method, family="llama", **more):
    """A LoRA beside virtual tokens."""
    model = fastpeft.patch(tiny(family), method(**PROMPT))
    model.add_adapter("b", lora(**more))


def an_encoder_s_prefix_of_an_encoder(path):
    encoder = tiny("bart", "SEQ_2_SEQ_LM").get_encoder()
    config = fastpeft.PrefixTuningConfig(num_virtual_tokens=2, task_type="SEQ_2_SEQ_LM", encoder_prefix=True)
    fastpeft.patch(encoder, config)


def a_part_of_what_is_saved(path):
    model = patched(modules_to_save=["mlp"])
    model.add_adapter("b", lora(modules_to_save=["gate_proj"]))


def modules_saved_in_part(path):
    model = patched(modules_to_save=["gate_proj"])
    model.add_adapter("b", lora(modules_to_save=["mlp"]))


def one_module_of_two_names(path):
    model = tiny()
    model.twin = model.lm_head
    fastpeft.patch(model, lora(modules_to_save=["lm_head", "twin"]))


def weighted_biases(path):
    model = patched("llama-bias", bias="all")
    fastpeft.add_weighted_adapter(model, ["default"], [1.0], "c")


def an_offloaded_value(path):
    place = filling.Place((1,), filling.BASE, "w")
    filling._check_values("k", place, torch.empty(1, device="meta"), {"k": torch.zeros(1)}, "f")


# name -> (class, words of the text, trigger)
TRIGGERS = {
    "a start among places": (OpError, "query_start is 3; with key_positions 0 to T - S = 2", a_start_among_places),
    "training of another model": (AdapterFileError, "state.safetensors is of another model", training_of_another_model),
    "a weight of torchao's": (
        PatchError,
        "a weight of torchao's Parameter is not quantised again from here",
        lambda path: quantised._requantised_torchao(nn.Linear(2, 2), torch.zeros(2, 2)),
    ),
    "an offloaded weight": (PatchError, "q_proj: its weight is offloaded by accelerate", an_offloaded_weight_merged),
    "an offloaded quantised weight": (PatchError, "mix: its weight is offl", an_offloaded_quantised_weight_merged),
    "a computed weight": (PatchError, "its weight is computed from other parameters", a_computed_weight_merged),
    "a bias into no bias": (
        PatchError,
        "an adapter with lora_bias cannot be merged into a layer without a bias",
        lambda path: patched(lora_bias=True).merge_adapter(),
    ),
    "an embedding in front of which a prompt stands": (
        TargetError,
        "model.embed_tokens already carries an adapter of another method",
        lambda path: after(fastpeft.PromptTuningConfig, target_modules=["embed_tokens"]),
    ),
    "positions that a prefix moves": (
        TargetError,
        "transformer.wpe already carries an adapter of another method",
        lambda path: after(fastpeft.PrefixTuningConfig, "gpt2", target_modules=["wpe"]),
    ),
    "an embedding trained whole behind a prompt": (
        TargetError,
        "modules_to_save has model.embed_tokens, but model.embed_tokens already carries an adapter",
        lambda path: after(fastpeft.PromptTuningConfig, modules_to_save=["embed_tokens"]),
    ),
    "a layer that is never called": (
        TargetError,
        "in eval mode torch.nn.TransformerEncoderLayer reads this weight",
        lambda path: fastpeft.patch(nn.TransformerEncoderLayer(8, 2, 8), lora(target_modules=["linear1"])),
    ),
    "groups merged": (
        PatchError,
        "mix: LoRA on a convolution with 3 groups cannot be merged",
        lambda path: fastpeft.patch(Convolved(), lora(**GROUPS)).merge_adapter(),
    ),
    "groups of DoRA": (
        ConfigError,
        "use_dora=True does not apply to mix, a convolution with 3 groups",
        lambda path: fastpeft.patch(Convolved(), lora(**GROUPS, use_dora=True)),
    ),
    "a prompt of no transformers model": (
        TargetError,
        "Linear is not a transformers model: it does not say what its embedding of tokens is",
        lambda path: fastpeft.patch(nn.Linear(2, 2), fastpeft.PromptTuningConfig(**PROMPT)),
    ),
    "modules saved in part": (
        TargetError,
        "modules_to_save has model.layers.0.mlp, but another adapter trains model.layers.0.mlp.gate_proj in it whole",
        modules_saved_in_part,
    ),
    "a part of what is saved": (TargetError, "already trains whole as part of more; leave it", a_part_of_what_is_saved),
    "an encoder's prefix of an encoder": (ConfigError, "has the prefix; leave it", an_encoder_s_prefix_of_an_encoder),
    "one module of two names": (TargetError, "which are one module; name one of them", one_module_of_two_names),
    "weighted biases": (PatchError, "has bias='all', and trained biases cannot be added up", weighted_biases),
    "an offloaded value": (PatchError, "f has a value for w, which accelerate has offloaded", an_offloaded_value),
    "quirks that are no truth": (
        AdapterFileError,
        "hf_quirks='yes'",
        lambda path: fastpeft.load_adapter(tiny(), saved(path, hf_quirks="yes")),
    ),
}


@pytest.mark.parametrize("name", TRIGGERS)
def test_it_is_refused_in_these_words(name, tmp_path):
    kind, words, trigger = TRIGGERS[name]
    with pytest.raises(FastpeftError, match=words) as caught:
        trigger(tmp_path)
    assert type(caught.value) is kind
