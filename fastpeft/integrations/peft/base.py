"""The base model under peft's prefixes and prompts: made to find them where its attention and its embeddings are, while
peft keeps the parameters."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastpeft.adapted_model import AdaptedModel, patched_model_class
from fastpeft.errors import PatchError
from fastpeft.integrations.peft.swapping import Extension
from fastpeft.patching import PatchState, bind_checkpoints, restore
from fastpeft.selection import override
from fastpeft.tuners.layer import AdapterLayer, take_forward


def begin_base(base: nn.Module, extension: Extension) -> PatchState:
    """Let calls of the base model go through `fastpeft.forward`; without a name in force they are its own. Raises
    PatchError if something in it is patched already, as it can be for one model alone."""
    for path, module in base.named_modules():
        if "_fastpeft" in module.__dict__:
            raise PatchError(
                f"patch: {path or type(base).__name__} is patched as part of another model, which has this base too; "
                "unpatch that one first"
            )
    state = PatchState(type(base), extension.backend, hf_quirks=True, autocast=True, requires_grad={}, training={})
    state.original_forward = base.__dict__.get("forward")
    extension.hooked = base.__dict__["_fastpeft"] = state
    base.__class__ = patched_model_class(type(base), AdaptedModel)
    state.original_forward = take_forward(base, state.original_class)
    bind_checkpoints(base, state)
    return state


def using(state: PatchState, name: str, function: Callable, /, *args, **kwargs) -> Any:
    """`function(*args, **kwargs)`, inside which the base model uses this adapter."""
    if torch.compiler.is_dynamo_compiling():  # which traces one call at a time, and knows no context variables
        before, state.active = state.active, (name,)
        try:
            return function(*args, **kwargs)
        finally:
            state.active = before
    with override(state, (name,)):
        return function(*args, **kwargs)


def end_base(base: nn.Module, extension: Extension) -> None:
    """Undo `begin_base`, if it was done, and what adapters have put into the model since."""
    if extension.hooked is not None:
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
