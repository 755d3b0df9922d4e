"""Tiny transformers models, built once per process and copied, and what patching may not leave changed in one."""

import functools
import types

import torch

from tests.model_copies import Original

VOCABULARY = 97
HIDDEN = 32

_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ENCODER = {key: value for key, value in _DECODER.items() if key != "num_key_value_heads"}

_ALBERT = {**_ENCODER, "embedding_size": 16, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} | {
    "classifier_dropout_prob": 0.0
}
_FALCON = {"multi_query": False, "alibi": False, "new_decoder_architecture": False}

# Family -> model type of transformers and what its configuration needs beside or in place of `_DECODER`.
FAMILIES: dict[str, tuple[str, dict]] = {
    "llama": ("llama", _DECODER),
    "llama-tied": ("llama", {**_DECODER, "tie_word_embeddings": True}),
    "mistral": ("mistral", {**_DECODER, "sliding_window": 4}),
    "qwen2": ("qwen2", _DECODER),
    "qwen3": ("qwen3", {**_DECODER, "head_dim": 16}),
    "gemma2": ("gemma2", {**_DECODER, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4}),
    "gemma3": ("gemma3_text", {**_DECODER, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4}),
    "gpt2": (
        "gpt2",
        {"vocab_size": VOCABULARY, "n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "n_positions": 64, "pad_token_id": 0}
        | {"bos_token_id": 1, "eos_token_id": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    ),
    "bloom": (
        "bloom",
        {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "n_layer": 2, "n_head": 4, "pad_token_id": 0}
        | {"bos_token_id": 1, "eos_token_id": 2, "hidden_dropout": 0.0, "attention_dropout": 0.0},
    ),
    "opt": ("opt", {**_ENCODER, "ffn_dim": 48, "word_embed_proj_dim": HIDDEN, "dropout": 0.0}),
    "gpt_neox": ("gpt_neox", _ENCODER),
    "phi": ("phi", _DECODER),
    "phi3": ("phi3", _DECODER),
    "mixtral": ("mixtral", {**_DECODER, "num_local_experts": 3, "num_experts_per_tok": 2}),
    "t5": (
        "t5",
        {"vocab_size": VOCABULARY, "d_model": HIDDEN, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
        | {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0, "dropout_rate": 0.0},
    ),
    "bart": (
        "bart",
        {"vocab_size": VOCABULARY, "d_model": HIDDEN, "encoder_layers": 2, "decoder_layers": 2, "pad_token_id": 0}
        | {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
        | {"max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
        | {"dropout": 0.0, "forced_eos_token_id": None},
    ),
    "bert": ("bert", {**_ENCODER, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}),
    "roberta": (
        "roberta",
        {**_ENCODER, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0},
    ),
}

DEPTHS = {"llama": "num_hidden_layers", "bert": "num_hidden_layers", "gpt2": "n_layer", "t5": "num_layers"}

# More families, for prefix tuning alone: every way in which transformers' attention is plugged together.
MORE_FAMILIES: dict[str, tuple[str, dict]] = {
    **{name: (name, _DECODER) for name in ("cohere", "glm", "granite", "nemotron", "olmo", "olmo2")},
    **{name: (name, _DECODER) for name in ("seed_oss", "smollm3", "stablelm")},
    "persimmon": ("persimmon", _ENCODER),
    "gemma": ("gemma", {**_DECODER, "head_dim": 8}),
    "cohere2": ("cohere2", {**_DECODER, "sliding_window": 4}),
    "starcoder2": ("starcoder2", {**_DECODER, "sliding_window": 4, "residual_dropout": 0.0, "embedding_dropout": 0.0}),
    "gpt_oss": (
        "gpt_oss",
        {**_DECODER, "head_dim": 8, "num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 4},
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {**_DECODER, "head_dim": 8, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    ),
    "llama-bias": ("llama", {**_DECODER, "attention_bias": True}),
    "mistral-wide": ("mistral", {**_DECODER, "head_dim": 16}),  # heads times their width is not the hidden size
    "gpt_bigcode": ("gpt_bigcode", {**FAMILIES["gpt2"][1], "multi_query": True}),
    "gptj": ("gptj", {**FAMILIES["gpt2"][1], "rotary_dim": 4}),
    "codegen": ("codegen", {**FAMILIES["gpt2"][1], "rotary_dim": 4, "n_ctx": 64}),
    "gpt_neo": (
        "gpt_neo",
        {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_layers": 2, "num_heads": 4, "intermediate_size": 48}
        | {"attention_types": [[["global", "local"], 1]], "window_size": 4, "max_position_embeddings": 64}
        | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    ),
    "falcon": ("falcon", {**_ENCODER, **_FALCON}),
    "falcon-alibi": ("falcon", {**_ENCODER, **_FALCON, "alibi": True}),
    "falcon-mq": ("falcon", {**_ENCODER, **_FALCON, "multi_query": True}),
    "falcon-new": (
        "falcon",
        {**_ENCODER, **_FALCON, "multi_query": True, "num_kv_heads": 2, "new_decoder_architecture": True},
    ),
    "mpt": (
        "mpt",
        {"vocab_size": VOCABULARY, "d_model": HIDDEN, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}
        | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "xglm": (
        "xglm",
        {"vocab_size": VOCABULARY, "d_model": HIDDEN, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48}
        | {"max_position_embeddings": 64, "dropout": 0.0, "attention_dropout": 0.0}
        | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2},
    ),
    "biogpt": (
        "biogpt",
        {**_ENCODER, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "layerdrop": 0.0},
    ),
    **{name: (name, FAMILIES["t5"][1]) for name in ("mt5", "umt5")},
    **{name: (name, FAMILIES["bart"][1]) for name in ("mbart", "pegasus", "pegasus_x", "marian", "plbart")},
    **{name: (name, FAMILIES["bart"][1]) for name in ("blenderbot", "blenderbot-small")},
    "m2m_100": (
        "m2m_100",
        {**FAMILIES["bart"][1], "attention_dropout": 0.0, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0},
    ),
    "electra": ("electra", {**FAMILIES["bert"][1], "embedding_size": HIDDEN}),
    "xlm-roberta": ("xlm-roberta", FAMILIES["roberta"][1]),
    "camembert": ("camembert", FAMILIES["roberta"][1]),
}

# Families that HF peft's virtual tokens do not reach, or whose inputs are no text.
OTHER_FAMILIES: dict[str, tuple[str, dict]] = {
    "distilbert": (
        "distilbert",
        {"vocab_size": VOCABULARY, "dim": HIDDEN, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "pad_token_id": 0}
        | {"max_position_embeddings": 64, "dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}
        | {"qa_dropout": 0.0},
    ),
    "albert": ("albert", {**_ALBERT, "num_hidden_layers": 4, "num_hidden_groups": 2, "inner_group_num": 1}),
    "albert-inner": ("albert", {**_ALBERT, "num_hidden_layers": 4, "num_hidden_groups": 2, "inner_group_num": 2}),
    "albert-one": ("albert", {**_ALBERT, "num_hidden_layers": 3, "num_hidden_groups": 1, "inner_group_num": 1}),
    "electra-small": ("electra", {**FAMILIES["bert"][1], "embedding_size": 16}),
    "modernbert": (
        "modernbert",
        {**_ENCODER, "global_attn_every_n_layers": 2, "local_attention": 8, "cls_token_id": 1, "sep_token_id": 2},
    ),
    "deberta-v2": (
        "deberta-v2",
        {**_ENCODER, "relative_attention": True, "position_buckets": 8, "pos_att_type": ["c2p", "p2c"]}
        | {"share_att_key": True, "norm_rel_ebd": "layer_norm", "position_biased_input": False, "type_vocab_size": 0}
        | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pooler_hidden_size": HIDDEN},
    ),
    "gpt_bigcode-heads": ("gpt_bigcode", {**FAMILIES["gpt2"][1], "multi_query": False}),
    "t5-wide": ("t5", {**FAMILIES["t5"][1], "d_kv": 16}),  # as mT5-small has it: heads times their width is another
    "whisper": (
        "whisper",
        {**FAMILIES["bart"][1], "num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 64}
        | {"decoder_start_token_id": 1, "classifier_proj_size": 16},
    ),
    "vit": (
        "vit",
        {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
        | {"image_size": 8, "patch_size": 4, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    ),
}

_AUTO = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
_AUTO_OF = {  # of a model type, where its inputs are no text
    ("whisper", "SEQ_2_SEQ_LM"): "AutoModelForSpeechSeq2Seq",
    ("whisper", "SEQ_CLS"): "AutoModelForAudioClassification",
    ("vit", "SEQ_CLS"): "AutoModelForImageClassification",
}


def _recipe(family: str, task: str, layers: int | None = None):
    """The configuration, and the class of transformers' that makes a model of it, if it has one for the task."""
    import transformers

    model_type, settings = (FAMILIES | MORE_FAMILIES | OTHER_FAMILIES)[family]
    depth = {DEPTHS[family]: layers} if layers else {}
    config = transformers.AutoConfig.for_model(model_type, **{**settings, **depth})
    config.num_labels = 3 if task in ("SEQ_CLS", "TOKEN_CLS") else 2
    return config, getattr(transformers, _AUTO_OF.get((model_type, task), _AUTO[task]))


def has_class(family: str, task: str) -> bool:
    """Whether transformers has a class for the task of this family, by the table that `from_config` looks it up in."""
    config, auto = _recipe(family, task)
    return type(config) in auto._model_mapping


@functools.cache
def _built(family: str, task: str, layers: int | None = None) -> torch.nn.Module:
    config, auto = _recipe(family, task, layers)
    model_type = config.model_type
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    model = auto.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                # At the usual scale of initialisation the logits of all inputs are nearly equal. T5's is large, as its
                # attention is not scaled.
                parameter.mul_(1 if model_type.endswith("t5") else 5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)  # zero biases would hide a lost one
    torch.random.set_rng_state(state)
    return model.eval()


@functools.cache
def _original(family: str, task: str, layers: int | None = None) -> Original:
    return Original(_built(family, task, layers))


def tiny(
    family: str = "llama", task: str = "CAUSAL_LM", dtype: torch.dtype = torch.float32, *, layers: int | None = None
) -> torch.nn.Module:
    """A model of its own, in eval mode, with the same weights at every call. `layers`: in place of two."""
    model = _original(family, task, layers).copy()
    return model if dtype is torch.float32 else model.to(dtype)


def config_of(family: str, task: str):
    """The configuration of `tiny`, to be read."""
    return _built(family, task, None).config


def batch(task: str = "CAUSAL_LM", rows: int = 2, length: int = 9) -> dict[str, torch.Tensor]:
    """Inputs with labels; the last row ends in two padding tokens."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, -2:] = 0
    ids = ids.masked_fill(mask == 0, 0)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if task == "CAUSAL_LM":
        return {**inputs, "labels": ids.masked_fill(mask == 0, -100)}
    if task == "SEQ_2_SEQ_LM":
        return {**inputs, "labels": torch.randint(3, VOCABULARY, (rows, length - 3), generator=generator)}
    if task == "QUESTION_ANS":
        return {**inputs, "start_positions": torch.tensor([1] * rows), "end_positions": torch.tensor([4] * rows)}
    shape = (rows,) if task == "SEQ_CLS" else (rows, length)
    return {**inputs, "labels": torch.randint(0, 3, shape, generator=generator)}


def batch_for(family: str, task: str) -> dict[str, torch.Tensor]:
    """As `batch`, in what the family reads: sounds, pictures, or sentences that end with their token for the end, of
    which encoder-decoder models make a class."""
    inputs = batch(task)
    generator = torch.Generator().manual_seed(6)
    if family == "vit":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator), "labels": inputs["labels"]}
    if family == "whisper":
        return {"input_features": torch.randn(2, 8, 24, generator=generator), "labels": inputs["labels"]}
    model_type, settings = (FAMILIES | MORE_FAMILIES | OTHER_FAMILIES)[family]
    if task == "SEQ_CLS" and "decoder_start_token_id" in settings:
        last = inputs["attention_mask"].sum(1, keepdim=True) - 1
        inputs["input_ids"] = inputs["input_ids"].scatter(1, last, settings["eos_token_id"])
    return inputs


def longer(inputs: dict[str, torch.Tensor], more: int = 3) -> dict[str, torch.Tensor]:
    """A batch of text with more padding behind it, for which there are no labels."""
    text = inputs["attention_mask"].shape
    fills = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        key: torch.nn.functional.pad(value, (0, more), value=fills[key]) if value.shape == text else value
        for key, value in inputs.items()
    }


def snapshot(model: torch.nn.Module) -> dict:
    """Everything about a model that patching and unpatching might leave changed: objects by identity, values bit by
    bit, flags, hooks and instance attributes."""
    modules = {}
    for name, module in model.named_modules(remove_duplicate=False):
        attributes = {
            key: _content(value)
            for key, value in vars(module).items()
            if key not in ("_parameters", "_buffers", "_modules")
        }
        modules[name] = (id(module), type(module), list(module._modules), attributes)
    tensors = {}
    for name, tensor in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        tensors[name] = (
            id(tensor),
            type(tensor),
            tensor.dtype,
            tensor.requires_grad,
            tensor.data_ptr(),
            None if tensor.is_meta else tensor.detach().clone().contiguous().view(-1).view(torch.uint8),
        )
    return {"modules": modules, "tensors": tensors}


def _content(value):
    """A value in a form that compares: containers by content, everything else by identity or equality."""
    if isinstance(value, dict):
        return {key: _content(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_content(item) for item in value]
    if isinstance(value, (bool, int, float, str, type(None))):
        return value
    if isinstance(value, types.MethodType):
        return id(value.__func__), id(value.__self__)
    return id(value)


def differences(before: dict, after: dict) -> list[str]:
    """What differs between two snapshots, in words; empty if nothing does."""
    found = []
    for kind in ("modules", "tensors"):
        found += [f"{kind}: {name} is gone" for name in before[kind].keys() - after[kind].keys()]
        found += [f"{kind}: {name} is new" for name in after[kind].keys() - before[kind].keys()]
    for name in before["modules"].keys() & after["modules"].keys():
        for what, old, new in zip(
            ("object", "class", "children", "attributes"), before["modules"][name], after["modules"][name], strict=True
        ):
            if old != new:
                if what == "attributes":
                    old = {k: v for k, v in old.items() if new.get(k, "absent") != v} or f"new: {set(new) - set(old)}"
                found.append(f"module {name!r}: its {what} differs: {old!r}")
    for name in before["tensors"].keys() & after["tensors"].keys():
        old, new = before["tensors"][name], after["tensors"][name]
        for what, x, y in zip(("object", "class", "dtype", "requires_grad", "storage"), old[:5], new[:5], strict=True):
            if x != y:
                found.append(f"tensor {name}: its {what} differs: {x} became {y}")
        if old[5] is not None and (new[5] is None or not torch.equal(old[5], new[5])):
            found.append(f"tensor {name}: its values differ")
    return sorted(found)
