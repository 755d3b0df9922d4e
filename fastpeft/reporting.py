"""`report`: what is patched, which op serves it on which backend, and why."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from fastpeft import tables
from fastpeft.dispatch import choose_backend, lora_linear_plan_for, requested_backend
from fastpeft.errors import BackendError
from fastpeft.fallback import kernel_failures
from fastpeft.patching import layers, state_of
from fastpeft.preconditions import adapted_by_peft
from fastpeft.quantised import stand_in
from fastpeft.table_file import PrefixBucket
from fastpeft.tuners.attention_layer import AdaptedAttention, Slice
from fastpeft.tuners.experts import LoraExperts
from fastpeft.tuners.layer import Companion
from fastpeft.tuners.lora import LoraLinear
from fastpeft.tuners.lora_parameters import LoraParameters
from fastpeft.tuners.mlp import words_by_path
from fastpeft.tuners.prefix_encoder import PromptEncoders
from fastpeft.tuners.prompt_layer import PromptedEmbedding
from fastpeft.tuners.siblings import in_words

ROWS = 4096
LEFT = "peft's own forward"  # in place of an op, of a layer of peft's that was left as it was
HEAD_DIMENSIONS = ("head_dim", "attention_head_size", "key_value_proj_dim")


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
    failures: dict[str, str] = field(default_factory=kernel_failures)  # of kernels, in this process: `kernel_failures`

    def __str__(self) -> str:
        patched = sum(layer.op != LEFT for layer in self.layers)
        head = f"{patched} layers patched; active: {', '.join(self.active) or 'none'}"
        if self.merged:
            head += f"; merged: {', '.join(self.merged)}"
        groups = Counter((layer.kind, layer.op, layer.backend, layer.reason) for layer in self.layers)
        lines = [f"  {n:4d} x {kind}: {op} on {on} ({why})" for (kind, op, on, why), n in groups.items()]
        failed = [f"  kernels failed, torch computes: {call} ({why})" for call, why in self.failures.items()]
        return "\n".join([head, *lines, *failed])


def report(model: nn.Module) -> Report:
    """What `patch` did to this model and what will run; of a model that peft has adapted also what was left as it was,
    and why. Raises PatchError if it is not patched."""
    if adapted_by_peft(model):
        from fastpeft.integrations.peft import report_peft

        return report_peft(model)
    state = state_of(model)
    return Report(with_mlps(model, rows_of(model)), state.active, state.merged)


def rows_of(model: nn.Module) -> list[LayerReport]:
    """Of the layers that fastpeft's own adapters are in."""
    return [_layer_report(path, each) for path, each in layers(model) if _computes(each)]


def with_mlps(model: nn.Module, rows: Iterable[LayerReport]) -> tuple[LayerReport, ...]:
    """The rows, saying of projections if their MLP is one op."""
    words = words_by_path(model)
    return tuple(row if row.op == LEFT else replace(row, reason=row.reason + words.get(row.path, "")) for row in rows)


def _computes(layer: nn.Module) -> bool:
    """Whether a layer computes anything of its own."""
    return isinstance(layer, PromptedEmbedding) or not isinstance(layer, Companion | PromptEncoders)


def _layer_report(path: str, layer: nn.Module) -> LayerReport:
    names = tuple(layer._fastpeft.adapters)
    kind = type(layer).__name__
    if isinstance(layer, AdaptedAttention) and layer.carries():
        return _attention_report(path, kind, names, layer)
    if isinstance(layer, PromptedEmbedding):
        return _embedding_report(path, kind, names, layer)
    if isinstance(layer, LoraParameters):
        return LayerReport(path, kind, names, *_parameters_report(layer))
    if not isinstance(layer, LoraLinear):
        return LayerReport(path, kind, names, "torch modules", "torch", "no kernel serves this kind of module")
    weight, plain = stand_in(layer), layer.plain_base()
    op = "dora_linear" if plain and any(each.use_dora for each in layer._fastpeft.adapters.values()) else "lora_linear"
    try:
        choice = choose_backend(weight, weight.dtype, patched=layer._fastpeft.model.backend)
    except BackendError as error:
        return LayerReport(path, kind, names, op, "none", str(error))
    reason = choice.reason
    if choice.backend == "triton":
        reason += _strategies(layer, weight)
    if not plain:
        reason += "; the base product is its own class's"
    return LayerReport(path, kind, names, op, choice.backend, reason + in_words(layer))


