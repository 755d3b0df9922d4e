"""MPT, whose attention computes its scores itself: the same forward over the op, with ALiBi by slopes."""

from torch import Tensor

from fastpeft.attention.interface import attend, plain_mask
from fastpeft.tuners.attention_layer import AdaptedAttention


class MptAttention(AdaptedAttention):
    """transformers' class of this name, with virtual tokens. Its positions count padding too."""

    attends_itself = True

    def forward(self, hidden_states, position_bias, past_key_values=None, attention_mask=None, **kwargs):
        if not self.active_adapters():
            mask = plain_mask(attention_mask, "eager", hidden_states.dtype)
            mask = mask if mask is None else mask.bool()
            return self.base_forward(
                hidden_states, position_bias, past_key_values=past_key_values, attention_mask=mask, **kwargs
            )
        self.refuse_weights(kwargs.get("output_attentions"))
        if isinstance(attention_mask, Tensor):
            attention_mask = ~attention_mask  # the model makes booleans of its mask of numbers: True where it hides
        query, key, value = self._projected(hidden_states)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        slopes = position_bias[:, 0, -1] - position_bias[:, 0, -2]
        out = attend(
            self, query, key, value, attention_mask, self.active_prefix(query.dtype),
            self.active_prompts(), scaling=self.softmax_scale, dropout=self.attn_dropout_p if self.training else 0.0,
            alibi_slopes=slopes, positions="slots", **kwargs,
        )  # fmt: skip
        return self.out_proj(out.transpose(1, 2).flatten(2)), None

    def _projected(self, hidden: Tensor) -> tuple[Tensor, ...]:
        fused = self.Wqkv(hidden)
        if self.clip_qkv:
            fused = fused.clamp(min=-self.clip_qkv, max=self.clip_qkv)
        return tuple(t.unflatten(2, (self.n_heads, -1)).transpose(1, 2) for t in fused.chunk(3, 2))

    def prompt_pair(self, prompt: Tensor) -> tuple[Tensor, Tensor]:
        return self._projected(prompt)[1:]
