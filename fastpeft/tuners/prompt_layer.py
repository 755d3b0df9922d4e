"""Token embeddings that know virtual tokens: what they add to their own class."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastpeft.calls import FIRST, Call, Room, calling, current_call
from fastpeft.ops.prompt_embedding import prepend_prompt, prompt_embedding
from fastpeft.tuners.layer import Companion
from fastpeft.tuners.prompt_call import explaining, named_arguments, prompt_of, with_virtual_tokens


class PromptedEmbedding(Companion):
    """A module that looks tokens up. In a call that begins with virtual tokens their rows are the prompt's; an
    adapter's entry says whether it is the embedding of a decoder behind an encoder."""

    prefix = "Prompted"

    def looks_up_only(self) -> bool:
        """Whether it is nn.Embedding's own lookup and nothing else, which the fused op does."""
        state = self._fastpeft
        plain = state.original_forward is None and state.original_class.forward is nn.Embedding.forward
        return (
            plain and self.max_norm is None and not self.sparse and type(self._parameters.get("weight")) is nn.Parameter
        )

    def forward(self, input, *args, **kwargs):
        call = current_call(self._fastpeft.model)
        if call is None or call.ids is None or self._decodes() and not call.decodes:
            return self.base_forward(input, *args, **kwargs)
        if call.room.kept is None and not self._decodes() and _is_written(input, call):
            return self.in_front(call.ids, None, call.prompt, call.room)
        return self.anywhere(input, call.prompt, *args, **kwargs)

    def _decodes(self) -> bool:
        return any(self._fastpeft.adapters.values())

    def in_front(self, ids: Tensor | None, embeds: Tensor | None, prompt: Tensor, room: Room) -> Tensor:
        """(B, P + S, H) of ids (B, S), or of embeddings made elsewhere: each row is written once, the prompt's behind
        what padding a sample has in front."""
        options = {"start": room.start, "patched_backend": self._fastpeft.model.backend}
        if ids is not None and self.looks_up_only():
            return prompt_embedding(ids, self.weight, prompt, padding_idx=self.padding_idx, **options)
        return prepend_prompt(self.base_forward(ids) if embeds is None else embeds, prompt, **options)

    def anywhere(self, ids: Tensor, prompt: Tensor, *args, **kwargs) -> Tensor:
        """(B, T, H), wherever the virtual tokens' ids stand. The prompt's gradients are summed in its own dtype."""
        virtual = ids >= FIRST
        rows = self.base_forward(ids.masked_fill(virtual, 0), *args, **kwargs)
        found = F.embedding((ids - FIRST).clamp(min=0), prompt).to(rows.dtype)
        return found.where(virtual[..., None], rows)


def _is_written(input: Tensor, call: Call) -> bool:
    """Whether these are the ids that the model was called with: a model may ask for more (Longformer's padding), or in
    another order (XLNet)."""
    if torch.compiler.is_dynamo_compiling() or input.is_meta:  # where tensors have no addresses
        return input.shape == call.written.shape
    return input.is_set_to(call.written)


class PromptedEncoder(Companion):
    """The encoder of a sequence-to-sequence model; an adapter's entry is what its rows come from. Called by itself, as
    `generate` does, it puts the virtual tokens in front; the whole model has done that before."""

    prefix = "Prompted"

    def forward(self, *args, **kwargs):
        state = self._fastpeft
        names = self.active_adapters()
        if not names or current_call(state.model) is not None:
            return self.base_forward(*args, **kwargs)
        given = named_arguments(state.original_class, args, kwargs)
        prompt = prompt_of([state.adapters[name] for name in names])
        call = with_virtual_tokens(given, prompt, foremost=bool(state.model.quirky.intersection(names)))
        with explaining(state.adapters[names[0]], call.room.count, call.room.tokens):
            return calling(state.model, call, self.base_forward, **given)
