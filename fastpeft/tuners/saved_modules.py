"""Modules that an adapter trains whole (`modules_to_save`): a trained copy beside the untouched original."""

import copy

import torch
from torch import nn

from fastpeft.tuners.layer import AdapterLayer


class SavedModule(AdapterLayer):
    """A module with one trained copy for each adapter; with none of them active it is what it was."""

    prefix = "Saved"
    containers = {"modules_to_save": nn.ModuleDict}

    def add_adapter(self, name: str) -> None:
        """A trainable copy of the original, for this adapter."""
        children = {key: child for key, child in self._modules.items() if key not in self.containers}
        clone = self._fastpeft.original_class.__new__(self._fastpeft.original_class)
        clone.__dict__ = {key: value for key, value in self.__dict__.items() if key not in ("_fastpeft", "_modules")}
        clone.__dict__["_modules"] = children
        clone = copy.deepcopy(clone)
        if self._fastpeft.original_forward is not None:
            clone.__dict__["forward"] = copy.deepcopy(self._fastpeft.original_forward, {id(self): clone})
        self.modules_to_save[name] = clone.requires_grad_(True)
        self._fastpeft.adapters[name] = None

    def delete_adapter(self, name: str) -> None:
        del self.modules_to_save[name]
        del self._fastpeft.adapters[name]

    def parameters_of(self, name: str) -> dict[str, torch.Tensor]:
        """The adapter's tensors by their names in HF's file, relative to this module."""
        return self.modules_to_save[name].state_dict(keep_vars=True)

    def forward(self, *args, **kwargs):
        names = self.active_adapters()
        if not names:
            return self.base_forward(*args, **kwargs)
        return self.modules_to_save[names[-1]](*args, **kwargs)

    def merge(self, names) -> None:
        """Merging keeps the trained copy in place of the original; `unload` takes it out."""

    def unmerge(self) -> None:
        """See `merge`."""
