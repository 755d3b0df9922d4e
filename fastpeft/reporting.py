"""`report`: what is patched, which op serves it on which backend, and why."""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn

from fastpeft.dispatch import choose_backend, lora_linear_plan
from fastpeft.errors import BackendError
from fastpeft.patching import layers, state_of
from fastpeft.tuners.lora import LoraLinear


@dataclass(frozen=True)
class LayerReport:
    """One patched layer."""

    path: str
    kind: str
    adapters: tuple[str, ...]
    op: str
    backend: str
    reason: str


@dataclass(frozen=True)
class Report:
    """All patched layers; printed, it is a summary with one line for each kind of service."""

    layers: tuple[LayerReport, ...]
    active: tuple[str, ...]
    merged: tuple[str, ...]

    def __str__(self) -> str:
        head = f"{len(self.layers)} layers patched; active: {', '.join(self.active) or 'none'}"
        if self.merged:
            head += f"; merged: {', '.join(self.merged)}"
        groups = Counter((layer.kind, layer.op, layer.backend, layer.reason) for layer in self.layers)
        lines = [f"  {n:4d} x {kind}: {op} on {on} ({why})" for (kind, op, on, why), n in groups.items()]
        return "\n".join([head, *lines])


def report(model: nn.Module) -> Report:
    """What `patch` did to this model and what will run. Raises PatchError if it is not patched."""
    state = state_of(model)
    rows = tuple(_layer_report(path, layer) for path, layer in layers(model))
    return Report(rows, state.active, state.merged)


def _layer_report(path: str, layer: nn.Module) -> LayerReport:
    names = tuple(layer._fastpeft.adapters)
    kind = type(layer).__name__
    if not isinstance(layer, LoraLinear):
        return LayerReport(path, kind, names, "torch modules", "torch", "no kernel serves this kind of module")
    rank = max(settings.r for settings in layer._fastpeft.adapters.values()) if names else 0
    weight = layer.weight
    try:
        choice = choose_backend(weight, weight.dtype, rank, layer._fastpeft.model.backend)
    except BackendError as error:
        return LayerReport(path, kind, names, "lora_linear", "none", str(error))
    reason = choice.reason
    if choice.backend == "triton":
        plan = lora_linear_plan(torch.empty(4096, 0, device=weight.device))
        reason += f"; {plan.forward} forward, {plan.backward} backward, {plan.source}"
    if not layer.plain_base():
        reason += "; the base product is its own class's"
    return LayerReport(path, kind, names, "lora_linear", choice.backend, reason)
