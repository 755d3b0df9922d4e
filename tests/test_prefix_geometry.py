"""The sizes of virtual tokens: those that peft writes into its configuration, and the model's own where peft fails."""

import copy
import json

import peft
import pytest
import torch
import transformers
from peft.utils.other import _prepare_prompt_learning_config
from transformers import AutoConfig

import fastpeft
from fastpeft.configs import AdaptionPromptConfig, PrefixTuningConfig, as_config
from fastpeft.errors import ConfigError, TargetError
from fastpeft.prefix_geometry import fill_prompt_dims, geometry
from fastpeft.targets import saved_modules
from tests.models import FAMILIES, tiny
from tests.peft_pair import quietly

S2S = "SEQ_2_SEQ_LM"
SIZES = ("token_dim", "num_attention_heads", "num_layers", "num_transformer_submodules", "encoder_hidden_size")


def config_of(family, **changes):
    """The transformers configuration of a tiny model, with changes."""
    model_type, settings = FAMILIES[family]
    return AutoConfig.for_model(model_type, **{**settings, **changes})


def build(family, auto="AutoModelForCausalLM", **changes):
    torch.manual_seed(0)
    return getattr(transformers, auto).from_config(config_of(family, **changes)).eval()


def sizes(config):
    return {name: getattr(config, name) for name in SIZES}


def prefix(task="CAUSAL_LM", **settings):
    return PrefixTuningConfig(task_type=task, num_virtual_tokens=3, **settings)


def filled_by_peft(model, task="CAUSAL_LM", **settings):
    config = peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=3, **copy.deepcopy(settings))
    return quietly(peft.get_peft_model, model, config), config


def runs_in_peft(model, task, **settings):
    """Whether peft computes a loss and gives the prefix a gradient in every layer it has one for."""
    wrapped, config = filled_by_peft(model, task, **settings)
    ids = torch.arange(3, 12)[None]
    quietly(wrapped, input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
    grad = wrapped.prompt_encoder["default"].embedding.weight.grad
    return grad.view(3, 2 * config.num_layers, -1).abs().sum((0, 2)) > 0


def filled_alike(model, task, **settings):
    ours = fill_prompt_dims(model, prefix(task, **settings))
    _, theirs = filled_by_peft(model, task, **settings)
    assert sizes(ours) == sizes(theirs)
    return ours


TESTED = [
    *(
        (family, "CAUSAL_LM", {})
        for family in FAMILIES
        if family not in ("t5", "bart", "bert", "roberta", "llama-tied")
    ),
    ("llama", "CAUSAL_LM", {"num_key_value_heads": 4}),
    ("llama", "CAUSAL_LM", {"head_dim": 16}),
    ("mistral", "CAUSAL_LM", {"num_key_value_heads": 1}),
    ("qwen3", "SEQ_CLS", {}),
    ("gpt2", "TOKEN_CLS", {}),
    ("opt", "CAUSAL_LM", {"word_embed_proj_dim": 16}),
    ("t5", S2S, {}),
    ("t5", S2S, {"num_decoder_layers": 1}),
    ("bart", S2S, {}),
    ("bart", S2S, {"decoder_layers": 1}),
    ("bert", "SEQ_CLS", {}),
    ("bert", "QUESTION_ANS", {}),
    ("bert", "TOKEN_CLS", {}),
    ("bert", "FEATURE_EXTRACTION", {}),
    ("roberta", "SEQ_CLS", {"num_hidden_layers": 3}),
]
AUTO = {
    **{"CAUSAL_LM": "AutoModelForCausalLM", S2S: "AutoModelForSeq2SeqLM", "FEATURE_EXTRACTION": "AutoModel"},
    **{"SEQ_CLS": "AutoModelForSequenceClassification", "TOKEN_CLS": "AutoModelForTokenClassification"},
    **{"QUESTION_ANS": "AutoModelForQuestionAnswering"},
}


@pytest.mark.parametrize(("family", "task", "changes"), TESTED)
def test_the_sizes_are_those_that_peft_writes_back(family, task, changes):
    model = build(family, AUTO[task], **changes)
    ours = filled_alike(model, task)
    # The model, its configuration and that as a dict say the same, and filling in again changes nothing.
    for source in (model, model.config, model.config.to_dict(), json.loads(model.config.to_json_string())):
        assert fill_prompt_dims(source, prefix(task)) == fill_prompt_dims(source, ours) == ours
    assert fill_prompt_dims(model, peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=3)) == ours
    assert fill_prompt_dims(model, ours.to_file_dict()) == as_config(ours.to_file_dict())