def experts_service(experts: nn.Module, rank: int, patched: str | None) -> tuple[str, str]:
    """(backend, reason) of the products of experts of transformers."""
    if requested_backend(patched) != "triton":
        return "torch", "each expert on its own tokens; Triton where it is demanded"
    try:
        choice = choose_backend(experts.down_proj, experts.down_proj.dtype, rank, patched)
    except BackendError as error:
        return "none", str(error)
    return choice.backend, choice.reason


def _parameters_report(layer: LoraParameters) -> tuple[str, str, str]:
    """(op, backend, reason)."""
    if isinstance(layer, LoraExperts):
        ranks = [each.r for held in layer._fastpeft.adapters.values() for each in held.each.values()]
        return "expert_lora_linear", *experts_service(layer, max(ranks), layer._fastpeft.model.backend)
    return "adapted parameters", "torch", "its forward is not known, so every call adds the update to the weight"


def _embedding_report(path: str, kind: str, names: tuple[str, ...], layer: PromptedEmbedding) -> LayerReport:
    """Of tokens with a prompt in front."""
    op, weight = "prompt_embedding" if layer.looks_up_only() else "prepend_prompt", layer.weight
    try:
        choice = choose_backend(weight, weight.dtype, patched=layer._fastpeft.model.backend)
    except BackendError as error:
        return LayerReport(path, kind, names, op, "none", str(error))
    return LayerReport(path, kind, names, op, choice.backend, choice.reason)


def _strategies(layer: LoraLinear, weight: torch.Tensor) -> str:
    """Which a step of training over ROWS tokens gets, adapter by adapter, and from where that is known."""
    plans = []
    for name, settings in layer._fastpeft.adapters.items():
        a, b = layer.factors(name)
        dtype = torch.promote_types(a.dtype, weight.dtype)
        sizes = (ROWS, a.shape[1], len(b), settings.r)
        plans.append(lora_linear_plan_for(weight.device, weight.dtype, dtype, sizes, settings.dropout))
    found = dict.fromkeys(f"; {p.forward} forward, {p.backward} backward at {ROWS} rows, {p.source}" for p in plans)
    return "".join(found)


def _attention_report(path: str, kind: str, names: tuple[str, ...], layer: AdaptedAttention) -> LayerReport:
    """Of attention over virtual tokens. Which of the kernels' strategies a call gets depends on its lengths and masks,
    so only the backend is said."""
    has_prefix = any(isinstance(entry, Slice) for entry in layer._fastpeft.adapters.values())
    op = "prefix_attention" if has_prefix else "gated_prompt_attention"
    weight = next(parameter for parameter in layer.parameters() if parameter.ndim == 2)
    depth = next((getattr(layer, each) for each in HEAD_DIMENSIONS if hasattr(layer, each)), 0)
    try:
        choice = choose_backend(weight, weight.dtype, depth, layer._fastpeft.model.backend, "head dimension")
    except BackendError as error:
        return LayerReport(path, kind, names, op, "none", str(error))
    reason = choice.reason
    if choice.backend == "triton" and op == "prefix_attention":
        reason += f"; strategies by a call's lengths and masks: {_sources(weight.device)}"
    return LayerReport(path, kind, names, op, choice.backend, reason)


def _sources(device: torch.device) -> str:
    plans = tables.measured(device) if device.type == "cuda" else {}
    sources = dict.fromkeys(plan.source for bucket, plan in plans.items() if isinstance(bucket, PrefixBucket))
    return "; ".join([*sources, "else predicted"]) if sources else "predicted"
