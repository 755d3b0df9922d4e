"""A whole model with LoRA: logits and adapter gradients computed by fastpeft's op, by the plain formula in the same
dtypes, by the plain formula in float64, and by HF peft, from the same weights and the same dropout masks."""

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
from torch import nn

from fastpeft.check_batches import Batch
from fastpeft.check_model import Outcome
from fastpeft.check_model import outcome as outcome_of
from fastpeft.errors import FastpeftError
from fastpeft.ops import lora_linear_reference
from fastpeft.oracle import LoraProblem, op_dropout
from fastpeft.patching import layers
from fastpeft.tuners.lora import LoraLinear

Masks = list[tuple[torch.Tensor | None, float]]  # of the layers in the order in which they are called: (keep, p)


def lora_layers(model: nn.Module) -> list[tuple[str, LoraLinear]]:
    """(path, layer) of every layer that the op serves. Raises FastpeftError if one has no dense weight."""
    found = [(path, layer) for path, layer in layers(model) if isinstance(layer, LoraLinear)]
    for path, layer in found:
        if not layer.plain_base():
            kind = type(layer).__mro__[2].__name__
            raise FastpeftError(f"check: {path} is a {kind}; only layers with a dense weight of their own are checked")
    return found


def randomize(model: nn.Module, seed: int) -> None:
    """Give every lora_B random values such that the adapter's share has half the deviation of the base's."""
    generator = torch.Generator().manual_seed(seed)
    for _, layer in lora_layers(model):
        for name, settings in layer._fastpeft.adapters.items():
            _, b = layer.factors(name)
            weight = layer.matrix().detach()
            base = float(weight.double().norm()) / math.sqrt(len(weight))  # deviation of W x for x of unit variance
            deviation = 0.5 * base * math.sqrt(3 / settings.r) / settings.scaling  # A is uniform with variance 1/(3 K)
            with torch.no_grad():
                b.copy_(torch.randn(b.shape, generator=generator) * deviation)


def outcome(model: nn.Module, batch: Batch, prefix: str = "") -> Outcome:
    """Logits and adapter gradients of a model whose parameters' names begin with `prefix`."""
    named = {n.removeprefix(prefix): p for n, p in model.named_parameters() if p.requires_grad and ".lora_" in n}
    return outcome_of(model, batch, named)


def _reference_forward(layer: LoraLinear, mask_of: Callable):
    """The layer's forward in the plain formula."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        (name,) = layer.active_adapters()
        a, b = layer.factors(name)
        scaling = layer._fastpeft.adapters[name].scaling
        keep, p = mask_of(layer, x, a)
        return lora_linear_reference(x, layer.matrix(), layer.bias, a, b, scaling, keep, p)

    return forward


@contextlib.contextmanager
def _plain(model: nn.Module, mask_of: Callable) -> Iterator[None]:
    """Within the block the model's LoRA layers compute the plain formula: a forward on each instance, then gone."""
    found = lora_layers(model)
    for _, layer in found:
        layer.forward = _reference_forward(layer, mask_of)
    try:
        yield
    finally:
        for _, layer in found:
            del layer.forward


def eager(model: nn.Module, batch: Batch, dropout: float, seed: int) -> tuple[Outcome, Masks]:
    """The plain formula in the model's dtypes, with the masks that the ops draw under this seed."""
    masks: Masks = []

    def draw(layer, x, a):
        masks.append(op_dropout(LoraProblem(x, layer.weight, None, a, a, x, dropout=dropout)))
        return masks[-1]

    torch.manual_seed(seed)
    with _plain(model, draw):
        return outcome(model, batch), masks


def truth(model: nn.Module, batch: Batch, masks: Masks) -> Outcome:
    """The plain formula with these masks, in the dtype of `model`: float64 where that matters."""
    remaining = iter(masks)
    with _plain(model, lambda layer, x, a: next(remaining)):
        return outcome(model, batch)


def fused(model: nn.Module, batch: Batch, seed: int) -> Outcome:
    """fastpeft's ops, on the backend in force."""
    torch.manual_seed(seed)
    return outcome(model, batch)


class FixedDropout(nn.Module):
    """Drops by given masks, one for each call."""

    def __init__(self, masks):
        super().__init__()
        self.masks = masks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        keep, p = next(self.masks)
        return x if keep is None else x * keep.view(x.shape) / (1 - p)


def hf_peft(model: nn.Module, batch: Batch, masks: Masks) -> Outcome:
    """HF peft's forward and backward of a PeftModel, with these masks."""
    remaining = iter(masks)
    for module in model.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = FixedDropout(remaining)
    return outcome(model, batch, "base_model.model.")
