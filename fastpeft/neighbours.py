"""Other libraries that change the same modules: what of theirs would pass an adapter by, and what goes on beside it.

Unsloth and Axolotl put functions on attention and MLP modules that multiply by the weights of projections themselves,
with LoRA as they hold it. Liger's fused cross-entropy multiplies by the weight of the head; its other kernels call
modules, and go on beside adapters.
"""

import functools
from collections.abc import Iterator
from typing import Any

from torch import nn

from fastpeft.errors import PatchError

_PASS_BY = ("unsloth", "unsloth_zoo", "axolotl")
_LIGER = "liger_kernel"


def check_neighbours(model: nn.Module) -> None:
    """Raises PatchError if another library's functions stand on modules of the model, or on their classes, that would
    never call an adapter's layer."""
    for path, module in model.named_modules():
        for name, function in _functions_of(module):
            if (owner := _owner(function)) in _PASS_BY:
                raise PatchError(
                    f"patch: {path or type(model).__name__}.{name} is {owner}'s, which computes projections by itself "
                    f"and would pass an adapter by; load the model without {owner}'s kernels (import fastpeft and not "
                    f"{owner}; in Axolotl lora_mlp_kernel, lora_qkv_kernel and lora_o_kernel off)"
                )


def check_peft_s_head(base: nn.Module) -> None:
    """Raises PatchError if peft's adapters change the head of a model, and Liger's cross-entropy takes the head's
    weight without calling it."""
    if has_fused_head(base) and type(_head_of(base)).__module__.partition(".")[0] == "peft":
        raise PatchError(f"patch: {_HEAD_SAID}")


def check_head(model: nn.Module, plan) -> None:
    """Raises PatchError if a planned adapter changes the model's head, and Liger's cross-entropy takes the head's
    weight without calling it."""
    if not has_fused_head(model):
        return
    head = _head_of(model)
    planned = [target.module for target, *_ in getattr(plan, "targets", ())]
    planned += [module for _, module in getattr(plan, "saved", ())]
    if head is not None and any(module is head for module in planned):
        raise PatchError(f"patch: {_HEAD_SAID}")


def check_liger(model: nn.Module, fused: bool) -> None:
    """The same of a patched model, which has Liger's cross-entropy or, if `fused`, is about to get it."""
    if (fused or has_fused_head(model)) and "_fastpeft" in getattr(_head_of(model), "__dict__", {}):
        raise PatchError(f"train: {_HEAD_SAID}")


_HEAD_SAID = (
    "the adapter changes the model's head, and Liger's fused cross-entropy multiplies by the head's weight without "
    "calling it, so that the adapter would not be trained; use apply_liger_kernel_to_...(fused_linear_cross_entropy="
    "False, cross_entropy=True), in a Trainer liger_kernel_config={'fused_linear_cross_entropy': False}, or leave the "
    "head out of target_modules and modules_to_save"
)


def has_fused_head(model: nn.Module) -> bool:
    """Whether a model's forward is Liger's, on the instance, on its class, or behind the adapters of a patched one."""
    state = model.__dict__.get("_fastpeft")
    candidates = [model.__dict__.get("forward"), getattr(state, "original_forward", None)]
    candidates.append(getattr(state, "original_class", type(model)).forward)
    return any(_owner(each) == _LIGER for each in candidates)


def put_behind(model: nn.Module) -> None:
    """Let the adapters' part of a call (virtual tokens, terms of the loss) come before a forward of Liger's that was
    put on a patched model later."""
    if _owner(model.__dict__.get("forward")) == _LIGER:
        model._fastpeft.original_forward = model.__dict__.pop("forward")


def _head_of(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    return get() if callable(get) else None


def _functions_of(module: nn.Module) -> Iterator[tuple[str, Any]]:
    yield "forward", type(module).forward
    for name, value in module.__dict__.items():
        if callable(value) and not isinstance(value, (nn.Module, type)):
            yield name, value


def _owner(function: Any) -> str:
    """The package of a function, of a method's, or of what a partial one calls."""
    while isinstance(function, functools.partial):
        function = function.func
    return (getattr(function, "__module__", None) or "").partition(".")[0]
