"""Facts about model families that LoRA and AdaLoRA need where the user says nothing: which modules they go to.

The tables are those of Hugging Face peft 0.21.2, so that a configuration without target_modules means the same in both.
"""

_FAMILIES: dict[tuple[str, ...], str] = {
    ("q_proj", "v_proj"): (
        "bart gemma gemma2 gemma3_text gpt_neo gptj llama llama4 mistral mixtral opt qwen2 qwen3 stablelm"
    ),
    ("query_key_value",): "bloom chatglm falcon gpt_neox RefinedWeb RefinedWebModel",
    ("query", "value"): "bert electra layoutlm roberta xlm-roberta",
    ("q", "v"): "mt5 t5",
    ("c_attn",): "gpt2 gpt_bigcode",
    ("qkv_proj",): "codegen",
    ("Wqkv",): "mpt",
    ("in_proj",): "deberta",
    ("query_proj", "value_proj"): "deberta-v2",
    ("c_proj", "c_attn"): "btlm",
    ("q_proj", "v_proj", "fc1", "fc2"): "phi",
    ("q", "v", "q_proj", "v_proj"): "blip-2",
    ("q_proj", "k_proj", "v_proj", "o_proj"): "nemotron_h",
    ("key", "value", "receptance", "output"): "rwkv",
    ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"): "rwkv7",
}

# Model type -> target_modules, as the user would have written them.
DEFAULT_TARGETS: dict[str, tuple[str, ...] | str] = {
    **{family: names for names, families in _FAMILIES.items() for family in families.split()},
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
}

# Families of which target_parameters without target_modules adapts the parameters and no modules, as in peft, although
# the table has them.
PARAMETERS_ALONE = frozenset(("mixtral",))

_ADALORA_FAMILIES: dict[tuple[str, ...], str] = {
    ("q_proj", "v_proj"): "gemma gemma2 gemma3_text gpt_neo gptj llama llama4 qwen2 qwen3",
    ("query_key_value",): "bloom gpt_neox",
    ("query", "value"): "bert",
    ("c_attn",): "gpt2 gpt_bigcode",
    ("in_proj",): "deberta",
    ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"): "bart opt",
    ("q", "k", "v", "o", "wi", "wo"): "t5",
    ("q", "k", "v", "o", "wi_0", "wi_1", "wo"): "mt5",
    ("query", "key", "value", "dense"): "roberta",
    ("query_proj", "key_proj", "value_proj", "dense"): "deberta-v2",
    ("q_proj", "k_proj", "v_proj", "o_proj"): "nemotron_h",
}

# The same for AdaLoRA, and what peft leaves out.
ADALORA_TARGETS: dict[str, tuple[str, ...] | str] = {
    **{family: names for names, families in _ADALORA_FAMILIES.items() for family in families.split()},
    **{family: DEFAULT_TARGETS[family] for family in ("gemma4", "mistral", "mixtral")},
    "phi3": ("qkv_proj",),
}

# Names that a linear layer inside an attention module has when it makes queries or values, alone or fused with others;
# the default for every family that the table does not know.
QUERY_VALUE_NAMES = frozenset(
    (
        *("q", "wq", "q_lin", "q_proj", "q_linear", "query", "query_proj", "to_q", "q_b_proj"),
        *("v", "wv", "v_lin", "v_proj", "v_linear", "value", "value_proj", "to_v", "kv_b_proj"),
        *("qkv", "Wqkv", "qkv_proj", "to_qkv", "attn_qkv", "query_key_value", "c_attn", "in_proj"),
    )
)

# State space models hand these weights to a fused kernel that does not call the module, so an adapter has no effect.
UNCALLED_FAMILIES = frozenset(("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"))
UNCALLED_NAMES = frozenset(("conv1d", "out_proj"))
