"""GPT-2, where HF peft's LLaMA-Adapter adds the prompts' part behind the output projection."""

import torch
from torch import Tensor

from fastpeft.attention.prompts import gated_term, prompt_keys_and_values
from fastpeft.tuners.attention_layer import AdaptedAttention


class GPT2Attention(AdaptedAttention):
    """transformers' class of this name, with virtual tokens."""

    def prompts_apart(self, query: Tensor, prompts: list) -> Tensor | None:
        """(B, S, hidden), which the attention function returns in the place of its weights; None without prompts."""
        terms = []
        for prompt, gate in prompts:
            key, value = prompt_keys_and_values(self, prompt, query)
            terms.append(gated_term(query, key, value, gate, self.head_dim**-0.5).transpose(1, 2).flatten(2))
        return torch.stack(terms).sum(0) if terms else None

    def with_prompts(self, out: tuple) -> tuple:
        return out[0] + out[1], None
