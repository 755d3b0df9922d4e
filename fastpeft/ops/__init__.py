"""The ops, each one function: shapes in its docstring, torch and Triton behind it."""

from fastpeft.ops import _expert_lora_linear_compiled as _expert_lora_linear_compiled
from fastpeft.ops import _lora_linear_compiled as _lora_linear_compiled  # registers the operators
from fastpeft.ops import _lora_mlp_compiled as _lora_mlp_compiled
from fastpeft.ops import _lora_projections_compiled as _lora_projections_compiled
from fastpeft.ops import _mixed_lora_linear_compiled as _mixed_lora_linear_compiled
from fastpeft.ops import _prefix_attention_compiled as _prefix_attention_compiled
from fastpeft.ops import _prompt_embedding_compiled as _prompt_embedding_compiled
from fastpeft.ops.expert_lora_linear import expert_lora_linear, expert_lora_linear_reference
from fastpeft.ops.fp8_linear import fp8_linear, fp8_linear_reference
from fastpeft.ops.gated_prompt_attention import gated_prompt_attention, gated_prompt_attention_reference
from fastpeft.ops.lora_linear import dropout_mask, lora_linear, lora_linear_reference
from fastpeft.ops.lora_mlp import lora_mlp, lora_mlp_reference
from fastpeft.ops.lora_projections import lora_projections, lora_projections_reference
from fastpeft.ops.mixed_lora_linear import mixed_lora_linear, mixed_lora_linear_reference
from fastpeft.ops.prefix_attention import prefix_attention, prefix_attention_reference
from fastpeft.ops.prompt_embedding import (
    prepend_prompt,
    prepend_prompt_reference,
    prompt_embedding,
    prompt_embedding_reference,
)

__all__ = [
    "dropout_mask",
    "expert_lora_linear",
    "expert_lora_linear_reference",
    "fp8_linear",
    "fp8_linear_reference",
    "gated_prompt_attention",
    "gated_prompt_attention_reference",
    "lora_linear",
    "lora_linear_reference",
    "lora_mlp",
    "lora_mlp_reference",
    "lora_projections",
    "lora_projections_reference",
    "mixed_lora_linear",
    "mixed_lora_linear_reference",
    "prefix_attention",
    "prefix_attention_reference",
    "prepend_prompt",
    "prepend_prompt_reference",
    "prompt_embedding",
    "prompt_embedding_reference",
]
