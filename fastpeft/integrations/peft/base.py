"""The base model under peft's prefixes and prompts: made to find them where its attention and its embeddings are, while
peft keeps the parameters."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastpeft.adapted_model import AdaptedModel, patched_model_class
from fastpeft.integrations.peft.swapping import Extension
from fastpeft.patching import PatchState, enable_input_grads, restore
from fastpeft.selection import CarriedCheckpoint, override
from fastpeft.tuners.layer import AdapterLayer, take_forward


def begin_base(base: nn.Module, extension: Extension) -> PatchState:
    """Let calls of the base model go through `fastpeft.forward`; without a name in force they are its own."""
    state = PatchState(type(base), extension.backend, hf_quirks=True, autocast=True, requires_grad={}, training={})
    base.__class__ = patched_model_class(type(base), AdaptedModel)
    state.original_forward = take_forward(base, state.original_class)
    base.__dict__["_fastpeft"] = state
    checkpointing = [m for m in base.modules() if "_gradient_checkpointing_func" in m.__dict__]
    for module in checkpointing:
        module._gradient_checkpointing_func = CarriedCheckpoint(module._gradient_checkpointing_func, state)
    if any(getattr(module, "gradient_checkpointing", False) for module in checkpointing):
        enable_input_grads(base, state)
    extension.hooked = state
    return state


def using(state: PatchState, name: str, function: Callable, /, *args, **kwargs) -> Any:
    """`function(*args, **kwargs)`, inside which the base model uses this adapter."""
    if torch.compiler.is_compiling():  # which traces one call at a time, and knows no context variables
        before, state.active = state.active, (name,)
        out = function(*args, **kwargs)
        state.active = before
        return out
    with override(state, (name,)):
        return function(*args, **kwargs)


def end_base(base: nn.Module, extension: Extension) -> None:
    """Undo `begin_base` and what adapters have put into the model since."""
    restore(base, extension.hooked, keep_weights=False)
    extension.hooked = None


def forget_adapter(base: nn.Module, extension: Extension, name: str) -> None:
    """Take an adapter's entries out of the modules that know it; the modules stay ours."""
    for module in base.modules():
        if isinstance(module, AdapterLayer):
            module._fastpeft.adapters.pop(name, None)
    state = extension.hooked
    for known in (state.configs, state.parts, extension.left):
        known.pop(name, None)
    state.quirky.discard(name)
