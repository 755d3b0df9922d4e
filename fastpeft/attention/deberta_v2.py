"""DeBERTa-v2 and v3, whose scores are content to content, content to position and position to content (He et al., arXiv
2006.03654, equation 4). A virtual key is content without a position: it has the first of the three, scaled alike.
"""

import math

from fastpeft.attention.interface import attend
from fastpeft.tuners.attention_layer import AdaptedAttention


class DisentangledSelfAttention(AdaptedAttention):
    """transformers' class of this name, with virtual tokens. The other two terms are a bias, whose gradient counts."""

    attends_itself = True

    def forward(
        self, hidden_states, attention_mask, output_attentions=False, query_states=None, relative_pos=None,
        rel_embeddings=None,
    ):  # fmt: skip
        if not self.active_adapters():
            return self.base_forward(
                hidden_states, attention_mask, output_attentions, query_states, relative_pos, rel_embeddings
            )
        self.refuse_weights(output_attentions)
        states = hidden_states if query_states is None else query_states
        parts = (self.query_proj(states), self.key_proj(hidden_states), self.value_proj(hidden_states))
        folded = [self.transpose_for_scores(part, self.num_attention_heads) for part in parts]
        query, key, value = (t.unflatten(0, (-1, self.num_attention_heads)) for t in folded)
        terms = 1 + sum(term in self.pos_att_type for term in ("c2p", "p2c"))
        bias = None
        if self.relative_attention and terms > 1:
            rel_embeddings = self.pos_dropout(rel_embeddings)
            bias = self.disentangled_attention_bias(folded[0], folded[1], relative_pos, rel_embeddings, terms)
            bias = bias.unflatten(0, (-1, self.num_attention_heads))
        mask = attention_mask.bool()
        out = attend(
            self, query, key, value, mask, self.active_prefix(query.dtype),
            self.active_prompts(), scaling=1 / math.sqrt(query.shape[-1] * terms), score_bias=bias,
            dropout=self.dropout.p if self.training else 0.0,
        )  # fmt: skip
        if not self.slices():  # tokens at padding see nothing, for which transformers has every key alike
            out = out + value.mean(2, keepdim=True) * ~mask.any(-1, keepdim=True)
        return out.transpose(1, 2).flatten(2), None
