"""How an object of peft's becomes one of ours and ceases to be one: its class is swapped, on the instance, for a
subclass of its own class under the same name. Parameters, children and paths stay what they are."""

import functools
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fastpeft.tuners.layer import accelerate_calls, give_back_forward, take_forward

KEY = "_fastpeft_extension"  # where a swapped module remembers its Extension


@dataclass
class Extension:
    """What the swapped modules of one model share.

    backend: as in `patch`. hooked: the PatchState of the base model, where a method lives in its attention or in front
    of its input; None for the others. left: adapter -> why it is left to peft's own forward as a whole.
    """

    backend: str | None
    hooked: Any = None
    left: dict[str, str] = field(default_factory=dict)


class Swapped:
    """Mixin in front of a class of peft's; `self.__dict__[KEY]` is the Extension."""

    swapped_by: type  # the mixin itself
    swapped_from: type  # the class that it stands in front of

    def __reduce_ex__(self, protocol):
        return _rebuild, (self.swapped_by, self.swapped_from), self.__dict__

    @property
    def extension(self) -> Extension:
        return self.__dict__[KEY]


@functools.cache
def swapped_class(mixin: type, original: type) -> type:
    """The subclass of `original` that `mixin` stands in front of, under the name of the original: peft and others read
    it."""
    namespace = {key: getattr(original, key) for key in ("__module__", "__qualname__", "__doc__")}
    namespace |= {"swapped_by": mixin, "swapped_from": original}
    if "forward" in vars(mixin):

        @functools.wraps(original.forward)  # whose arguments' names are asked for
        def forward(self, *args, **kwargs):
            return mixin.forward(self, *args, **kwargs)

        namespace["forward"] = forward
    return type(original.__name__, (mixin, original), namespace)


def _rebuild(mixin: type, original: type):
    cls = swapped_class(mixin, original)
    return cls.__new__(cls)


def swap(module: nn.Module, mixin: type, extension: Extension) -> bool:
    """Put `mixin` in front of the module's class; True. Where somebody has put another forward on the instance, the
    module stays as it is, and False is returned; accelerate's hooks, whose forward calls the class's, are no such."""
    original = type(module)
    if getattr(module.__dict__.get("forward"), "__func__", None) is original.forward:
        del module.__dict__["forward"]  # its own, which peft leaves there when a block has disabled a prompt
    if "forward" in module.__dict__ and not accelerate_calls(module, original):
        return False
    module.__dict__[KEY] = extension
    module.__class__ = swapped_class(mixin, original)
    take_forward(module, original)
    return True


def swap_back(module: nn.Module) -> None:
    """Undo `swap`, as far as it went."""
    give_back_forward(module, module.swapped_from, None)
    module.__dict__.pop(KEY, None)


def is_bare(module: nn.Module) -> bool:
    """Whether calling the module is its class's forward and nothing else, so that its parameters can be read without
    calling it: no hooks (of accelerate, of ZeRO-3, of a user), no forward on the instance."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not hooks and "forward" not in module.__dict__


def full_name(kind: type) -> str:
    """A class's module and name, for tables of classes that are not imported for their sake."""
    return f"{kind.__module__}.{kind.__qualname__}"
