"""Falcon, rotary or with ALiBi, whose attention computes its scores itself: the same forward over the op."""

from torch import Tensor

from fastpeft.attention.alibi import alibi_slopes
from fastpeft.attention.interface import attend, plain_mask
from fastpeft.tuners.attention_layer import AdaptedAttention


class FalconAttention(AdaptedAttention):
    """transformers' class of this name, with virtual tokens."""

    attends_itself = True

    def forward(
        self,
        hidden_states,
        alibi,
        attention_mask,
        position_ids=None,
        layer_past=None,
        position_embeddings=None,
        **kwargs,
    ):
        if not self.active_adapters():
            return self.base_forward(
                hidden_states, alibi, plain_mask(attention_mask, "eager", hidden_states.dtype),
                position_ids=position_ids, layer_past=layer_past, position_embeddings=position_embeddings, **kwargs,
            )  # fmt: skip
        self.refuse_weights(kwargs.get("output_attentions"))
        query, key, value = self._projected(hidden_states)
        if alibi is None:
            from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb

            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)
        options = {} if alibi is None else self._alibi_options(query)
        out = attend(
            self, query, key, value, attention_mask, self.active_prefix(query.dtype),
            self.active_prompts(), scaling=self.inv_norm_factor, **options, **kwargs,
        )  # fmt: skip
        return self.dense(out.transpose(1, 2).flatten(2)), None

    def _projected(self, hidden: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.transpose(1, 2) for t in self._split_heads(self.query_key_value(hidden)))

    def prompt_pair(self, prompt: Tensor) -> tuple[Tensor, Tensor]:
        return self._projected(prompt)[1:]

    def _alibi_options(self, query: Tensor) -> dict:
        """Falcon scales its slopes as it does its products, and rounds them; it has no dropout without ALiBi."""
        slopes = alibi_slopes(self.num_heads, query.device).bfloat16().float()
        dropout = self.attention_dropout.p if self.training else 0.0
        return {"alibi_slopes": slopes * self.inv_norm_factor, "dropout": dropout}
