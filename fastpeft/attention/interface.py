"""The attention function that is registered with transformers under "fastpeft".

A model is switched to it by its configuration, which all of its attention modules ask at every call. Those that carry
a prefix are computed here; all others are handed to the implementation that was in force before, with its own mask.
"""

import sys

import torch
from torch import Tensor

from fastpeft.attention.masks import BEFORE, Mask, mask_function
from fastpeft.attention.prompts import gated_term, prompt_keys_and_values
from fastpeft.errors import PatchError
from fastpeft.ops.gated_prompt_attention import gated_prompt_attention
from fastpeft.ops.prefix_attention import prefix_attention
from fastpeft.tuners.attention_layer import IMPLEMENTATION as NAME
from fastpeft.tuners.attention_layer import AdaptedAttention
from fastpeft.tuners.layer import AdapterLayer


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
    """Undo `switch`. What somebody has set in the meantime stays."""
    if not hasattr(config, BEFORE):
        return
    if config._attn_implementation == NAME:
        config._attn_implementation_internal = getattr(config, BEFORE)
    delattr(config, BEFORE)


def attention_forward(module, query, key, value, attention_mask, pass_number=None, **kwargs):
    """transformers' contract: query (B, H, S, D), key and value (B, Hkv, T, D) -> ((B, S, H, D), None). pass_number:
    which of the layers that share the module this is."""
    prefix, prompts, apart = None, [], None
    if isinstance(module, AdaptedAttention):
        prefix, prompts = module.active_prefix(query.dtype, pass_number), module.active_prompts()
        if prefix is not None or prompts:
            module.refuse_weights(kwargs.get("output_attentions"))
        if prefix is not None and _out_of_sight(module, attention_mask):
            prefix = None
        if prompts and hasattr(module, "prompts_apart"):
            # Their part does not go through the output projection, and is handed over beside the rest.
            prompts, apart = [], module.prompts_apart(query, prompts)
    if prefix is None and not prompts:
        out, weights = _as_before(module, query, key, value, attention_mask, **kwargs)
        return out, weights if apart is None else apart
    out = attend(module, query, key, value, attention_mask, prefix, prompts, **kwargs)
    return out.transpose(1, 2), apart


def attend(
    module, query, key, value, attention_mask, prefix, prompts=(), *, dropout=0.0, scaling=None, is_causal=None,
    softcap=None, s_aux=None, position_bias=None, sliding_window=None, local_window=None, alibi_slopes=None,
    positions="tokens", cu_seq_lens_k=None, score_bias=None, **_,
) -> Tensor:  # fmt: skip
    """The op, of what a module and its mask say: (B, H, S, D). `prefix` is ((Hkv, P, D), (Hkv, P, D)) or None;
    `prompts` are gated ones; `local_window` a window that the mask does not say; `score_bias` (B, H, S, T) is added to
    the real keys' scores; ALiBi's `positions` count "tokens", without padding, or "slots"."""
    count = 0 if prefix is None else prefix[0].shape[1]
    options = _mask_options(module, query, key, attention_mask, is_causal)
    places = _places(module, attention_mask, key)
    if places is not None and (positions == "slots" or options["sliding_window"] is not None):
        options["key_positions"] = places
    if cu_seq_lens_k is not None and options.get("segment_ids") is None:
        options["segment_ids"] = _segments(cu_seq_lens_k, key)
    if "bias" in options:
        options = _with_window(options, sliding_window, local_window, count, module.prefix_window())
    elif local_window is not None:
        options["sliding_window"] = local_window
    if positions == "slots" and options.get("segment_ids") is None and places is None:
        options["key_positions"] = torch.arange(key.shape[2], device=key.device).expand(len(key), -1)
    if score_bias is not None:
        options["bias"] = score_bias if options.get("bias") is None else score_bias + options["bias"]
    if position_bias is not None:
        options = _with_position_bias(options, position_bias, key.shape[2], count)
    options.update(
        scale=scaling, softcap=softcap, sinks=s_aux, alibi_slopes=alibi_slopes, dropout=dropout, training=dropout > 0,
        patched_backend=module._fastpeft.model.backend,
    )  # fmt: skip
    prompts = [(*prompt_keys_and_values(module, prompt, key), gate) for prompt, gate in prompts]
    if prefix is None:
        options.pop("prefix_bias", None)
        (prompt_key, prompt_value, gate), *prompts = prompts
        out = gated_prompt_attention(query, key, value, prompt_key, prompt_value, gate, **options)
    else:
        ours = (t[: key.shape[1], :, : key.shape[3]] for t in prefix)  # a layer may be narrower than the widest
        out = prefix_attention(query, key, value, *ours, prefix_window=module.prefix_window(), **options)
    for prompt_key, prompt_value, gate in prompts:
        out = out + gated_term(query, prompt_key, prompt_value, gate, scaling)
    return out


