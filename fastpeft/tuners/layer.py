"""What every injected tuner's layer shares: how a module becomes one and ceases to be one.

A targeted module object is kept and its class is swapped, on the instance, for a subclass of its own class that adds
the tuner's forward. The path of every base parameter is unchanged, and taking the class back restores the module.
"""

import contextlib
import functools
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import nn

from fastpeft.distributed import give_class
from fastpeft.selection import active_names


@dataclass
class LayerState:
    """What a patched module remembers beside its parameters."""

    model: Any  # the PatchState of the model, shared by its layers
    original_class: type
    original_forward: Any  # an instance-level forward that stood in front of the class, such as accelerate's, or None
    adapters: dict[str, Any] = field(default_factory=dict)  # name -> the tuner's settings for it
    kept: dict[str, torch.Tensor] = field(default_factory=dict)  # base tensors as they were before patching, on CPU
    unmerged: dict[str, nn.Parameter | torch.Tensor] = field(default_factory=dict)  # base tensors before the merge


@functools.cache
def patched_class(mixin: type, original: type) -> type:
    """The subclass of `original` that computes with the mixin's forward; one for each pair. transformers knows by a
    class's qualified name what hidden states it has to give."""
    namespace = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": mixin.__doc__}
    return type(f"{mixin.prefix}{original.__name__}", (mixin, original, *mixin.behind), namespace)


def _rebuild(mixin: type, original: type):
    cls = patched_class(mixin, original)
    return cls.__new__(cls)


class AdapterLayer:
    """Mixin in front of a module's own class; `self._fastpeft` is its LayerState."""

    prefix = "Adapter"
    behind: tuple[type, ...] = ()  # classes that the module's own class finds by `super()`
    containers: dict[str, type[nn.Module]] = {}  # the children that hold the adapters' parameters, by name

    def __reduce_ex__(self, protocol):
        # The class is made at run time, so pickle and spawn are told how to make it again.
        mixin, original = type(self).__bases__[:2]
        return _rebuild, (mixin, original), self.__dict__

    def file_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """An adapter's tensors by their names in HF's file, relative to this module."""
        return self.parameters_of(name)

    def active_adapters(self) -> list[str]:
        """The adapters that this call uses and that this layer has."""
        adapters = self._fastpeft.adapters
        return [name for name in active_names(self._fastpeft.model) if name in adapters]

    def base_forward(self, *args, **kwargs):
        """The layer as it was: its class's own forward, or the instance-level one that stood in front of it."""
        state = self._fastpeft
        if state.original_forward is not None:
            return state.original_forward(*args, **kwargs)
        return state.original_class.forward(self, *args, **kwargs)

    def add_containers(self) -> None:
        """Make the children that hold the adapters' parameters, where they are not there yet."""
        for name, container in self.containers.items():
            if name not in self._modules:
                self.add_module(name, container())

    def keep(self, name: str) -> None:
        """Remember a base tensor as it is now, on the CPU: for `unpatch`, where the first memory counts, and for the
        case that adding the present adapter fails."""
        kept, undo = self._fastpeft.kept, self._fastpeft.model.undo
        if name in kept and undo is None:
            return
        tensor = getattr(self, name)
        before = tensor.detach().to("cpu", copy=True)
        if undo is not None:
            if name not in kept:
                undo.append(functools.partial(kept.pop, name, None))
            undo.append(functools.partial(tensor.copy_, before))
        kept.setdefault(name, before)

    def give_back(self) -> None:
        """Undo what `keep` has noted before."""
        for name, tensor in self._fastpeft.kept.items():
            with torch.no_grad():
                getattr(self, name).copy_(tensor)


class Companion(AdapterLayer):
    """A module that virtual tokens need changed and that holds none of their parameters."""

    def parameters_of(self, name: str) -> dict:
        return {}

    def delete_adapter(self, name: str) -> None:
        self._fastpeft.adapters.pop(name, None)

    def prepare_merge(self, names) -> None:
        """Nothing to merge."""

    def unmerge(self) -> None:
        """Nothing to do."""


