"""BLOOM, whose attention computes its scores itself: the same forward over the op, with ALiBi by slopes."""

from torch import Tensor
from torch.nn import functional as F

from fastpeft.attention.alibi import alibi_slopes
from fastpeft.attention.interface import attend, plain_mask
from fastpeft.tuners.attention_layer import AdaptedAttention


class BloomAttention(AdaptedAttention):
    """transformers' class of this name, with virtual tokens. (pretraining_tp only changes the order of a sum there.)"""

    attends_itself = True

    def forward(self, hidden_states, residual, alibi, attention_mask, layer_past=None, **kwargs):
        if not self.active_adapters():
            mask = plain_mask(attention_mask, "eager", hidden_states.dtype)
            return self.base_forward(hidden_states, residual, alibi, mask, layer_past=layer_past, **kwargs)
        self.refuse_weights(kwargs.get("output_attentions"))
        query, key, value = self._reshape(self.query_key_value(hidden_states))
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)
        out = attend(
            self, query, key, value, attention_mask, self.active_prefix(query.dtype),
            self.active_prompts(), dropout=self.attention_dropout.p if self.training else 0.0,
            scaling=self.inv_norm_factor, alibi_slopes=alibi_slopes(self.num_heads, query.device), **kwargs,
        )  # fmt: skip
        out = self.dense(out.transpose(1, 2).flatten(2))
        return residual + F.dropout(out, self.hidden_dropout, self.training), None

    def prompt_pair(self, prompt: Tensor) -> tuple[Tensor, Tensor]:
        return self._reshape(self.query_key_value(prompt))[1:]
