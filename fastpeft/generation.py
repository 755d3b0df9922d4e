"""What `generate` asks of a patched model: masks for static caches, and caches that have room for virtual tokens."""

import copy
import functools

from torch import Tensor

from fastpeft.forward import prompt_length
from fastpeft.tuners.attention_layer import IMPLEMENTATION
from fastpeft.tuners.prompt_call import goes_on, longer_mask


class PromptedGeneration:
    """`generate` knows of real tokens only; the model's forward puts the virtual ones in front of the first of them."""

    def create_masks_for_generate(self, config, inputs_embeds, attention_mask, **kwargs):
        """What `generate` calls before it fills a static cache, to hand the model a mask of fixed shape. With virtual
        tokens the model makes a better one of the prompt's mask itself; for the single tokens after it, this is
        done. A vector (BLOOM's) is of real tokens, and made longer where the model is called."""
        from transformers.masking_utils import create_masks_for_generate

        count, foremost = prompt_length(self)
        served = getattr(config.get_text_config(), "_attn_implementation", None) == IMPLEMENTATION
        if served and inputs_embeds.shape[1] > 1:
            return attention_mask
        if served:
            config = copy.deepcopy(config)
            config.get_text_config()._attn_implementation_internal = "sdpa"  # whose masks are matrices
        original = getattr(super(), "create_masks_for_generate", create_masks_for_generate)
        make = functools.partial(original, config=config, inputs_embeds=inputs_embeds, **kwargs)
        if count and attention_mask is not None:
            made = make(attention_mask=attention_mask)
            if isinstance(made, Tensor) and made.ndim == 2:
                return made
        if count and not goes_on(kwargs):
            return attention_mask
        if count and attention_mask is not None:
            attention_mask = longer_mask(attention_mask, count, foremost)
        return make(attention_mask=attention_mask)

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        """transformers' own method. A static cache has room for the virtual tokens too."""
        count, _ = prompt_length(self)
        return super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length + count
        )


@functools.cache
def preparing(original: type) -> dict:
    """The method by which `original` prepares a step of `generate`, if it has one, as it is to be in front of it: of a
    cache that is gone on with, the virtual tokens are not among the ids. `generate` reads from its arguments' names
    what the model takes."""
    own = getattr(original, "prepare_inputs_for_generation", None)
    if own is None:
        return {}

    @functools.wraps(own)
    def prepare_inputs_for_generation(self, *args, **kwargs):
        count, _ = prompt_length(self)
        more = kwargs.get("next_sequence_length")
        if count and more is not None and kwargs.get("is_first_iteration") and goes_on(kwargs):
            kwargs["next_sequence_length"] = more + count
        return own(self, *args, **kwargs)

    return {own.__name__: prepare_inputs_for_generation}
