"""The verbs of a patched model: save, load, add, set, delete, disable, merge, count."""

import contextlib
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from fastpeft import files
from fastpeft.configs import as_config
from fastpeft.errors import PatchError
from fastpeft.mapping import tuner_of
from fastpeft.patching import (
    activate,
    add_planned,
    begin,
    check_model,
    layers,
    restore,
    state_of,
    unpatch,
)
from fastpeft.selection import override
from fastpeft.state import PREFIX, adapter_state_dict, check_tensors, fill, only_adapter
from fastpeft.tuners.saved_modules import SavedModule


def save_adapter(model: nn.Module, directory: str | Path, *, adapter_name: str | None = None) -> None:
    """Write one adapter as HF peft does: `adapter_model.safetensors` and `adapter_config.json`, each replaced
    atomically, in `directory` for the adapter "default" or the only one, else in `directory/adapter_name`.

    Raises PatchError if the model is not patched or the name is not an adapter's, AdapterFileError if it cannot be
    written; the adapter that was there is then intact.
    """
    state = state_of(model)
    name = only_adapter(state, adapter_name)
    target = directory if len(state.configs) == 1 else files.adapter_directory(directory, name)
    config = state.configs[name]
    original = state.original_class
    mapping = {"base_model_class": original.__name__, "parent_library": original.__module__}
    side = {"format": 1, "hf_quirks": state.hf_quirks}
    written = config.to_file_dict(None if config.task_type else mapping)
    files.write_adapter(target, adapter_state_dict(model, name), written, side)


def save_all(model: nn.Module, directory, selected_adapters=None, push_to_hub: bool = False, **_) -> None:
    """`save_pretrained` of a patched model: all adapters, or the selected ones."""
    if push_to_hub:
        raise PatchError("save_pretrained: push_to_hub is not done here; upload the written directory")
    state = state_of(model)
    for name in selected_adapters or state.configs:
        save_adapter(model, directory, adapter_name=name)


def load_adapter(
    model: nn.Module,
    directory: str | Path,
    *,
    adapter_name: str = "default",
    trainable: bool = False,
    autocast_adapter_dtype: bool = True,
    hf_quirks: bool | None = None,
) -> nn.Module:
    """Load an adapter that fastpeft or HF peft wrote. A plain model is patched and uses it; in a patched model it
    waits for `set_adapter`.

    Args:
        model: the base model, plain or patched.
        directory: local; nothing is ever fetched.
        adapter_name: what the adapter is called from now on.
        trainable: whether it can be trained further; otherwise the model is also put into eval mode, as peft does.
        autocast_adapter_dtype: a half-precision adapter becomes fp32.
        hf_quirks: None takes what the directory says, and True for one that HF wrote.

    Returns:
        The model.

    Raises:
        AdapterFileError: a file is missing, damaged or hostile, or its tensors do not fit; ConfigError, TargetError,
        PatchError as `patch`. The model is then as it was.
    """
    files.adapter_directory(directory, adapter_name)
    patched = "_fastpeft" in getattr(model, "__dict__", {})
    if not patched:
        check_model(model)
    elif adapter_name in state_of(model).configs:
        raise PatchError(f"load_adapter: there is already an adapter {adapter_name!r}; choose another adapter_name")
    planned = []

    def validate(raw_config, header) -> None:
        config = as_config(raw_config)
        config.inference_mode = not trainable
        plan = tuner_of(config.peft_type).plan(model, config)
        _check_header(model, plan, header, str(directory))
        planned.append(plan)

    found = files.read_adapter(directory, validate)
    if hf_quirks is None:
        hf_quirks = True if found.side is None else bool(found.side.get("hf_quirks", False))
    state = state_of(model) if patched else begin(model, None, autocast_adapter_dtype, hf_quirks)
    try:
        add_planned(model, state, planned[-1], adapter_name, init=False)
        fill(model, adapter_name, found.tensors)
        if not patched:
            activate(model, state, (adapter_name,))
    except BaseException:
        if patched:
            _remove(model, state, adapter_name)
        else:
            unpatch(model)
        raise
    if not trainable:
        model.eval()
    return model


def _check_header(model: nn.Module, plan, header, where: str) -> None:
    expected = {f"{PREFIX}{name}": shape for name, shape in plan.shapes().items()}
    optional = {}
    targeted = {target.name: target.module for target, _, _ in plan.targets}
    for name, module in targeted.items():
        if name.rpartition(".")[2] in ("embed_tokens", "lm_head"):
            optional[f"{PREFIX}{name}.base_layer.weight"] = module.weight.shape
    for name, parameter in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        inner = "base_layer." if path in targeted else ""
        key = f"{PREFIX}{path}.{inner}{leaf}"
        if plan.config.bias == "all" and "bias" in name or plan.config.bias == "lora_only" and inner and leaf == "bias":
            optional[key] = parameter.shape
    check_tensors(expected, optional, {key: info.shape for key, info in header.items()}, where)