OTHERS = {
    "gemma": {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16},
    "falcon": {"hidden_size": 32, "num_attention_heads": 4, "multi_query": False},
    "falcon-new": {"hidden_size": 32, "num_attention_heads": 4, "num_kv_heads": 2, "new_decoder_architecture": True},
    "gpt_bigcode": {"n_embd": 32, "n_head": 4, "n_layer": 2},
    "gptj": {"n_embd": 32, "n_head": 4, "n_layer": 2, "rotary_dim": 4},
    "codegen": {"n_embd": 32, "n_head": 4, "n_layer": 2, "rotary_dim": 4},
    "gpt_neo": {"hidden_size": 32, "num_heads": 4, "num_layers": 2, "attention_types": [[["global", "local"], 1]]},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_decoders_have_the_sizes_of_peft_too_and_these_run(kind):
    settings = {"vocab_size": 97, "num_hidden_layers": 2, "intermediate_size": 48, "bos_token_id": 1, "eos_token_id": 2}
    if "n_layer" in OTHERS[kind] or "num_layers" in OTHERS[kind]:
        del settings["num_hidden_layers"]
    config = AutoConfig.for_model(kind.partition("-")[0], pad_token_id=0, **settings, **OTHERS[kind])
    model = transformers.AutoModelForCausalLM.from_config(config)
    filled_alike(model, "CAUSAL_LM")
    assert runs_in_peft(model, "CAUSAL_LM").all()


# Only configurations, with their defaults; no model is built.
TYPES = [
    *("arcee", "bart", "bert", "biogpt", "blenderbot-small", "bloom", "camembert", "codegen", "cohere", "cohere2"),
    *("electra", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3", "gemma3_text", "glm", "glm4", "gpt2"),
    *("gpt_bigcode", "gpt_neo", "gpt_neox", "gpt_oss", "gptj", "granite", "granitemoe", "helium", "jamba", "llama"),
    *("llama4", "llava", "longt5", "marian", "mbart", "mistral", "mistral3", "mixtral", "mpnet", "olmo", "olmo2"),
    *("olmoe", "opt", "pegasus", "persimmon", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen2_vl", "qwen3"),
    *("qwen3_moe", "qwen3_next", "roberta", "seed_oss", "smollm3", "stablelm", "starcoder2", "t5", "whisper"),
    *("xlm-roberta", "xlnet"),
]


@pytest.mark.parametrize("kind", TYPES)
def test_whole_families_have_the_sizes_of_peft(kind):
    config = AutoConfig.for_model(kind)
    task = S2S if config.to_dict().get("is_encoder_decoder") else "CAUSAL_LM"
    theirs = peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=3)
    theirs = _prepare_prompt_learning_config(theirs, config)
    theirs.num_transformer_submodules = 2 if task == S2S else 1  # which peft sets later
    assert sizes(fill_prompt_dims(config, prefix(task))) == sizes(theirs)


PER_LAYER = [
    {"global_head_dim": 16},
    {"global_head_dim": 16, "num_global_key_value_heads": 1},
    {"per_layer_config": {"0": {"head_dim": 16}, "1": {"num_key_value_heads": 1}}},
    {"per_layer_config": {"0": {"head_dim": 16, "num_key_value_heads": 1}, "1": {"head_dim": 4}}},
    {"per_layer_config": {"0": {}}},
    {"per_layer_config": {}},
]


@pytest.mark.parametrize("changes", PER_LAYER)
@pytest.mark.parametrize("head_dim", [{}, {"head_dim": 8}])
@pytest.mark.parametrize("nested", [False, True])
def test_where_layers_differ_the_widest_keys_count(changes, head_dim, nested):
    values = {"model_type": "gemma4_text", "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    values |= {"num_hidden_layers": 2, **head_dim, **changes}
    values = {"model_type": "gemma4", "text_config": values} if nested else values
    theirs = _prepare_prompt_learning_config(
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), values
    )
    theirs.num_transformer_submodules = 1
    assert sizes(fill_prompt_dims(values, prefix())) == sizes(theirs)


# Family, its changes, what peft then infers wrongly and fails with, and what we fill in.
CORNERS = [
    ("t5", {"d_kv": 16}, {"token_dim": 64, "num_attention_heads": 4, "num_layers": 2}),
    ("t5", {"d_kv": 4}, {"token_dim": 16, "num_attention_heads": 4, "num_layers": 2}),
    ("t5", {"num_decoder_layers": 3}, {"token_dim": 32, "num_attention_heads": 4, "num_layers": 3}),
    ("bart", {"decoder_layers": 3}, {"token_dim": 32, "num_attention_heads": 4, "num_layers": 3}),
    ("bart", {"decoder_attention_heads": 2}, {"token_dim": 32, "num_attention_heads": 2, "num_layers": 2}),
]


@pytest.mark.parametrize(("family", "changes", "meant"), CORNERS)
def test_where_peft_fails_the_model_is_right_and_its_sizes_make_peft_right(family, changes, meant):
    model = build(family, "AutoModelForSeq2SeqLM", **changes)
    ours = fill_prompt_dims(model, prefix(S2S))
    assert {name: getattr(ours, name) for name in meant} == meant
    with pytest.raises((RuntimeError, IndexError)):
        runs_in_peft(copy.deepcopy(model), S2S)
    assert runs_in_peft(copy.deepcopy(model), S2S, **meant).any()
    # The configuration as saved is one that peft reads and leaves as it is.
    theirs = peft.PrefixTuningConfig(**ours.to_file_dict())
    quietly(peft.get_peft_model, model, theirs)
    assert sizes(theirs) == sizes(ours)


def test_falcon_with_one_key_head():
    settings = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model("falcon", multi_query=True, new_decoder_architecture=False, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config)
    ours = fill_prompt_dims(model, prefix())
    assert (ours.token_dim, ours.num_attention_heads) == (8, 1)
    with pytest.raises(RuntimeError):
        runs_in_peft(copy.deepcopy(model), "CAUSAL_LM")
    assert runs_in_peft(model, "CAUSAL_LM", token_dim=8, num_attention_heads=1).all()


def test_families_whose_names_peft_does_not_know():
    config = AutoConfig.for_model("mpt", d_model=32, n_heads=4, n_layers=2)
    ours = fill_prompt_dims(config, prefix())
    assert (ours.token_dim, ours.num_attention_heads, ours.num_layers) == (32, 4, 2)
    ours = fill_prompt_dims(AutoConfig.for_model("xglm", d_model=32, attention_heads=4, num_layers=2), prefix())
    assert (ours.token_dim, ours.num_attention_heads, ours.num_layers) == (32, 4, 2)
    decoder = {"model_type": "gemma2", "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    both = {"model_type": "t5gemma", "is_encoder_decoder": True, "encoder": {"hidden_size": 64}}
    ours = fill_prompt_dims({**both, "decoder": {**decoder, "num_hidden_layers": 5}}, prefix(S2S))
    assert (ours.token_dim, ours.num_attention_heads, ours.num_layers) == (16, 2, 5)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_one_submodule_is_peft_s_own_way_to_a_table_without_dead_blocks(family):
    model = tiny(family, S2S)
    ours = filled_alike(model, S2S, num_transformer_submodules=1)
    assert ours.num_transformer_submodules == 1 and fill_prompt_dims(model, ours) == ours
    model = tiny(family, S2S)
    assert runs_in_peft(copy.deepcopy(model), S2S).tolist() == [True, True, False, False]
    assert runs_in_peft(model, S2S, num_transformer_submodules=1).all()


AS_GOOD = [
    # peft replaces the width and heads of the queries by those of the keys.
    (
        "llama",
        "CAUSAL_LM",
        {},
        {"token_dim": 32, "num_attention_heads": 4},
        {"token_dim": 16, "num_attention_heads": 2},
    ),
    ("llama", "CAUSAL_LM", {}, {"num_attention_heads": 4}, {"token_dim": 16, "num_attention_heads": 2}),
    ("qwen3", "CAUSAL_LM", {}, {"token_dim": 32}, {"token_dim": 32, "num_attention_heads": 2}),
    (
        "gpt2",
        "CAUSAL_LM",
        {},
        {"token_dim": 32, "num_layers": 2, "num_attention_heads": 4},
        {"encoder_hidden_size": 32},
    ),
    ("llama", "CAUSAL_LM", {}, {"encoder_hidden_size": 5, "prefix_projection": True}, {"encoder_hidden_size": 5}),
    ("llama", "CAUSAL_LM", {"num_key_value_heads": 4, "head_dim": 16}, {"token_dim": 32}, {"token_dim": 64}),
    # A decoder that is shorter than its encoder may have a prefix of either length.
    ("t5", S2S, {"num_decoder_layers": 1}, {"num_layers": 1}, {"num_layers": 1}),
    ("bart", S2S, {"decoder_layers": 1}, {"num_layers": 2}, {"num_layers": 2}),
]


@pytest.mark.parametrize(("family", "task", "changes", "given", "settled"), AS_GOOD)
def test_a_size_that_peft_takes_or_replaces_is_taken_or_replaced(family, task, changes, given, settled):
    ours = filled_alike(build(family, AUTO[task], **changes), task, **given)
    assert settled.items() <= sizes(ours).items()


REFUSED = [
    ("llama", {"num_layers": 32}, "num_layers=32: made for another model: this llama has 2; leave it out"),
    ("llama", {"num_layers": 1}, "num_layers=1: made for another model: this llama has 2"),
    ("llama", {"token_dim": 64}, "token_dim=64: made for another model: this llama has 16"),
    ("llama", {"num_attention_heads": 8}, "num_attention_heads=8: made for another model: this llama has 2"),
    ("gpt2", {"token_dim": 16}, "token_dim=16: made for another model: this gpt2 has 32"),
    ("gpt2", {"num_attention_heads": 2}, "num_attention_heads=2: made for another model: this gpt2 has 4"),
    ("bert", {"task_type": S2S}, "task_type='SEQ_2_SEQ_LM': this bert has no encoder and decoder; 'CAUSAL_LM' may"),
    (
        "t5",
        {"task_type": "CAUSAL_LM"},
        "task_type='CAUSAL_LM': this t5 has an encoder and a decoder; set 'SEQ_2_SEQ_LM'",
    ),
    ("llama", {"task_type": None}, "task_type=None: virtual tokens need the task, as in peft; set it, for example to"),
    ("llama", {"num_transformer_submodules": 2}, "num_transformer_submodules=2: this llama is one stack; leave it out"),
    ("llama", {"cross_prefix": True}, "cross_prefix=True: this llama has no encoder and decoder; leave it out"),
    ("bert", {"encoder_prefix": True}, "encoder_prefix=True: this bert has no encoder and decoder"),
    ("gpt2", {"legacy_bloom_layout": True}, "legacy_bloom_layout=True: this is a gpt2, not a bloom; leave it out"),
]


@pytest.mark.parametrize(("family", "settings", "words"), REFUSED)
def test_a_configuration_for_another_model_is_refused_in_words(family, settings, words):
    config = prefix(
        **{"task": settings.get("task_type", "CAUSAL_LM")}, **{k: v for k, v in settings.items() if k != "task_type"}
    )
    with pytest.raises(ConfigError) as refusal:
        fill_prompt_dims(config_of(family), config)
    assert words in str(refusal.value)


def test_what_a_model_does_not_say_must_be_set():
    bare = {"model_type": "strange", "num_attention_heads": [4, 8], "hidden_size": 32}
    with pytest.raises(ConfigError, match="num_layers=None: the configuration of this strange does not say it; set it"):
        fill_prompt_dims(bare, prefix())
    with pytest.raises(ConfigError, match="num_attention_heads=None: the configuration of this strange"):
        fill_prompt_dims(bare, prefix(num_layers=2))
    ours = fill_prompt_dims(bare, prefix(num_layers=2, num_attention_heads=4))
    assert sizes(ours) == dict(zip(SIZES, (32, 4, 2, 1, 32), strict=True))
    for model in (torch.nn.Linear(2, 2), None, [1]):
        with pytest.raises(ConfigError, match="the sizes of virtual tokens come from a transformers model's config"):
            fill_prompt_dims(model, prefix())
    for hostile in ({"hidden_size": 2**200}, {"per_layer_config": 3}, {"text_config": "x"}, {"num_hidden_layers": -1}):
        with pytest.raises(ConfigError):
            fill_prompt_dims(hostile, prefix())
    with pytest.raises(ConfigError, match="peft_type=LORA: this method takes no sizes from the model"):
        fill_prompt_dims(bare, fastpeft.LoraConfig())


def test_keys_that_are_kept_compressed_are_refused():
    with pytest.raises(ConfigError, match="this deepseek_v3 keeps keys and values compressed together .kv_lora_rank."):
        fill_prompt_dims(AutoConfig.for_model("deepseek_v3"), prefix())


def test_options_of_our_own_are_kept_where_they_mean_something():
    config = prefix(S2S, encoder_prefix=True, cross_prefix=True, prefix_window="pin")
    assert fill_prompt_dims(config_of("t5"), config).side_values() == config.side_values()
    assert fill_prompt_dims(config_of("bloom"), prefix(legacy_bloom_layout=True)).legacy_bloom_layout
    assert config.token_dim is None and geometry(config_of("t5")).encoder_decoder


# Heads.

HEADS = [
    ("llama", "SEQ_CLS", None, ["score"]),
    ("llama", "TOKEN_CLS", None, ["score"]),
    ("llama", "QUESTION_ANS", None, ["qa_outputs"]),
    ("bert", "SEQ_CLS", None, ["classifier"]),
    ("roberta", "SEQ_CLS", None, ["classifier"]),
    ("bert", "QUESTION_ANS", ["qa_outputs"], ["qa_outputs"]),
    ("llama", "CAUSAL_LM", None, []),
    ("llama", "CAUSAL_LM", ["lm_head"], ["lm_head"]),
    ("gpt2", "SEQ_CLS", ["classifier", "score"], ["score"]),
]


@pytest.mark.parametrize(("family", "task", "given", "paths"), HEADS)
def test_heads_are_trained_as_in_peft(family, task, given, paths):
    ours = prefix(task, modules_to_save=given)
    model = tiny(family, task)
    assert list(saved_modules(model, ours)) == paths
    wrapped, theirs = filled_by_peft(model, task, modules_to_save=given)
    assert list(dict.fromkeys(theirs.modules_to_save or [])) == (ours.modules_to_save or [])
    copies = {
        name.partition(".modules_to_save")[0] for name, _ in wrapped.named_modules() if "modules_to_save.d" in name
    }
    assert copies == {f"base_model.{path}" for path in paths}


def test_heads_that_peft_leaves_untrained():
    ours = prefix("SEQ_CLS")
    assert saved_modules(tiny("bart", "SEQ_CLS"), ours) == ("classification_head",)
    adapter = AdaptionPromptConfig(task_type="TOKEN_CLS", adapter_len=2, adapter_layers=1)
    assert saved_modules(tiny("llama", "TOKEN_CLS"), adapter) == ("score",)
    assert adapter.side_values() == {"modules_to_save": ["classifier", "score"]}
    # A file of peft's has no head for LLaMA-Adapter.
    without = adapter.with_side_values({"modules_to_save": []})
    assert saved_modules(tiny("llama", "TOKEN_CLS"), without) == () and without.modules_to_save == []


def test_only_what_the_task_adds_may_match_nothing():
    with pytest.raises(TargetError, match="modules_to_save='scores' is not in the model; did you mean 'score'"):
        saved_modules(tiny("llama", "SEQ_CLS"), prefix("SEQ_CLS", modules_to_save=["scores"]))
