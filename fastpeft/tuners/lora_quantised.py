"""LoRA on the quantised linear layers that `fastpeft.quantised` knows: their own forward gives the base product, and
their own library the dense weight where one is needed."""

import functools
import warnings

import torch
from torch import nn
from torch.nn import functional as F

from fastpeft import quantised
from fastpeft.configs import LoraConfig
from fastpeft.errors import PatchError, TargetError
from fastpeft.quantised import FrozenProduct
from fastpeft.tuners.layer import offloaded_to
from fastpeft.tuners.lora import LoraLinear, Settings, linear_shapes

SWAPPED = "quantised"  # among what a layer keeps: its attributes as they were


class Swap:
    """Attributes of a module as they were before others took their place."""

    def __init__(self, module: nn.Module, attributes: dict):
        self.module = module
        self.before = {name: getattr(module, name) for name in attributes}
        for name, value in attributes.items():
            setattr(module, name, value)

    def undo(self) -> None:
        """Put them back, where the module is now."""
        for name, value in self.before.items():
            now = getattr(self.module, name)
            if isinstance(value, torch.Tensor) and isinstance(now, torch.Tensor) and value.device != now.device:
                moved = value.to(now.device)
                keeps = isinstance(moved, nn.Parameter) or not isinstance(value, nn.Parameter)
                value = moved if keeps else nn.Parameter(moved, value.requires_grad)
            setattr(self.module, name, value)


class QuantisedLora(LoraLinear):
    """LoRA on a quantised linear layer of another library."""

    @staticmethod
    def shapes(base: nn.Module, settings: Settings) -> dict[str, tuple[int, ...]]:
        return linear_shapes(*quantised.features(base), settings)

    def width(self) -> tuple[int, int]:
        return quantised.features(self)

    def matrix(self) -> torch.Tensor:
        """The dense weight, made for this call."""
        return quantised.dense_weight(self)

    def placement(self) -> dict:
        base = quantised.storage(self)
        device = offloaded_to(self) if base.is_meta else base.device
        return {"device": device, "dtype": quantised.adapter_dtype(self)}

    def base_bias(self) -> torch.Tensor | None:
        return getattr(self, "bias", None)

    def plain_base(self) -> bool:
        return False

    def is_dense(self) -> bool:
        return False

    def has_own_product(self) -> bool:
        return self._fastpeft.original_forward is None

    def base_forward(self, *args, **kwargs):
        return quantised.call(self, super().base_forward, *args, **kwargs)

    def product(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return FrozenProduct.apply(x, None, self.matrix, lambda x: F.linear(x, weight.to(x.dtype)))

    def leave(self, rest: torch.Tensor) -> None:
        swap = Swap(self, quantised.entry_of(self).requantised(self, rest))
        kept, undo = self._fastpeft.kept, self._fastpeft.model.undo
        if undo is not None:
            if SWAPPED not in kept:
                undo.append(functools.partial(kept.pop, SWAPPED, None))
            undo.append(swap.undo)
        kept.setdefault(SWAPPED, swap)

    def give_back(self) -> None:
        if (swap := self._fastpeft.kept.get(SWAPPED)) is not None:
            swap.undo()
            del self._fastpeft.kept[SWAPPED]
        super().give_back()

    def prepare_merge(self, names) -> tuple[dict, torch.Tensor | None] | None:
        names = [name for name in names if name in self._fastpeft.adapters]
        if not names:
            return None
        entry, kind = quantised.entry_of(self), self._fastpeft.original_class.__name__
        if entry.requantised is None:
            raise PatchError(
                f"nothing can be merged into a {kind}: {entry.library} does not say how to quantise it again. Use the "
                "adapter unmerged, or merge it into the model before quantisation"
            )
        if quantised.storage(self).is_meta:
            raise PatchError("its weight is offloaded by accelerate; load the model without offloading to merge")
        return entry.requantised(self, self.merged_weight(names)), self.merged_bias(names)

    def merge(self, prepared, untie: bool) -> None:
        """Put the prepared attributes in place; those that were there are kept as they are, and not a copy of them."""
        attributes, bias = prepared
        library = quantised.entry_of(self).library
        warnings.warn(
            f"merging rounds {library}'s quantised weights once more: outputs differ from the adapter's unmerged",
            stacklevel=2,
        )
        super().merge((None, bias), untie)
        if untie and "weight" in self._parameters:
            self._fastpeft.unmerged["weight"] = self.weight
        self._fastpeft.unmerged[SWAPPED] = Swap(self, attributes)

    def unmerge(self) -> None:
        if (swap := self._fastpeft.unmerged.get(SWAPPED)) is not None:
            swap.undo()
            del self._fastpeft.unmerged[SWAPPED]
        super().unmerge()


def check_quantised(name: str, module: nn.Module, config: LoraConfig) -> None:
    """Refuse what a quantised layer cannot carry. Raises TargetError."""
    entry, kind = quantised.entry_of(module), type(module).__name__
    if (refusal := entry.refusal(module)) is not None:
        raise TargetError(f"{name}, a {kind} of {entry.library}, {refusal}")
    init = config.init_lora_weights
    if isinstance(init, str) and init.startswith("pissa"):
        raise TargetError(
            f"init_lora_weights={init!r} decomposes a floating-point weight, and {name} is a quantised {kind}; "
            "decompose first and quantise what is left, or choose another init_lora_weights"
        )
    if init == "olora" and entry.requantised is None:
        raise TargetError(
            f"init_lora_weights='olora' changes the weight of {name}, and {entry.library} does not say how to quantise "
            f"a {kind} again; choose another init_lora_weights"
        )
    if config.use_dora and entry.dense is None:
        raise TargetError(
            f"use_dora=True needs the dense weight of {name}, and {entry.library} does not say how to make that of a "
            f"{kind}; set use_dora=False, or exclude the module with exclude_modules"
        )
