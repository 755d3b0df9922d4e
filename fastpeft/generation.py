"""What `generate` asks of a patched model: masks for static caches, and caches that have room for virtual tokens."""

import copy

from fastpeft.forward import prompt_length
from fastpeft.tuners.attention_layer import IMPLEMENTATION
from fastpeft.tuners.prompt_call import filled, longer_mask


class PromptedGeneration:
    """`generate` knows of real tokens only; the model's forward puts the virtual ones in front of the first of them."""

    def create_masks_for_generate(self, config, inputs_embeds, attention_mask, **kwargs):
        """What `generate` calls before it fills a static cache, to hand the model a mask of fixed shape. With virtual
        tokens the model makes a better one of the prompt's mask itself; for the single tokens after it, this is
        done."""
        from transformers.masking_utils import create_masks_for_generate

        count, foremost = prompt_length(self)
        served = getattr(config.get_text_config(), "_attn_implementation", None) == IMPLEMENTATION
        begins = not filled(kwargs.get("past_key_values"))
        if (served and inputs_embeds.shape[1] > 1) or (count and begins):
            return attention_mask
        if count and attention_mask is not None:
            attention_mask = longer_mask(attention_mask, count, foremost)
        if served:
            config = copy.deepcopy(config)
            config.get_text_config()._attn_implementation_internal = "sdpa"  # whose masks are matrices
        original = getattr(super(), "create_masks_for_generate", create_masks_for_generate)
        return original(config=config, inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)

    def prepare_inputs_for_generation(self, input_ids, next_sequence_length=None, past_key_values=None, **kwargs):
        """transformers' own method. Of a cache that is gone on with, the virtual tokens are not among the ids."""
        count, _ = prompt_length(self)
        if count and next_sequence_length is not None and kwargs.get("is_first_iteration") and filled(past_key_values):
            next_sequence_length += count
        return super().prepare_inputs_for_generation(
            input_ids, next_sequence_length=next_sequence_length, past_key_values=past_key_values, **kwargs
        )

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        """transformers' own method. A static cache has room for the virtual tokens too."""
        count, _ = prompt_length(self)
        return super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length + count
        )
