"""`patch`, `unpatch` and `report` of a model that peft has adapted."""

from collections.abc import Iterator

import torch
from torch import nn

from fastpeft.dispatch import choose_backend
from fastpeft.errors import BackendError, PatchError
from fastpeft.integrations.peft.adalora_checkpoints import ResumingAdaLora
from fastpeft.integrations.peft.experts import FusedExperts
from fastpeft.integrations.peft.gated import swap_adaption
from fastpeft.integrations.peft.layers import FUSED, FusedLayer
from fastpeft.integrations.peft.prompts import swap_prompts
from fastpeft.integrations.peft.swapping import KEY, Extension, Swapped, full_name, swap, swap_back
from fastpeft.integrations.peft.tuners import TUNERS, SwappingAdaLora, SwappingModel, swap_layers
from fastpeft.neighbours import check_neighbours, check_peft_s_head
from fastpeft.reporting import LEFT, LayerReport, Report, experts_service, rows_of, with_mlps
from fastpeft.tuners.fusions import part_all
from fastpeft.tuners.siblings import in_words

ADAPTION = "peft.tuners.adaption_prompt.model.AdaptionPromptModel"


def is_swapped(model: nn.Module) -> bool:
    """Whether `patch_peft` has been here."""
    return any(KEY in module.__dict__ for module in model.modules())


def patch_peft(model: nn.Module, backend: str | None = None) -> nn.Module:
    """Take over the arithmetic of a model that peft has adapted, in place; returns the same object.

    Args:
        model: a `peft.PeftModel` (or PeftMixedModel, or a transformers model with adapters of its own method
            `add_adapter`), with adapters of any number.
        backend: as in `fastpeft.patch`.

    Raises:
        PatchError: it is patched already, or another library's functions would pass an adapter by. BackendError:
        "triton" is demanded and cannot serve the model where it is. The model is then as it was.
    """
    if is_swapped(model):
        raise PatchError(f"patch: this {type(model).__name__} is patched already; fastpeft.unpatch(model) first")
    if backend == "triton":
        parameter = next(model.parameters())
        choose_backend(torch.empty(0, device=parameter.device), torch.float32, patched=backend)
    check_neighbours(model)
    check_peft_s_head(_base_of(model))
    extension = Extension(backend)
    try:
        _swap_all(model, extension)
    except BaseException:
        _swap_all_back(model)
        raise
    return model


def _base_of(model: nn.Module) -> nn.Module:
    """What peft has adapted. Raises PatchError if no adapter is in force, of which peft itself says KeyError."""
    if not hasattr(model, "get_base_model"):
        return model
    active = model.active_adapter
    if not set([active] if isinstance(active, str) else active) & model.peft_config.keys():
        raise PatchError(
            f"patch: no adapter is in force in this {type(model).__name__}, and peft cannot call it; add one with "
            "model.add_adapter(name, config) or choose one with model.set_adapter(name) first"
        )
    return model.get_base_model()


def _swap_all(model: nn.Module, extension: Extension) -> None:
    swap_layers(model, extension)
    for module in list(model.modules()):
        kind = full_name(type(module))
        if kind in TUNERS:
            swap(module, TUNERS[kind], extension)
        elif kind == ADAPTION:
            swap_adaption(module, Extension(extension.backend))
        elif "prompt_encoder" in module._modules and getattr(module, "_is_prompt_learning", False):
            own = module.__dict__[KEY] = Extension(extension.backend)
            swap_prompts(module, own)
        elif getattr(module, "_hf_peft_config_loaded", False) and not isinstance(module, Swapped):
            swap(module, SwappingModel, extension)
    if isinstance(model._modules.get("base_model"), SwappingAdaLora):
        swap(model, ResumingAdaLora, extension)
    model.__dict__.setdefault(KEY, extension)


