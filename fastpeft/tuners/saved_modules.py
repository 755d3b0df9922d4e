"""Modules that an adapter trains whole (`modules_to_save`): a trained copy beside the untouched original."""

import copy
from collections import OrderedDict
from collections.abc import Sequence
from types import MethodType

import torch
from torch import nn

from fastpeft.configs import LoraConfig
from fastpeft.distributed import check_undistributed
from fastpeft.errors import TargetError
from fastpeft.selection import row_names
from fastpeft.tuners.layer import AdapterLayer
from fastpeft.tuners.mixed import WrongRows, check_rows

HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks"),
)


def own_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a module that is trained whole, without those that adapters have added to it."""
    skip = tuple(f"{name}." for name in SavedModule.containers)
    return {key: value for key, value in module.state_dict(keep_vars=True).items() if not key.startswith(skip)}


def check_saved(model: nn.Module, saved: Sequence[tuple[str, nn.Module]]) -> None:
    """Refuse a model that is distributed already, and modules that cannot be trained whole. Raises PatchError or
    TargetError."""
    check_undistributed(model)
    whole = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, SavedModule))
    for position, (name, module) in enumerate(saved):
        _check_inside(name, module)
        if name.startswith(whole):
            raise TargetError(
                f"modules_to_save has {name}, which another adapter already trains whole as part of more; leave it out"
            )
        for other, same in saved[:position]:
            if same is module:
                raise TargetError(f"modules_to_save matches {other} and {name}, which are one module; name one of them")
        for key, tensor in own_tensors(module).items():
            if tensor.is_meta:
                raise TargetError(f"modules_to_save: {name}.{key} is on the meta device or offloaded; load it first")
            if not tensor.is_floating_point():
                raise TargetError(
                    f"modules_to_save: {name}.{key} is {tensor.dtype}, and an adapter's file holds floating-point "
                    "tensors only; leave the module out"
                )


def check_apart(model: nn.Module, saved: Sequence[tuple[str, nn.Module]], paths: Sequence[str], what: str) -> None:
    """Refuse to put something into modules that are trained whole, by this adapter or another: a copy is called for
    them, and carries nothing. Raises TargetError."""
    theirs = [name for name, module in model.named_modules() if isinstance(module, SavedModule)]
    for path in paths:
        for name, _ in saved:
            if f"{path}.".startswith(f"{name}."):
                raise TargetError(f"modules_to_save has {name}, and {path} carries {what}; name other modules")
        for name in theirs:
            if f"{path}.".startswith(f"{name}."):
                raise TargetError(f"{path} cannot carry {what}: another adapter trains {name} whole; leave it out")


def _check_inside(name: str, module: nn.Module) -> None:
    for path, inner in module.named_modules(prefix=name):
        if isinstance(inner, AdapterLayer) and not isinstance(inner, SavedModule):
            raise TargetError(f"modules_to_save has {name}, but {path} already carries an adapter; choose one of them")
        if any(hasattr(hook, "compute_weight") for hook in inner._forward_pre_hooks.values()):
            raise TargetError(
                f"{path} has torch's old weight_norm, which cannot be copied; use torch.nn.utils.parametrizations"
            )
        if isinstance(inner, SavedModule) and inner is not module:
            raise TargetError(f"modules_to_save has {name}, but another adapter trains {path} in it whole; name that")


class SavedModule(AdapterLayer):
    """A module with one trained copy for each adapter; with none of them active it is what it was."""

    prefix = "Saved"
    containers = {"modules_to_save": nn.ModuleDict}

    def add_adapter(self, name: str) -> None:
        """A trainable copy of the original, for this adapter."""
        original = self._fastpeft.original_class
        clone = original.__new__(original)
        contents = {key: value for key, value in self.__dict__.items() if key != "_fastpeft"}
        contents["_modules"] = {key: child for key, child in self._modules.items() if key not in self.containers}
        if self._fastpeft.original_forward is not None:
            contents["forward"] = self._fastpeft.original_forward
        # The original is called first, and its hooks run around the copy.
        contents.update({hooks: OrderedDict() for hooks in HOOKS})
        # What refers to the original, such as accelerate's forward, is to refer to the copy.
        clone.__dict__ = copy.deepcopy(contents, {id(self): clone})
        if getattr(clone.__dict__.get("_old_forward"), "__func__", None) is type(self).forward:
            clone._old_forward = MethodType(original.forward, clone)
        self.modules_to_save[name] = clone.requires_grad_(True)
        self._fastpeft.adapters[name] = None

    def delete_adapter(self, name: str) -> None:
        if name in self._modules.get("modules_to_save", ()):
            del self.modules_to_save[name]
        self._fastpeft.adapters.pop(name, None)

    def unloaded(self, name: str) -> nn.Module:
        """The trained copy, to take this module's place: with its hooks too."""
        clone = self.modules_to_save[name]
        clone.__dict__.update({hooks: self.__dict__[hooks] for hooks in HOOKS})
        return clone

    def parameters_of(self, name: str) -> dict[str, torch.Tensor]:
        """The adapter's tensors by their names in HF's file, relative to this module."""
        return self.modules_to_save[name].state_dict(keep_vars=True)

    def used(self) -> list[str]:
        """The adapters at work that have a copy here, of which the last one's is called. Beside what is merged those
        that no weight can hold are at work."""
        state = self._fastpeft.model
        active, merged = self.active_adapters(), [name for name in state.merged if name in self._fastpeft.adapters]
        if not state.merged:
            return active
        beside = [n for n in active if n in merged or not isinstance(state.configs[n], LoraConfig)]
        return [name for name in merged if name not in beside] + beside

    def forward(self, *args, **kwargs):
        rows = row_names(self._fastpeft.model)
        if rows is not None and self.active_adapters():
            return self._of_rows(rows, *args, **kwargs)
        names = self.used()
        if not names:
            return self.base_forward(*args, **kwargs)
        return self.modules_to_save[names[-1]](*args, **kwargs)

    def _of_rows(self, rows: tuple[str, ...], *args, **kwargs) -> torch.Tensor:
        """Of a batch for whose samples `rows` names adapters: each adapter's copy of its samples, and the original of
        those whose adapter has none. The one tensor among the arguments has the samples."""
        given = {**dict(enumerate(args)), **kwargs}
        tensors = [key for key, each in given.items() if isinstance(each, torch.Tensor)]
        if len(tensors) != 1:
            raise WrongRows(self, f"{len(tensors)} tensors are given, and one is needed that has all samples")
        check_rows(self, rows, given[tensors[0]])
        places: dict[str | None, list[int]] = {}
        for b, name in enumerate(rows):
            places.setdefault(name if name in self.modules_to_save else None, []).append(b)
        parts = []
        for name, place in places.items():
            module = self.base_forward if name is None else self.modules_to_save[name]
            here = {**given, tensors[0]: given[tensors[0]][place]}
            positional = [here.pop(number) for number in range(len(args))]
            parts.append(module(*positional, **here))
            check_rows(self, place, parts[-1], "a result")
        order = torch.tensor([b for place in places.values() for b in place], device=parts[0].device)
        return torch.cat(parts)[order.argsort()]

    def unmerge(self) -> None:
        """Nothing to do: merging leaves the original and its copies as they are."""
