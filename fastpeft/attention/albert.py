"""ALBERT, whose layers share the parameters of their group (Lan et al., arXiv 1909.11942, section 3.1): the stack tells
the attention which of its passes a call belongs to, so that each layer has a prefix of its own.

The number is an argument of the call and no count that somebody keeps. So what a checkpoint computes again is given it
again, threads do not meet, and torch.compile sees a constant.
"""

from torch import nn

from fastpeft.attention.numbering import Numbering


class AlbertTransformer(Numbering):
    """transformers' class of this name, with numbered passes."""

    @staticmethod
    def passes_of(stack: nn.Module) -> dict[int, dict[int, int]]:
        found = {}
        for number in range(stack.config.num_hidden_layers):
            layers = stack.albert_layer_groups[_group(stack.config, number)].albert_layers
            for place, layer in enumerate(layers):
                found.setdefault(id(layer.attention), {})[number] = number * len(layers) + place
        return found

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        from transformers.modeling_outputs import BaseModelOutput

        if not self.active_adapters():
            return self.base_forward(hidden_states, attention_mask, **kwargs)
        hidden_states = self.embedding_hidden_mapping_in(hidden_states)
        for number in range(self.config.num_hidden_layers):
            group = self.albert_layer_groups[_group(self.config, number)]
            hidden_states = group(hidden_states, attention_mask, pass_number=number, **kwargs)
        return BaseModelOutput(last_hidden_state=hidden_states)


def _group(config, number: int) -> int:
    """Which group of parameters a pass takes, by the division that transformers makes."""
    return int(number / (config.num_hidden_layers / config.num_hidden_groups))