def unpatch_peft(model: nn.Module) -> nn.Module:
    """Give the arithmetic back to peft: classes and hooks are what they were; adapters, and what they have learned,
    stay. Returns the same object. Raises PatchError if it is not patched."""
    if not is_swapped(model):
        raise PatchError(f"unpatch: this {type(model).__name__} is peft's own as it is; fastpeft.patch(model) first")
    if any(isinstance(module, Swapped) and getattr(module, "_adapters_disabled", False) for module in model.modules()):
        raise PatchError("unpatch: an adapter is disabled by a block that goes on; leave the block first")
    return _swap_all_back(model)


def _swap_all_back(model: nn.Module) -> nn.Module:
    part_all(model)
    for module in list(model.modules()):
        if isinstance(module, Swapped):
            if hasattr(module, "swapped_back"):
                module.swapped_back()
            swap_back(module)
        module.__dict__.pop(KEY, None)
    return model


def report_peft(model: nn.Module) -> Report:
    """Every layer of peft's in the model: what serves it, or why it was left to peft. Raises PatchError if the model is
    not patched."""
    if not is_swapped(model):
        raise PatchError(f"report: this {type(model).__name__} is not patched; call fastpeft.patch(model) first")
    rows = with_mlps(model, _rows(model))
    active = getattr(model, "active_adapters", ())
    if callable(active):  # of a transformers model
        active = active() if getattr(model, "peft_config", None) else ()
    return Report(rows, tuple(active), tuple(dict.fromkeys(_merged(model))))


def _merged(model: nn.Module) -> Iterator[str]:
    for module in model.modules():
        yield from getattr(module, "merged_adapters", ())


def _rows(model: nn.Module) -> Iterator[LayerReport]:
    seen = set()
    for path, module in model.named_modules():
        kind = full_name(type(module))
        if isinstance(module, FusedLayer):
            yield from _layer_rows(path, module)
        elif isinstance(module, FusedExperts):
            yield _experts_row(path, module)
        elif hasattr(module, "base_layer") and _is_of_peft(type(module)):
            why = _why_left(module, kind)
            yield LayerReport(path, type(module).__name__, tuple(module._get_available_adapters()), LEFT, "torch", why)
        extension = module.__dict__.get(KEY)
        if extension is not None and id(extension) not in seen:
            seen.add(id(extension))
            for name, why in extension.left.items():
                yield LayerReport(path, type(module).__name__, (name,), LEFT, "torch", why)
    yield from rows_of(model)


def _is_of_peft(kind: type) -> bool:
    return any(each.__module__.startswith("peft.") for each in kind.__mro__)


def _why_left(module: nn.Module, kind: str) -> str:
    if kind in FUSED:
        return "its forward was replaced by somebody"
    return "no kernel serves this kind of layer"


def _experts_row(path: str, layer: FusedExperts) -> LayerReport:
    kind, names, why = type(layer).__name__, tuple(layer.lora_A), layer.why_not()
    if why is not None:
        return LayerReport(path, kind, names, LEFT, "torch", why)
    base, rank = layer.get_base_layer(), max(layer.r.values())
    return LayerReport(path, kind, names, layer.op, *experts_service(base, rank, layer.extension.backend))


def _layer_rows(path: str, layer: FusedLayer) -> Iterator[LayerReport]:
    kind, reasons = type(layer).__name__, layer.reasons()
    for name, why in reasons.items():
        yield LayerReport(path, kind, (name,), LEFT, "torch", why)
    names = tuple(name for name in layer.lora_A if name not in reasons)
    if not names:
        return
    a = layer.factors(names[0])[0]
    plain = layer.plain_base()
    op = "dora_linear" if plain and any(layer.settings(name).use_dora for name in names) else layer.op
    dtype = layer.base_layer.weight.dtype if plain else a.dtype
    try:
        choice = choose_backend(a, dtype, patched=layer.backend())
    except BackendError as error:
        yield LayerReport(path, kind, names, op, "none", str(error))
        return
    reason = choice.reason if plain else f"{choice.reason}; the base product is its own class's"
    yield LayerReport(path, kind, names, op, choice.backend, reason + in_words(layer))
