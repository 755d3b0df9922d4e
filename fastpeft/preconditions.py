"""What must hold of a model before `patch` touches it: refusals name the library, or the order, that is in the way."""

import re
import sys
from typing import Any

from torch import nn

from fastpeft.config_base import PeftConfig, PeftType
from fastpeft.errors import PatchError
from fastpeft.neighbours import check_neighbours


def adapted_by_peft(model: Any) -> bool:
    """Whether HF peft has adapted something in this model."""
    if "peft" not in sys.modules or not isinstance(model, nn.Module):
        return False
    return any(kind.__module__.split(".")[0] == "peft" for module in model.modules() for kind in type(module).__mro__)


def check_model(model: Any) -> None:
    """Raises PatchError unless this is a module that can be patched, and nobody has done so yet."""
    if not isinstance(model, nn.Module):
        raise PatchError(f"patch: model is a {type(model).__name__}; a torch.nn.Module is needed")
    if (configs := getattr(model.__dict__.get("_fastpeft"), "configs", None)) is not None:
        names = ", ".join(map(repr, configs)) or "no adapter"
        raise PatchError(
            f"patch: this model is already patched and has {names}; add another one with "
            "model.add_adapter(name, config), or fastpeft.unpatch(model) first"
        )
    check_not_wrapped(model)
    if any(isinstance(parameter, nn.parameter.UninitializedParameter) for parameter in model.parameters()):
        raise PatchError("patch: the model has lazy modules without shapes; run a batch through it first")
    _check_owners(model)
    check_neighbours(model)


# From here on transformers' caches have other names, and virtual tokens in `generate` come out wrong without a word.
MOVED = (5, 24)
VIRTUAL = (PeftType.PREFIX_TUNING, PeftType.PROMPT_TUNING, PeftType.P_TUNING, PeftType.ADAPTION_PROMPT)


def check_transformers(config: PeftConfig) -> None:
    """Raises PatchError for virtual tokens with a release of transformers in which they are known to go wrong."""
    version = getattr(sys.modules.get("transformers"), "__version__", "0.0")
    release = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if config.peft_type in VIRTUAL and release >= MOVED:
        raise PatchError(
            f"{config.peft_type.value} with transformers {version}, which has renamed caches, would generate wrong "
            "tokens; install transformers>=5.17,<5.24"
        )


def check_not_wrapped(model: nn.Module) -> None:
    """Raises PatchError for what compiles or distributes a model, in place of the model."""
    compiled = "_orig_mod" in model._modules
    if compiled or isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise PatchError(
            f"patch: this {type(model).__name__} wraps the model, and all of its modules' paths begin with "
            f"{'_orig_mod' if compiled else 'module'!r}; patch the model inside it, then compile or distribute that"
        )


def _check_owners(model: nn.Module) -> None:
    kind = f"this {type(model).__name__}"
    for name, module in model.named_modules():
        owner = type(module).__module__.split(".")[0]
        if owner in ("unsloth", "axolotl", "lorafusion"):
            raise PatchError(
                f"patch: {name} is a {owner} layer; a model patched by another library is not patched again"
            )
        if "_orig_mod" in module._modules:
            raise PatchError(
                f"patch: {name} was compiled before the patch, and its parameters' paths have '_orig_mod'; patch the "
                "model first, then compile its parts"
            )
        if "_fastpeft" in module.__dict__:
            raise PatchError(f"patch: {name or kind} is patched as part of another model; unpatch that one first")
