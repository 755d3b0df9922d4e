"""Families whose attention computes its scores in a method `_attn(query, key, value, mask)`: that method over the op.

GPT-J and CodeGen rotate by `position_ids`, which move by the prefix; GPT-Neo has a table of positions.
"""

import torch
from torch import Tensor

from fastpeft.attention.interface import attend, plain_mask
from fastpeft.tuners.attention_layer import AdaptedAttention


class _OwnScores(AdaptedAttention):
    attends_itself = True

    def forward(self, hidden_states, *args, output_attentions=False, **kwargs):
        if self.active_adapters():
            self.refuse_weights(output_attentions)
        return self.base_forward(hidden_states, *args, output_attentions=output_attentions, **kwargs)

    def _attn(self, query, key, value, attention_mask=None):
        if not self.active_adapters():
            return super()._attn(query, key, value, plain_mask(attention_mask, "eager", value.dtype))
        # Products in fp32, as transformers does here; a cached key may have another dtype than the query.
        query, key = query.float(), key.float()
        prefix = self.active_prefix(torch.float32)
        dropout = self.attn_dropout.p if self.training else 0.0
        out = attend(
            self, query, key, value.float(), attention_mask, prefix, self.active_prompts(), dropout=dropout,
            **self.score_options(query),
        )  # fmt: skip
        return out.to(value.dtype), None

    def score_options(self, query) -> dict:
        """What else the op needs to know."""
        return {"scaling": 1 / float(self.scale_attn)}


class _Rotated(_OwnScores):
    def forward(self, hidden_states, layer_past=None, attention_mask=None, position_ids=None, **kwargs):
        moved = position_ids + self.active_length()
        return super().forward(
            hidden_states, layer_past=layer_past, attention_mask=attention_mask, position_ids=moved, **kwargs
        )


class GPTJAttention(_Rotated):
    """transformers' class of this name, with virtual tokens."""


class CodeGenAttention(_Rotated):
    """transformers' class of this name, with virtual tokens."""

    def prompt_pair(self, prompt: Tensor) -> tuple[Tensor, Tensor]:
        """Its fused projection is made of four parts, each with queries, values and keys of a part of the heads."""
        _, value, key = self.qkv_proj(prompt).unflatten(-1, (4, -1)).chunk(3, -1)
        return tuple(t.flatten(2).unflatten(2, (-1, self.head_dim)).transpose(1, 2) for t in (key, value))


class GPTNeoSelfAttention(_OwnScores):
    """transformers' class of this name, with virtual tokens: unscaled scores, and a window in its local layers."""

    def score_options(self, query) -> dict:
        window = self.config.window_size if self.attention_type == "local" else None
        return {"scaling": 1.0, "local_window": window}