def add_adapter(model: nn.Module, adapter_name: str, config: Any) -> None:
    """Add a new, initialised adapter to a patched model; it waits for `set_adapter`."""
    state = state_of(model)
    files.adapter_directory("", adapter_name)
    if adapter_name in state.configs:
        raise PatchError(f"add_adapter: there is already an adapter {adapter_name!r}; choose another name")
    config = as_config(config)
    plan = tuner_of(config.peft_type).plan(model, config)
    try:
        add_planned(model, state, plan, adapter_name, init=True)
    except BaseException:
        _remove(model, state, adapter_name)
        raise


def set_adapter(model: nn.Module, name_or_names: str | list[str]) -> None:
    """Make one adapter, or several added up, the one that every call uses and that trains."""
    names = (name_or_names,) if isinstance(name_or_names, str) else tuple(name_or_names)
    activate(model, state_of(model), names)


def delete_adapter(model: nn.Module, name: str) -> None:
    """Remove an adapter. If it was the only active one, the first that is left becomes active, with a warning.

    Raises PatchError if there is no such adapter, or it is merged.
    """
    state = state_of(model)
    only_adapter(state, name)
    if name in state.merged:
        raise PatchError(f"delete_adapter: {name!r} is merged into the base weights; unmerge first")
    _remove(model, state, name)
    remaining = tuple(other for other in state.active if other != name)
    if name in state.active and not remaining and state.configs:
        remaining = (next(iter(state.configs)),)
        warnings.warn(f"adapter {name!r} was active and is deleted; {remaining[0]!r} is active now", stacklevel=2)
    activate(model, state, remaining)


def _remove(model: nn.Module, state, name: str) -> None:
    for _, layer in layers(model):
        if name in layer._fastpeft.adapters:
            layer.delete_adapter(name)
    state.configs.pop(name, None)


@contextlib.contextmanager
def use_adapter(model: nn.Module, name: str | list[str]):
    """Inside, this thread's calls use this adapter (or these, added up), whatever `set_adapter` says."""
    state = state_of(model)
    names = (name,) if isinstance(name, str) else tuple(name)
    for one in names:
        only_adapter(state, one)
    with override(state, names):
        yield model


@contextlib.contextmanager
def disable_adapter(model: nn.Module):
    """Inside, this thread's calls compute the base model. A merged adapter is taken out and put back in the end."""
    state = state_of(model)
    if any(state.configs[name].bias != "none" for name in state.active):
        warnings.warn("the adapter trains biases of the base model, which stay as trained inside", stacklevel=3)
    merged = state.merged
    if merged:
        unmerge(model)
    try:
        with override(state, ()):
            yield model
    finally:
        if merged:
            merge(model)


def merge(model: nn.Module) -> None:
    """Add the active adapters to the base weights; what was there is kept for `unmerge`. Merging twice changes
    nothing. Raises PatchError, with the weights untouched, if the result would not be finite."""
    state = state_of(model)
    if state.merged:
        warnings.warn("already merged; unmerge first to merge another choice", stacklevel=2)
        return
    mergeable = [(path, layer) for path, layer in layers(model) if not isinstance(layer, SavedModule)]
    prepared = [(layer, layer.prepare_merge(state.active)) for _, layer in mergeable]
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    for layer, ready in prepared:
        if ready is not None:
            layer.merge(ready, untie=owners[id(layer.weight)] > 1)
    state.merged = state.active


def unmerge(model: nn.Module) -> None:
    """Restore the base weights that `merge` changed, bit for bit."""
    state = state_of(model)
    for _, layer in layers(model):
        layer.unmerge()
    state.merged = ()


def merge_and_unload(model: nn.Module) -> nn.Module:
    """The plain model with the active adapters in its weights, and with the trained copies in place of the modules
    that they were made of. The parameters stay frozen, as in peft. Returns the same object."""
    state = state_of(model)
    if not state.merged:
        merge(model)
    for path, layer in list(layers(model)):
        names = [name for name in state.active if name in layer._fastpeft.adapters]
        if isinstance(layer, SavedModule) and names:
            parent, _, leaf = path.rpartition(".")
            model.get_submodule(parent)._modules[leaf] = layer.modules_to_save[names[-1]]
    restore(model, state, keep_weights=True)
    return model


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters, counted as peft counts them: packed 4-bit parameters by the numbers they hold."""
    trainable = total = 0
    for parameter in model.parameters():
        count = parameter.numel()
        if type(parameter).__name__ == "Params4bit":
            count *= 2 * parameter.quant_storage.itemsize if hasattr(parameter, "quant_storage") else 2
        total += count
        trainable += count if parameter.requires_grad else 0
    return trainable, total


def print_trainable_parameters(model: nn.Module) -> None:
    """peft's line, character for character."""
    trainable, total = count_parameters(model)
    print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}")
