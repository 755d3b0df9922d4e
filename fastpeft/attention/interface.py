"""The attention function that is registered with transformers under "fastpeft".

A model is switched to it by its configuration, which all of its attention modules ask at every call. Those that carry
a prefix are computed here; all others are handed to the implementation that was in force before, with its own mask.
"""

import sys

import torch
from torch import Tensor

from fastpeft.attention.masks import Mask, mask_function
from fastpeft.errors import PatchError
from fastpeft.ops.prefix_attention import prefix_attention
from fastpeft.tuners.attention_layer import AdaptedAttention
from fastpeft.tuners.layer import AdapterLayer

NAME = "fastpeft"
BEFORE = "_fastpeft_before"  # of a configuration: the implementation that it named


def register() -> None:
    """Make transformers know the name. Asking again changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, mask_function)


def switch(config) -> None:
    """Let the modules that ask this configuration use ours; once more changes nothing."""
    if config._attn_implementation != NAME:
        setattr(config, BEFORE, config._attn_implementation)
        config._attn_implementation_internal = NAME


def switch_back(config) -> None:
    """Undo `switch`."""
    if config._attn_implementation == NAME:
        config._attn_implementation_internal = getattr(config, BEFORE)
        delattr(config, BEFORE)


def attention_forward(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """transformers' contract: query (B, H, S, D), key and value (B, Hkv, T, D) -> ((B, S, H, D), None)."""
    prefix = module.active_prefix(query.dtype) if isinstance(module, AdaptedAttention) else None
    if prefix is None or _out_of_sight(module, attention_mask):
        return _as_before(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    if kwargs.get("output_attentions"):
        raise PatchError(
            "output_attentions=True: the weights of attention over a prefix are never computed as a whole; leave it "
            "out, or fastpeft.unpatch(model) and use attn_implementation='eager'"
        )
    out = attend(module, query, key, value, attention_mask, prefix, dropout=dropout, scaling=scaling, **kwargs)
    return out.transpose(1, 2), None


def attend(
    module, query, key, value, attention_mask, prefix, *, dropout=0.0, scaling=None, is_causal=None, softcap=None,
    s_aux=None, position_bias=None, sliding_window=None, local_window=None, alibi_slopes=None, **_,
) -> Tensor:  # fmt: skip
    """The op, of what a module and its mask say: (B, H, S, D). `prefix` is ((Hkv, P, D), (Hkv, P, D)); `local_window`
    a window that the mask does not say."""
    prefix_key, prefix_value = prefix
    count = prefix_key.shape[-2]
    options = _mask_options(module, query, key, attention_mask, is_causal, sliding_window or local_window, count)
    if local_window is not None:
        options["sliding_window"] = local_window
    if position_bias is not None:
        options = _with_position_bias(options, position_bias, count)
    return prefix_attention(
        query, key, value, prefix_key, prefix_value,
        scale=scaling, softcap=softcap, sinks=s_aux, alibi_slopes=alibi_slopes, dropout=dropout, training=dropout > 0,
        prefix_window=module.prefix_window(), patched_backend=module._fastpeft.model.backend, **options,
    )  # fmt: skip


def _mask_options(module, query, key, mask, is_causal, sliding_window, count: int) -> dict:
    """The op's arguments that say which keys a query sees."""
    queries, keys = query.shape[2], key.shape[2]
    if mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        return {"causal": causal, "query_start": keys - queries}
    if isinstance(mask, Mask):
        return {
            "causal": mask.causal,
            "sliding_window": mask.window,
            "query_start": mask.q_offset - mask.kv_offset,
            "padding_mask": mask.padding,
            "segment_ids": mask.segments,
        }
    if mask.ndim == 2 and mask.shape == (len(query), keys):
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        return {"causal": causal, "query_start": keys - queries, "padding_mask": mask.bool()}
    if mask.ndim != 4 or mask.shape[-2:] != (queries, keys):
        raise PatchError(
            f"attention over a prefix: a mask of shape {tuple(mask.shape)} for {queries} queries and {keys} keys; "
            f"(B, T), or (B, 1 or H, {queries}, {keys}) over the real tokens alone is needed"
        )
    return _matrix_options(module, query, mask, sliding_window, count)


def _matrix_options(module, query, mask, sliding_window, count: int) -> dict:
    """A matrix becomes a bias. Where the layer has a window that the prefix slides out of, a query's own position is
    that of the last key it sees."""
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    bias = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device) if mask.dtype == torch.bool else mask
    options = {"causal": False, "bias": bias.masked_fill(~seen, -torch.inf)}
    if sliding_window is not None and module.prefix_window() == "slide":
        at = (seen * torch.arange(mask.shape[-1], device=mask.device)).amax(-1, keepdim=True)
        virtual = torch.arange(-count, 0, device=mask.device)
        options["prefix_bias"] = torch.zeros((*mask.shape[:-1], count), device=mask.device).masked_fill(
            virtual <= at - sliding_window, -torch.inf
        )
    return options


def _with_position_bias(options: dict, position_bias: Tensor, count: int) -> dict:
    """Where the bias has columns for the prefix too, they come first; a zero bias has none (T5's cross-attention)."""
    ours, theirs = position_bias[..., :count], position_bias[..., count:]
    if options.get("bias") is not None:
        theirs = theirs + options["bias"]
    if options.get("prefix_bias") is not None:
        ours = ours + options["prefix_bias"]
    return {**options, "bias": theirs, "prefix_bias": ours}


def _out_of_sight(module, mask) -> bool:
    """Whether a window has left the prefix behind: keys have been dropped from the layer's cache already."""
    dropped = isinstance(mask, Mask) and mask.kv_offset > 0 and mask.window is not None
    return dropped and module.prefix_window() == "slide"


def plain_mask(mask, implementation: str, dtype: torch.dtype) -> Tensor | None:
    """A mask as that implementation has it: eager adds the least number where it does not look."""
    mask = mask.matrix(implementation) if isinstance(mask, Mask) else mask
    if implementation == "eager" and mask is not None and mask.dtype == torch.bool:
        least = torch.finfo(dtype).min
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, least)
    return mask


def _as_before(module, query, key, value, attention_mask, **kwargs):
    """The implementation that the configuration named before, with the mask that it would have been given."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = getattr(module.config, BEFORE)
    mask = plain_mask(attention_mask, before, query.dtype)
    if before == "eager":
        original = module._fastpeft.original_class if isinstance(module, AdapterLayer) else type(module)
        function = sys.modules[original.__module__].eager_attention_forward
    else:
        function = ALL_ATTENTION_FUNCTIONS[before]
    return function(module, query, key, value, mask, **kwargs)