def offloaded_to(module: nn.Module) -> torch.device | None:
    """Where a module runs whose weights accelerate keeps elsewhere between calls; None for any other."""
    hook = module.__dict__.get("_hf_hook")
    for each in getattr(hook, "hooks", (hook,)):
        if getattr(each, "offload", False) and each.execution_device is not None:
            return torch.device(each.execution_device)
    return None


def runs_on(module: nn.Module) -> torch.device:
    """Where the first of a module's parts that has parameters computes."""
    for part in module.modules():
        for parameter in part._parameters.values():
            if parameter is not None:
                return offloaded_to(part) or parameter.device
    return torch.device("cpu")


@contextlib.contextmanager
def fetched(holders: Iterable[nn.Module]):
    """accelerate's offloading fetches parameters when the module that holds them is called. Those that hold an
    adapter's are not called, so their hooks are run around the use of the parameters."""
    hooked = [holder for holder in holders if "_hf_hook" in holder.__dict__]
    for holder in hooked:
        holder._hf_hook.pre_forward(holder)
    try:
        yield
    finally:
        for holder in hooked:
            holder._hf_hook.post_forward(holder, None)


def take_forward(module: nn.Module, original: type) -> Any:
    """Put the forward of a module's present class in the place of its former one's, `original`'s; returns the forward
    that stood on the instance, which is to be called where there was one, or None.

    accelerate's is one that calls the module's own forward in `_old_forward`, and puts that back when it is removed.
    So it stays in front, and gets ours to call.
    """
    if accelerate_calls(module, original):
        module._old_forward = MethodType(type(module).forward, module)
        return None
    return module.__dict__.pop("forward", None)


def accelerate_calls(module: nn.Module, original: type) -> bool:
    """Whether accelerate's hook stands on the module, and calls the forward of its class, `original`."""
    behind = module.__dict__.get("_old_forward")
    return "_hf_hook" in module.__dict__ and getattr(behind, "__func__", None) is original.forward


def give_back_forward(module: nn.Module, original: type, forward: Any) -> None:
    """Give a module the class `original` again, and undo `take_forward`."""
    ours = type(module).forward
    # accelerate's hooks may remember our forward as the module's own, and put it on the instance when they go
    if getattr(module.__dict__.get("_old_forward"), "__func__", None) is ours:
        module._old_forward = MethodType(original.forward, module)
    if getattr(module.__dict__.get("forward"), "__func__", None) is ours:
        del module.__dict__["forward"]
    if forward is not None:
        module.__dict__["forward"] = forward
    give_class(module, original)  # last: until then all of this can be done once more, if it is interrupted


def attach(module: nn.Module, mixin: type, model_state) -> None:
    """Make `module` a patched one, in place. Its class's forward gives way; an instance-level forward is called."""
    original = type(module)
    state = LayerState(model_state, original, module.__dict__.get("forward"))
    try:
        module.__dict__["_fastpeft"] = state
        module.__class__ = patched_class(mixin, original)
        state.original_forward = take_forward(module, original)
        module.add_containers()
    except BaseException:
        detach(module)
        raise


def attached(model: nn.Module) -> list[nn.Module]:
    """The patched modules of a model, among them those whose patching, or whose restoring, was interrupted."""
    return [module for module in model.modules() if isinstance(module.__dict__.get("_fastpeft"), LayerState)]


def detach(module: nn.Module) -> None:
    """Undo `attach`, as far as it went: children, tensors, class and instance-level forward are what they were, bit
    for bit."""
    state: LayerState | None = module.__dict__.get("_fastpeft")
    if state is not None and isinstance(module, AdapterLayer):
        module.unmerge()
        for name in module.containers:
            module._modules.pop(name, None)
        module.give_back()
        give_back_forward(module, state.original_class, state.original_forward)
    module.__dict__.pop("_fastpeft", None)
