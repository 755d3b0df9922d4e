"""Which modules carry a prefix on each family, what moves positions behind it, and which models are refused by name."""

import pytest
import torch

import fastpeft
from fastpeft.attention import positions, sites
from fastpeft.attention.interface import NAME
from fastpeft.attention.sites import find_sites
from tests.models import batch, differences, snapshot, tiny
from tests.prefix_pair import EVERY, prefixed, settings_of, task_of

SELF = {
    **{family: "model.layers.{}.self_attn" for family in EVERY},
    **{family: "transformer.h.{}.attn" for family in ("gpt2", "gpt_bigcode", "gptj", "codegen")},
    **{family: "transformer.h.{}.self_attention" for family in ("bloom", "falcon", "falcon-alibi", "falcon-mq")},
    **{family: "bert.encoder.layer.{}.attention.self" for family in ("bert",)},
    **{family: "roberta.encoder.layer.{}.attention.self" for family in ("roberta", "xlm-roberta", "camembert")},
    **{family: "decoder.block.{}.layer.0.SelfAttention" for family in ("t5", "mt5", "umt5")},
    **{family: "model.decoder.layers.{}.self_attn" for family in ("bart", "mbart", "pegasus", "pegasus_x", "marian")},
    **{family: "model.decoder.layers.{}.self_attn" for family in ("m2m_100", "plbart", "opt")},
    **{family: "model.decoder.layers.{}.self_attn" for family in ("blenderbot", "blenderbot-small")},
    "falcon-new": "transformer.h.{}.self_attention",
    "electra": "electra.encoder.layer.{}.attention.self",
    "gpt_neox": "gpt_neox.layers.{}.attention",
    "persimmon": "model.layers.{}.self_attn",
    "gpt_neo": "transformer.h.{}.attn.attention",
    "mpt": "transformer.blocks.{}.attn",
    "biogpt": "biogpt.layers.{}.self_attn",
}

ROTARY, TABLE, SUBCLASS = positions.ShiftedRotary, positions.ShiftedTable, positions.ShiftedSubclass
COUNT = positions.ShiftedCount
MOVED = {
    **{family: ROTARY for family in EVERY},
    **{family: TABLE for family in ("gpt2", "gpt_bigcode", "gpt_neo", "bert", "electra")},
    **{family: TABLE for family in ("roberta", "xlm-roberta", "camembert")},
    **{family: SUBCLASS for family in ("opt", "bart", "mbart", "pegasus", "marian", "plbart", "biogpt")},
    **{family: SUBCLASS for family in ("blenderbot", "blenderbot-small")},
    **{family: COUNT for family in ("m2m_100", "pegasus_x")},
    # ALiBi counts back from the prefix, T5's bias has columns for it, GPT-J and CodeGen rotate in their attention.
    # (Falcon with ALiBi has a rotation all the same, which nothing asks.)
    **{family: None for family in ("bloom", "mpt", "t5", "mt5", "umt5", "gptj", "codegen")},
}


@pytest.mark.parametrize("family", EVERY)
def test_the_sites_of_a_family(family):
    model = tiny(family, task_of(family))
    before = snapshot(model)
    sites = find_sites(model)
    assert [path for path, _, _ in sites.attention] == [SELF[family].format(layer) for layer in (0, 1)]
    assert all(model.get_submodule(path) is module for path, module, _ in (*sites.attention, *sites.positions))
    assert {mixin for _, _, mixin in sites.positions} == {MOVED[family]} - {None}
    assert differences(before, snapshot(model)) == []
    # The same is found again in a patched model, whose classes have other names.
    again = find_sites(prefixed(family, base=model))
    for found, expected in ((again.attention, sites.attention), (again.positions, sites.positions)):
        assert [(path, mixin) for path, _, mixin in found] == [(path, mixin) for path, _, mixin in expected]


@pytest.mark.parametrize("family", ["llama", "t5", "bart", "bloom", "gemma3", "bert"])
def test_only_what_a_prefix_needs_is_switched(family):
    model = prefixed(family)
    named = {path: m.config._attn_implementation for path, m in model.named_modules() if hasattr(m, "config")}
    assert named[SELF[family].format(0)] == NAME if SELF[family].format(0) in named else NAME in named.values()
    if family == "t5":  # the two stacks have a configuration each
        assert named["encoder"] == "sdpa" and named["decoder"] == NAME
    carriers = [path for path, m in model.named_modules() if type(m).__name__.startswith(("Adapted", "Relative"))]
    assert set(carriers) >= {SELF[family].format(0), SELF[family].format(1)}
    assert not any("encoder." in path or "cross" in path for path in carriers if family in ("t5", "bart"))


def build(model_type: str, auto: str, **settings):
    import transformers

    common = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return getattr(transformers, auto).from_config(
        transformers.AutoConfig.for_model(model_type, **{**common, **settings})
    )


