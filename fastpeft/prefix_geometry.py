"""The sizes that a configuration with virtual tokens takes from the model, as Hugging Face peft 0.21.2 does when it
wraps one: width, heads, layers.

Where peft's rule contradicts the model and its forward then fails, the sizes here are those of the model's attention:
T5 with num_heads * d_kv != d_model, decoders that are longer than their encoder or have other heads, Falcon's single
key head. As the file states them, peft then takes them from there and is right as well.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from fastpeft.configs import PeftType, PromptLearningConfig, TaskType, as_config, is_count, refuse
from fastpeft.errors import ConfigError

# What model families call these, in peft's order; it does not know those of MPT, XGLM and of decoders.
_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers")
_DECODER_LAYERS = ("num_decoder_layers", "decoder_layers")
_WIDTH = ("hidden_size", "n_embd", "d_model", "dim")
_HEADS = (
    *("decoder_attention_heads", "num_attention_heads", "n_head", "num_heads"),
    *("n_heads", "attention_heads", "encoder_attention_heads"),
)


@dataclass(frozen=True)
class Geometry:
    """What a model's configuration says of the attention that a prefix joins; None where it does not say.

    layers are those of the prefix: of the longer of encoder and decoder, as peft counts the encoder's and only the
    decoder has a prefix. kv_heads and head_dim are those of the keys, heads those of the queries.
    """

    model_type: str
    layers: int | None
    decoder_layers: int | None
    width: int | None
    heads: int | None
    kv_heads: int | None
    head_dim: int | None
    encoder_decoder: bool
    latent: bool  # keys and values are kept compressed together, not by head


def geometry(model: object) -> Geometry:
    """The geometry of a model, of its configuration, or of that configuration as a dict. Raises ConfigError."""
    config = getattr(model, "config", None) if isinstance(model, nn.Module) else model
    top = values = _as_dict(config)
    # Of a model for images and text the language model counts, of a pair of models the decoder.
    for name in ("text_config", "decoder"):
        if isinstance(top.get(name), Mapping):
            config, values = getattr(config, name, None), top[name]
            break
    heads, width = _first(values, _HEADS), _first(values, _WIDTH)
    head_dim = _first(values, ("head_dim", "d_kv")) or (width // heads if width and heads else None)
    kv_heads = _first(values, ("num_key_value_heads",))
    if kv_heads is not None:
        kv_heads, head_dim = _widest_layer(values, kv_heads, head_dim)
    elif values.get("multi_query") is True and not values.get("new_decoder_architecture"):
        kv_heads = 1
    layers = getattr(config, "num_hidden_layers", None)  # which need not be in the dict
    layers, decoder = layers if is_count(layers) else _first(values, _LAYERS), _first(values, _DECODER_LAYERS)
    if layers is not None:
        layers *= _first(values, ("inner_group_num",)) or 1  # ALBERT's layers may be groups of them
    model_type = str(values.get("model_type") or top.get("model_type") or "model of unknown type")
    longer = max((count for count in (layers, decoder) if count is not None), default=None)
    both = bool(top.get("is_encoder_decoder"))
    latent = _first(values, ("kv_lora_rank",)) is not None
    return Geometry(model_type, longer, decoder, width, heads, kv_heads or heads, head_dim, both, latent)


def fill_prompt_dims(model: object, config: object) -> PromptLearningConfig:
    """A copy of `config` with the sizes filled in that it leaves to the model (a model, its config, or that as a dict).

    A prefix is as wide as the model's keys; the width of the model and the heads of the queries may be given for these,
    as in peft. Raises ConfigError if a size, the task or an option does not fit the model.
    """
    config = as_config(config)
    if not isinstance(config, PromptLearningConfig):
        raise ConfigError(
            f"peft_type={config.peft_type.value}: this method takes no sizes from the model; leave it out"
        )
    found = geometry(model)
    _check_task(config, found)
    prefix = config.peft_type == PeftType.PREFIX_TUNING
    if prefix:
        _check_prefix(config, found)
    heads = found.kv_heads if prefix else found.heads
    width = found.kv_heads * found.head_dim if prefix and found.kv_heads and found.head_dim else found.width
    config.num_layers = _settled(config, "num_layers", found, found.layers, kept=found.decoder_layers)
    config.num_attention_heads = _settled(config, "num_attention_heads", found, heads, replaced=found.heads)
    config.token_dim = _settled(config, "token_dim", found, width, replaced=found.width)
    if config.num_transformer_submodules is None:
        config.num_transformer_submodules = 2 if config.task_type == TaskType.SEQ_2_SEQ_LM else 1
    if hasattr(config, "encoder_hidden_size") and config.encoder_hidden_size is None:
        config.encoder_hidden_size = config.token_dim
    config.validate()
    return config


def _settled(
    config: PromptLearningConfig,
    name: str,
    found: Geometry,
    value: int | None,
    kept: int | None = None,
    replaced: int | None = None,
) -> int:
    """The size `name`: the model's, in place of none, of itself and of `replaced`; `kept` is as good and stays."""
    given = getattr(config, name)
    if given is None and value is None:
        refuse(name, None, f"the configuration of this {found.model_type} does not say it; set it")
    if given is None or value is None or given == value:
        return value if given is None else given
    if given == kept:
        return given
    if given != replaced:
        refuse(name, given, f"made for another model: this {found.model_type} has {value}; leave it out")
    return value


