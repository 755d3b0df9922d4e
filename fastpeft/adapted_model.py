"""The class in front of a model's own that lets a call of it use adapters; `fastpeft.model` adds peft's verbs."""

import functools

import torch

from fastpeft.distributed import check_dtypes
from fastpeft.forward import forward as adapted_forward
from fastpeft.generation import PromptedGeneration, preparing
from fastpeft.mixed_batches import generating
from fastpeft.selection import CarriedCheckpoint
from fastpeft.tuners.attention_layer import AdaptedAttention


class AdaptedModel(PromptedGeneration):
    """A model whose calls go through `fastpeft.forward`; `self._fastpeft` is its PatchState."""

    def __call__(self, *args, **kwargs):
        """The model's own call. Raises PatchError if it asks for attention weights over virtual tokens, or if
        `fully_shard` was given parameters that it cannot train together."""
        if not torch.compiler.is_dynamo_compiling():
            check_dtypes(self)
        if kwargs.get("output_attentions"):
            for module in self.modules():
                if isinstance(module, AdaptedAttention):
                    module.refuse_weights(bool(module.active_adapters()))
        return super().__call__(*args, **kwargs)

    def _set_gradient_checkpointing(self, enable=True, gradient_checkpointing_func=None, **kwargs):
        """transformers' own method, with the checkpoint function made to carry the choice of adapters along."""
        from fastpeft.patching import disable_input_grads, enable_input_grads

        state = self._fastpeft
        if gradient_checkpointing_func is not None:
            kwargs["gradient_checkpointing_func"] = CarriedCheckpoint(gradient_checkpointing_func, state)
        super()._set_gradient_checkpointing(enable=enable, **kwargs)
        if enable:
            enable_input_grads(self, state)
        else:
            disable_input_grads(state)

    def __reduce_ex__(self, protocol):
        return _rebuild, type(self).__bases__, self.__dict__


def _rebuild(task: type, original: type):
    cls = patched_model_class(original, task)
    return cls.__new__(cls)


@functools.cache
def patched_model_class(original: type, task: type) -> type:
    """The subclass of a model's class with the methods of `task`, an AdaptedModel, under the same name: transformers
    asks for it, and for the arguments of its forward."""
    namespace = {key: getattr(original, key) for key in ("__module__", "__qualname__", "__doc__")}
    namespace |= {"forward": _forward_of(original), **preparing(original), **generating(original)}
    return type(original.__name__, (task, original), namespace)


@functools.cache
def _forward_of(original: type):
    @functools.wraps(original.forward)
    def forward(self, *args, **kwargs):
        return adapted_forward(self, args, kwargs)

    return forward
