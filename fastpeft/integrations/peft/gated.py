"""LLaMA-Adapter of peft: its AdaptedAttention wraps an attention module and keeps prompt and gate; the wrapped module
computes with them, in the op."""

from typing import Any

from torch import nn

from fastpeft.attention.interface import register, switch
from fastpeft.attention.prompts import check_projections
from fastpeft.attention.sites import find_sites
from fastpeft.configs import as_config
from fastpeft.errors import FastpeftError
from fastpeft.integrations.peft.base import begin_base, end_base, forget_adapter
from fastpeft.integrations.peft.swapping import Extension, Swapped, swap, swap_back
from fastpeft.tuners.attention_layer import NOTHING, PromptOf
from fastpeft.tuners.layer import AdapterLayer, attach


class FusedWrapper(Swapped):
    """In front of peft's AdaptedAttention."""

    def forward(self, *args, **kwargs) -> Any:
        return self.model(*args, **kwargs)


class FusedAdaptionModel(Swapped):
    """In front of AdaptionPromptModel, which takes wrappers out of the model and puts others in."""

    def add_adapter(self, adapter_name: str, config: Any) -> None:
        super().add_adapter(adapter_name, config)
        attach_adapter(self, adapter_name)
        self._settle()

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        forget_adapter(self.model, self.extension, adapter_name)
        self._settle()

    def set_adapter(self, adapter_name: str, *args, **kwargs) -> None:
        super().set_adapter(adapter_name, *args, **kwargs)
        self._settle()

    def enable_adapter_layers(self) -> None:
        super().enable_adapter_layers()
        self._settle()

    def disable_adapter_layers(self) -> None:
        super().disable_adapter_layers()
        self._settle()

    def _settle(self) -> None:
        """What is in force is what is in the model."""
        name, state = self._active_adapter, self.extension.hooked
        state.active = (name,) if self._enabled and name in state.configs else ()

    def wrappers(self, name: str) -> list[nn.Module]:
        """Those of one adapter, in the model or out of it."""
        if name in self._cached_adapters:
            return self._cached_adapters[name]
        target = self.peft_config[name].target_modules
        return [getattr(parent, target) for parent in self._parents[name]]

    def swapped_back(self) -> None:
        """Undo what `swap_adaption` did to the wrappers and the base model."""
        for name in self.peft_config:
            for wrapper in self.wrappers(name):
                if isinstance(wrapper, Swapped):
                    swap_back(wrapper)
        end_base(self.model, self.extension)
        self.forward = self.model.forward


def swap_adaption(tuner: nn.Module, extension: Extension) -> None:
    """Make an AdaptionPromptModel ours, and its base model ready for gated prompts."""
    own = tuner.__dict__["forward"]  # the base model's, which peft puts here
    try:
        del tuner.__dict__["forward"]
        if swap(tuner, FusedAdaptionModel, extension):
            begin_base(tuner.model, extension)
            own = tuner.model.forward
            for name in tuner.peft_config:
                attach_adapter(tuner, name)
            tuner._settle()
    finally:
        tuner.forward = own


def attach_adapter(tuner: nn.Module, name: str) -> None:
    """Let the attention modules know one adapter. What fastpeft has no way for is left to peft's own forward, and the
    extension says why."""
    extension, wrappers = tuner.extension, tuner.wrappers(name)
    try:
        config = as_config(tuner.peft_config[name])
        sites = find_sites(tuner.model)
        mixins = {id(module): (path, mixin) for path, module, mixin in sites.attention}
        for wrapper in wrappers:
            check_projections(mixins[id(wrapper.model)][0], wrapper.model, mixins[id(wrapper.model)][1])
    except FastpeftError as error:
        extension.left[name] = str(error)
        return
    register()
    for each in sites.configs:
        switch(each)
    state = extension.hooked
    for _, module, mixin in sites.attention:
        if mixin.attends_itself and not isinstance(module, AdapterLayer):
            attach(module, mixin, state)
        if isinstance(module, AdapterLayer):
            module._fastpeft.adapters[name] = NOTHING
    for wrapper in wrappers:
        module = wrapper.model
        if not isinstance(module, AdapterLayer):
            attach(module, mixins[id(module)][1], state)
        module._fastpeft.adapters[name] = PromptOf(wrapper)
        swap(wrapper, FusedWrapper, extension)
    state.configs[name] = config
    state.quirky.add(name)
