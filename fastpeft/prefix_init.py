"""A prefix that begins as something the model has read: the keys and values of a text, under HF peft's names.

Real keys stand in a cache exactly as virtual ones do, so that a prefix made of a whole text continues it as the base
model would, windows included.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.configs import PrefixTuningConfig
from fastpeft.errors import ConfigError, PatchError
from fastpeft.patching import state_of
from fastpeft.selection import override
from fastpeft.state import only_adapter
from fastpeft.tuners.prefix_injection import blocks_of


def prompt_embeddings_from_past_key_values(past_key_values: Any, *, num_virtual_tokens: int) -> Tensor:
    """The table (num_virtual_tokens, layers·2·heads·head_dim) of a cache of one sequence, block 2l the keys of layer l
    and 2l + 1 its values: a transformers Cache, or a (key, value) pair of (1, heads, tokens, head_dim) for each layer.

    Raises ConfigError if it is empty, of several sequences, too short, or its layers differ.
    """
    pairs = _pairs(past_key_values)
    shape = pairs[0][0].shape
    for number, pair in enumerate(pairs):
        for tensor in pair:
            if tensor.ndim != 4 or len(tensor) != 1:
                raise ConfigError(
                    f"past_key_values: layer {number} has shape {tuple(tensor.shape)}; (1, heads, tokens, head_dim) of "
                    "one sequence is needed"
                )
            if tensor.shape[2] < num_virtual_tokens:
                raise ConfigError(
                    f"past_key_values: layer {number} has {tensor.shape[2]} tokens, num_virtual_tokens is "
                    f"{num_virtual_tokens}; use a longer text or fewer virtual tokens"
                )
            if (tensor.shape[1], tensor.shape[3]) != (shape[1], shape[3]):
                raise ConfigError(
                    f"past_key_values: layer {number} has {tensor.shape[1]} heads of {tensor.shape[3]}, layer 0 "
                    f"{shape[1]} of {shape[3]}; a table has room for one kind"
                )
    blocks = [t[0, :, :num_virtual_tokens].transpose(0, 1).flatten(1) for pair in pairs for t in pair]
    return torch.cat(blocks, 1)


@torch.no_grad()
def initialize_kv_prefix_from_past_key_values(
    model: nn.Module, *, adapter_name: str | None = None, past_key_values: Any, num_virtual_tokens: int | None = None
) -> Tensor:
    """Make an adapter's prefix of the first tokens in a cache of one sequence; returns the table, as
    `prompt_embeddings_from_past_key_values`. `num_virtual_tokens` can only be the adapter's own.

    Raises PatchError or ConfigError: no prefix adapter of this name, one with a projection, or a cache that does not
    fit; the prefix is then as it was.
    """
    name, config, encoder = _prefix(model, adapter_name)
    wanted = config.num_virtual_tokens if num_virtual_tokens is None else num_virtual_tokens
    if wanted != config.num_virtual_tokens:
        raise ConfigError(
            f"num_virtual_tokens={wanted!r}: adapter {name!r} has {config.num_virtual_tokens}; leave it out"
        )
    table = prompt_embeddings_from_past_key_values(past_key_values, num_virtual_tokens=wanted)
    layers = table.shape[1] // (2 * encoder.width)
    if table.shape[1] % (2 * encoder.width) or layers > config.num_layers:
        raise ConfigError(
            f"past_key_values: {table.shape[1]} numbers a token; adapter {name!r} has {config.num_layers} layers of "
            f"2·{encoder.width}; is the cache of another model?"
        )
    weight, width = encoder.embedding.weight, encoder.width
    for layer, pair in enumerate(table.split(2 * width, 1)):
        for block, values in zip(blocks_of(config, layer), pair.split(width, 1), strict=True):
            weight[:, block * width : (block + 1) * width] = values
    return table


@torch.no_grad()
def initialize_kv_prefix_from_text(
    model: nn.Module, tokenizer: Any, *, text: str, adapter_name: str | None = None,
    num_virtual_tokens: int | None = None, use_chat_template: bool = True, max_length: int | None = None,
) -> Tensor:  # fmt: skip
    """Make an adapter's prefix of the first tokens of a text, read by the base model; returns the table.

    With `use_chat_template` a tokenizer that has a template reads the text as the system's message, as in HF peft.
    Raises as `initialize_kv_prefix_from_past_key_values`.
    """
    name, config, _ = _prefix(model, adapter_name)
    if getattr(model.config, "is_encoder_decoder", False):
        raise ConfigError(
            f"adapter {name!r}: {type(model).__name__} reads a text with its encoder, and its prefix is the decoder's; "
            "use initialize_kv_prefix_from_past_key_values"
        )
    if use_chat_template and getattr(tokenizer, "chat_template", None):
        message = [{"role": "system", "content": text}]
        ids = tokenizer.apply_chat_template(
            message, add_generation_prompt=False, return_dict=False, return_tensors="pt"
        )
    else:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
    ids = ids[:, :max_length].to(model.get_input_embeddings().weight.device)
    wanted = config.num_virtual_tokens
    if ids.shape[1] < wanted:
        raise ConfigError(f"text: {ids.shape[1]} tokens, and adapter {name!r} has {wanted}; use a longer text")
    from transformers import DynamicCache

    training = model.training
    model.eval()
    try:
        with override(state_of(model), ()):
            # A cache that is not told of the model's windows keeps every key.
            cache = model(input_ids=ids[:, :wanted], past_key_values=DynamicCache(), use_cache=True).past_key_values
    finally:
        model.train(training)
    return initialize_kv_prefix_from_past_key_values(
        model, adapter_name=name, past_key_values=cache, num_virtual_tokens=num_virtual_tokens
    )


def _prefix(model: nn.Module, adapter_name: str | None):
    """(name, configuration, encoder) of a prefix adapter that is a plain table."""
    state = state_of(model)
    name = only_adapter(state, adapter_name)
    config = state.configs[name]
    if not isinstance(config, PrefixTuningConfig):
        raise PatchError(f"adapter {name!r} is {config.peft_type.value}, which has no prefix; name another")
    encoder = model.prompt_encoder[name]
    if encoder.projects:
        raise ConfigError(
            f"adapter {name!r} has prefix_projection=True: its prefix comes out of a network, which cannot be set to "
            "given keys and values"
        )
    return name, config, encoder


def _pairs(past_key_values: Any) -> list[tuple[Tensor, Tensor]]:
    cache = getattr(past_key_values, "self_attention_cache", past_key_values)
    found = getattr(cache, "layers", cache)
    try:
        pairs = [(e.keys, e.values) if hasattr(e, "keys") else (e[0], e[1]) for e in found]
    except (TypeError, IndexError, KeyError):
        pairs = []
    if not pairs or not all(isinstance(t, Tensor) for pair in pairs for t in pair):
        kind = type(past_key_values).__name__
        raise ConfigError(f"past_key_values is {kind} without keys and values; pass a model's filled past_key_values")
    return pairs
