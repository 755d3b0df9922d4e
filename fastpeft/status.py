"""What state a patched model's adapters are in, in peft's words: `get_layer_status`, `get_model_status`."""

import contextlib
import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn

from fastpeft.adapters import count_parameters
from fastpeft.errors import PatchError
from fastpeft.patching import layers, state_of
from fastpeft.quantised import entry_of
from fastpeft.selection import active_names
from fastpeft.tuners.lora import LoraLayer
from fastpeft.tuners.lora_parameters import LoraParameters, ParameterSettings

IRREGULAR = "irregular"  # what differs from layer to layer, or from parameter to parameter


@dataclass(frozen=True)
class TunerLayerStatus:
    """One layer, with peft's fields. module_type is fastpeft's class of the layer, quantization_backend its library."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Literal["irregular"]]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclass(frozen=True)
class TunerModelStatus:
    """The whole model, with peft's fields."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Literal["irregular"]
    active_adapters: list[str] | Literal["irregular"]
    merged_adapters: list[str] | Literal["irregular"]
    requires_grad: dict[str, bool | Literal["irregular"]]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """Of each layer that holds parameters of adapters. `enabled` and the rest are of this thread's calls now. Raises
    PatchError if the model is not patched."""
    state, found = state_of(model), []
    for path, layer in layers(model):
        held = {name: _parameters_of(layer, name) for name in layer._fastpeft.adapters}
        held = {name: parameters for name, parameters in held.items() if parameters}
        if not held:
            continue
        quantised = entry_of(layer)
        found.append(
            TunerLayerStatus(
                name=path,
                module_type=type(layer).__name__,
                enabled=_enabled(state),
                active_adapters=list(state.active),
                merged_adapters=[name for name in state.merged if name in held],
                requires_grad={name: _agreed(p.requires_grad for p in each) for name, each in held.items()},
                available_adapters=sorted(held),
                devices={name: sorted({p.device.type for p in each}) for name, each in held.items()},
                quantization_backend=None if quantised is None else quantised.library,
            )
        )
    return found


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """Of the whole model; what differs from layer to layer is "irregular". Raises PatchError if it is not patched."""
    state, every = state_of(model), get_layer_status(model)
    trainable, total = count_parameters(model)
    merged = sorted({name for layer in every for name in layer.merged_adapters})
    partly = any(set(merged) & (set(layer.available_adapters) - set(layer.merged_adapters)) for layer in every)
    requires_grad, devices = defaultdict(list), defaultdict(set)
    for layer in every:
        for name in layer.available_adapters:
            requires_grad[name].append(layer.requires_grad[name])
            devices[name].update(layer.devices[name])
    return TunerModelStatus(
        base_model_type=state.original_class.__name__,
        adapter_model_type=type(model).__bases__[0].__name__,
        peft_types={name: config.peft_type.value for name, config in state.configs.items()},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(every),
        enabled=_enabled(state),
        active_adapters=list(state.active),
        merged_adapters=IRREGULAR if partly else merged,
        requires_grad={name: _agreed(values) for name, values in requires_grad.items()},
        available_adapters=sorted(requires_grad),
        devices={name: sorted(kinds) for name, kinds in devices.items()},
        quantization_backend=_agreed(layer.quantization_backend for layer in every),
    )


def _enabled(state) -> bool:
    return bool(active_names(state)) or not state.active


def _parameters_of(layer: nn.Module, name: str) -> list[nn.Parameter]:
    return [each for each in layer.parameters_of(name).values() if isinstance(each, nn.Parameter)]


def _agreed(values: Iterable) -> object:
    different = set(values)
    return different.pop() if len(different) == 1 else IRREGULAR if different else None


@contextlib.contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Inside, every LoRA (and AdaLoRA) of a patched model counts `multiplier` times as much, in every thread. Raises
    PatchError for what is no finite number, a model without any, and one whose adapters are merged."""
    state = state_of(model)
    if isinstance(multiplier, bool) or not isinstance(multiplier, int | float) or not math.isfinite(multiplier):
        raise PatchError(f"rescale_adapter_scale: multiplier={multiplier!r} must be a finite number")
    if state.merged:
        raise PatchError(f"rescale_adapter_scale: {', '.join(state.merged)} is merged into the weights; unmerge first")
    before = [(each._fastpeft.adapters, dict(each._fastpeft.adapters)) for _, each in layers(model) if _is_lora(each)]
    if not before:
        raise PatchError("rescale_adapter_scale: only LoRA has a scale, and this model has no LoRA")
    try:
        for adapters, held in before:
            for name, settings in held.items():
                adapters[name] = _rescaled(settings, multiplier)
        yield
    finally:
        for adapters, held in before:
            adapters.update({name: settings for name, settings in held.items() if name in adapters})


def _is_lora(layer: nn.Module) -> bool:
    return isinstance(layer, LoraLayer | LoraParameters)


def _rescaled(settings, multiplier: float):
    if isinstance(settings, ParameterSettings):
        return ParameterSettings({key: _rescaled(each, multiplier) for key, each in settings.each.items()})
    return dataclasses.replace(settings, scaling=settings.scaling * multiplier)