BART = {"vocab_size": 97, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4} | {
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64
}  # fmt: skip
UNSERVED = {
    "deberta": ("AutoModelForSequenceClassification", {"vocab_size": 97}, "SEQ_CLS", "DisentangledSelfAttention"),
    "xlnet": (
        "AutoModelForSequenceClassification",
        {"vocab_size": 97, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
        "SEQ_CLS",
        "XLNetRelativeAttention",
    ),
    "mvp": ("AutoModelForSeq2SeqLM", BART, "SEQ_2_SEQ_LM", "MvpAttention"),
    "xglm": (
        "AutoModelForCausalLM",
        {"vocab_size": 97, "d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48},
        "CAUSAL_LM",
        "XGLMAttention",
    ),
}


def refused(model, task: str, *words: str, **settings) -> None:
    before = snapshot(model)
    config = fastpeft.PrefixTuningConfig(task_type=task, num_virtual_tokens=5, **settings)
    with pytest.raises(fastpeft.FastpeftError) as caught:
        fastpeft.patch(model, config)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert differences(before, snapshot(model)) == []


@pytest.mark.parametrize("model_type", UNSERVED)
def test_attention_that_is_out_of_reach_is_refused_by_name(model_type):
    auto, settings, task, attention = UNSERVED[model_type]
    model = build(model_type, auto, **settings)
    refused(model, task, type(model).__name__, "cannot carry a prefix", attention)


def test_layers_that_are_one_module_are_refused_unless_their_stack_numbers_them(monkeypatch):
    monkeypatch.delitem(sites.OWN_FORWARD, "albert.AlbertTransformer")
    model = build("albert", "AutoModelForSequenceClassification", vocab_size=97, embedding_size=16)
    refused(model, "SEQ_CLS", "AlbertForSequenceClassification has 1 attention modules for 2 layers", "LoRA")


# Which peft refuses, and whose attention asks the interface.
ENCODERS = {
    "distilbert": {"vocab_size": 97, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "dropout": 0.0}
    | {"attention_dropout": 0.0, "seq_classif_dropout": 0.0},
    "modernbert": {"vocab_size": 97, "global_attn_every_n_layers": 2, "local_attention": 8, "pad_token_id": 0}
    | {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
    "vit": {"image_size": 8, "patch_size": 4},
}


@pytest.mark.parametrize("model_type", ENCODERS)
def test_encoders_that_peft_refuses_are_served(model_type):
    auto = "AutoModelForImageClassification" if model_type == "vit" else "AutoModelForSequenceClassification"
    model = build(model_type, auto, **ENCODERS[model_type]).eval()
    inputs = batch("SEQ_CLS")
    inputs.pop("labels")
    if model_type == "vit":
        inputs = {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))}
    before = snapshot(model)
    with torch.no_grad():
        expected = model(**inputs).logits
    fastpeft.patch(model, fastpeft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=5))
    found = model(**inputs).logits
    assert not torch.allclose(found, expected)
    found.square().sum().backward()  # modernbert's window hides the first virtual token from one layer
    assert model.prompt_encoder["default"].embedding.weight.grad.view(5, 4, -1).any(2).any(0).all()
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(**inputs).logits, expected)
    fastpeft.unpatch(model)
    assert differences(before, snapshot(model)) == []


def test_models_that_are_none_of_transformers_are_refused():
    config = "a transformers model's config"
    refused(torch.nn.Sequential(torch.nn.Linear(4, 4)), "CAUSAL_LM", config)
    encoder = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(8, 2, batch_first=True), 1)
    refused(encoder, "CAUSAL_LM", config)
    with pytest.raises(fastpeft.TargetError, match="Sequential is not a transformers model: it has no config"):
        find_sites(torch.nn.Sequential())


def test_a_table_of_positions_with_another_adapter_is_refused():
    model = fastpeft.patch(tiny("gpt2"), fastpeft.LoraConfig(target_modules=["wpe", "c_attn"], r=2))
    before = snapshot(model)
    with pytest.raises(fastpeft.TargetError, match="transformer.wpe carries another adapter already"):
        model.add_adapter("p", fastpeft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    assert differences(before, snapshot(model)) == []


def test_compressed_keys_are_refused():
    sizes = {"vocab_size": 97, "num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4}
    sizes |= {"qk_nope_head_dim": 4, "v_head_dim": 8, "first_k_dense_replace": 2, "n_routed_experts": 2}
    sizes |= {"num_experts_per_tok": 1, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 8}
    model = build("deepseek_v3", "AutoModelForCausalLM", **sizes)
    refused(model, "CAUSAL_LM", "deepseek_v3", "kv_lora_rank")


def test_a_refused_model_can_still_take_another_adapter():
    model = build("xglm", "AutoModelForCausalLM", **UNSERVED["xglm"][1])
    refused(model, "CAUSAL_LM", "XGLM")
    fastpeft.patch(model, fastpeft.LoraConfig(target_modules=["q_proj"]))
    fastpeft.unpatch(model)


def test_more_layers_than_the_configuration_says():
    model = tiny()
    model.config.num_hidden_layers = 1
    settings = {k: v for k, v in settings_of("llama").items() if k not in ("task_type", "num_virtual_tokens")}
    refused(model, "CAUSAL_LM", "num_layers=1", "2 layers that attend", **settings)