def _places(module, mask, key: Tensor) -> Tensor | None:
    """(B, T): where keys stand, counted from a sample's first token, behind the padding in front of it: a prefix stands
    before that token. None if there is no such padding, or for HF peft's way, which counts it."""
    if not isinstance(mask, Mask) or mask.start is None or mask.segments is not None or module.as_in_peft():
        return None
    return torch.arange(key.shape[2], device=key.device) + mask.kv_offset - mask.start[:, None]


def _segments(cu_seq_lens: Tensor | list[int], key: Tensor) -> Tensor:
    """(1, T): which of the packed sequences a key belongs to, from where they begin and end, as the padding-free
    collators of transformers say it."""
    if len(key) != 1:
        raise PatchError(f"cu_seq_lens_k with a batch of {len(key)}: packed sequences come as one row")
    ends = torch.as_tensor(cu_seq_lens, device=key.device)[1:]
    return torch.bucketize(torch.arange(key.shape[2], device=key.device), ends, right=True)[None]


def _mask_options(module, query, key, mask, is_causal) -> dict:
    """The op's arguments that say which keys a query sees."""
    queries, keys = query.shape[2], key.shape[2]
    if isinstance(mask, Mask):
        return {
            "causal": mask.causal,
            "sliding_window": mask.window,
            "query_start": mask.q_offset - mask.kv_offset,
            # What is computed at padding itself is nobody's matter, as a rule.
            "padding_mask": None if mask.behind and not module.reads_padding() else mask.padding,
            "segment_ids": mask.segments,
        }
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if mask is None:
        return {"causal": causal, "query_start": keys - queries}
    if mask.ndim == 2 and mask.shape == (len(query), keys):
        return {"causal": causal, "query_start": keys - queries, "padding_mask": mask.bool()}
    if mask.ndim != 4 or mask.shape[-2:] != (queries, keys):
        raise PatchError(
            f"attention over a prefix: a mask of shape {tuple(mask.shape)} for {queries} queries and {keys} keys; "
            f"(B, T), or (B, 1 or H, {queries}, {keys}) over the real tokens alone is needed"
        )
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    bias = torch.zeros(mask.shape, device=mask.device) if mask.dtype == torch.bool else mask
    return {"causal": False, "bias": bias.masked_fill(~seen, -torch.inf)}


def _with_window(options: dict, said: int | None, unsaid: int | None, count: int, prefix_window: str) -> dict:
    """A window beside a matrix, which knows of it (`said`) or not. A query's own position is that of the last key that
    it sees; what the window does to the prefix is a bias, too."""
    window = said or unsaid
    if window is None:
        return options
    bias = options["bias"]
    keys = torch.arange(bias.shape[-1], device=bias.device)
    at = keys.where(bias > -torch.inf, 0).amax(-1, keepdim=True)
    if unsaid is not None:
        bias = bias.masked_fill(keys <= at - window, -torch.inf)
    if prefix_window == "pin":
        return {**options, "bias": bias}
    virtual = torch.arange(-count, 0, device=bias.device)
    prefix_bias = torch.zeros((*bias.shape[:-1], count), device=bias.device)
    return {**options, "bias": bias, "prefix_bias": prefix_bias.masked_fill(virtual <= at - window, -torch.inf)}


def _with_position_bias(options: dict, position_bias: Tensor, keys: int, count: int) -> dict:
    """A bias (T5's) has columns for the prefix too, in front; the zeros of its cross-attention do not."""
    wide = position_bias.shape[-1] == keys + count
    ours, theirs = (position_bias[..., :count], position_bias[..., count:]) if wide else (None, position_bias)
    if options.get("bias") is not None:
        theirs = theirs + options["bias"]
    if ours is not None and options.get("prefix_bias") is not None:
        ours = ours + options["prefix_bias"]
    return {**options, "bias": theirs, "prefix_bias": ours}


def _out_of_sight(module, mask) -> bool:
    """Whether a window has left the prefix behind: keys have been dropped from the layer's cache already."""
    dropped = isinstance(mask, Mask) and mask.kv_offset > 0 and mask.window is not None
    padding = dropped and mask.start is not None and not module.as_in_peft()  # and perhaps that is what is gone
    return dropped and not padding and module.prefix_window() == "slide"


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