def _check_task(config: PromptLearningConfig, found: Geometry) -> None:
    task = config.task_type
    if task is None:
        refuse("task_type", None, "virtual tokens need the task, as in peft; set it, for example to 'CAUSAL_LM'")
    if task == TaskType.SEQ_2_SEQ_LM and not found.encoder_decoder:
        refuse("task_type", task.value, f"this {found.model_type} has no encoder and decoder; 'CAUSAL_LM' may be meant")
    if task == TaskType.CAUSAL_LM and found.encoder_decoder:
        refuse("task_type", task.value, f"this {found.model_type} has an encoder and a decoder; set 'SEQ_2_SEQ_LM'")
    if config.num_transformer_submodules == 2 and not found.encoder_decoder:
        refuse("num_transformer_submodules", 2, f"this {found.model_type} is one stack; leave it out")


def _check_prefix(config: PromptLearningConfig, found: Geometry) -> None:
    if found.latent:
        raise ConfigError(
            f"prefix tuning: this {found.model_type} keeps keys and values compressed together (kv_lora_rank), where "
            "the keys of a prefix have no place; use LoRA or prompt tuning"
        )
    for name in ("encoder_prefix", "cross_prefix"):
        if getattr(config, name) and not found.encoder_decoder:
            refuse(name, True, f"this {found.model_type} has no encoder and decoder; leave it out")
    if config.legacy_bloom_layout and found.model_type != "bloom":
        refuse("legacy_bloom_layout", True, f"this is a {found.model_type}, not a bloom; leave it out")


def _as_dict(config: object) -> Mapping:
    values = config.to_dict() if callable(getattr(config, "to_dict", None)) else config
    if not isinstance(values, Mapping):
        raise ConfigError(
            f"the sizes of virtual tokens come from a transformers model's config; there is {type(config).__name__}"
        )
    return values


def _first(values: Mapping, names: tuple[str, ...]) -> int | None:
    return next((values[name] for name in names if is_count(values.get(name))), None)


def _widest_layer(values: Mapping, kv_heads: int, head_dim: int | None) -> tuple[int, int | None]:
    """Key heads and their width in the layers with the widest ones, where a model's layers differ, as in peft."""
    overall = _first(values, ("global_head_dim",))
    if overall is not None:
        return _first(values, ("num_global_key_value_heads",)) or kv_heads, overall
    layers = values.get("per_layer_config")
    widest = (kv_heads, head_dim)
    for layer in layers.values() if isinstance(layers, Mapping) else ():
        own = (_first(layer, ("num_key_value_heads",)) or kv_heads, _first(layer, ("head_dim",)) or head_dim)
        if own[1] and own[1] > (widest[1] or 0):
            widest = own
    return widest
