"""The verbs of a patched model: save, load, add, set, delete, disable, merge, count."""

import contextlib
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastpeft import files
from fastpeft.arguments import check_flags, names_of
from fastpeft.base_names import read_for
from fastpeft.configs import as_config
from fastpeft.distributed import first_writes
from fastpeft.encoders import check_encoder, encoder_tensors, fill_encoder, forget_encoder
from fastpeft.errors import PatchError
from fastpeft.filling import check_names_and_shapes, check_replaced, config_of, fill, places_in_file
from fastpeft.in_place import is_bias, trains_biases
from fastpeft.mapping import tuner_of
from fastpeft.patching import (
    activate,
    add_planned,
    adding,
    beginning,
    check_names,
    check_plan,
    check_together,
    layers,
    remove_adapter,
    restore,
    state_of,
)
from fastpeft.preconditions import check_model
from fastpeft.selection import override
from fastpeft.state import adapter_state_dict, ends_of, only_adapter, whole_embeddings, whole_tensors
from fastpeft.tuners.layer import AdapterLayer
from fastpeft.tuners.saved_modules import SavedModule
from fastpeft.untrusted import shown


def save_adapter(
    model: nn.Module,
    directory: str | Path,
    *,
    adapter_name: str | None = None,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write one adapter as HF peft does: `adapter_model.safetensors` and `adapter_config.json`, each replaced
    atomically, in `directory` for the adapter "default" or the only one, else in `directory/adapter_name`.

    Of a model sharded by `fully_shard` the parameters are gathered: call it in every process, the first one writes.
    With `state_dict`, a whole state dict of the model in this process, nothing is gathered; a model sharded in another
    way needs that. Under DistributedDataParallel call it in one process.

    Raises PatchError if the model is not patched, the name is not an adapter's, or parameters cannot be gathered;
    AdapterFileError if it cannot be written; the adapter that was there is then intact.
    """
    state = state_of(model)
    name = only_adapter(state, adapter_name)
    alone = len(state.configs) == 1
    _write(model, name, directory if alone else files.adapter_directory(directory, name), state_dict)


def _write(
    model: nn.Module, name: str, target: str | Path, state_dict: dict[str, torch.Tensor] | None, embeddings=False
) -> None:
    state = state_of(model)
    config = state.configs[name]
    original = state.original_class
    mapping = {"base_model_class": original.__name__, "parent_library": original.__module__}
    side = {"format": 1, "hf_quirks": name in state.quirky}
    if options := config.side_values():
        side[files.OPTIONS] = options
    written = config.to_file_dict(None if config.task_type else mapping)
    with whole_tensors(model, name, state_dict) as mesh:
        tensors = {**(whole_embeddings(model, config) if embeddings else {}), **adapter_state_dict(model, name)}
        needs_all = getattr(tuner_of(config), "training_is_sharded", None)
        alone = state_dict is not None and needs_all is not None and needs_all(model, name)
        encoder = None if alone else encoder_tensors(model, name)
    if alone:
        warnings.warn(
            f"{name!r} is saved without the importances of AdaLoRA's schedule, which are sharded and in no state dict; "
            "call fastpeft.save_adapter(model, directory) in every process to have them saved",
            stacklevel=3,
        )
    if mesh is None:
        files.write_adapter(target, tensors, written, side, encoder)
    else:
        first_writes(mesh, lambda: files.write_adapter(target, tensors, written, side, encoder))


# Arguments of peft's methods that ask for something else than is done here: name -> (neutral values, advice).
_ADVICE = {
    "push_to_hub": ((False, None), "upload the written directory"),
    "safe_serialization": ((True, None), "adapters are written as safetensors only"),
    "save_embedding_layers": (("auto", None, True), "the base weights of targeted embeddings are always written"),
    "path_initial_model_for_weight_conversion": ((None,), "converting a PiSSA or OLoRA adapter is left to peft"),
}


def check_arguments(method: str, **given) -> None:
    """Raises PatchError if an argument of one of peft's methods asks for what is not done here."""
    for name, value in given.items():
        neutral, advice = _ADVICE.get(name, ((False, None), "leave it out"))
        if not any(value is each or value == each for each in neutral):
            raise PatchError(f"{method}: {name}={shown(value)} cannot be honoured; {advice}")


def save_all(model: nn.Module, directory, selected_adapters=None, state_dict=None, embeddings: bool = False) -> None:
    """`save_pretrained` of a patched model: all adapters, or the selected ones. As in peft, and unlike `save_adapter`,
    the only adapter too lies in a folder of its name, unless that is "default". `state_dict`: as in `save_adapter`."""
    state = state_of(model)
    names = tuple(state.configs) if selected_adapters is None else names_of(selected_adapters, "save_pretrained")
    check_names(state, names, "save_pretrained")
    for name in names:
        _write(model, name, files.adapter_directory(directory, name), state_dict, embeddings)


def load_adapter(
    model: nn.Module,
    directory: str | Path,
    *,
    adapter_name: str = "default",
    trainable: bool = False,
    autocast_adapter_dtype: bool = True,
    hf_quirks: bool | None = None,
    embeddings: bool = False,
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
        embeddings: whether the file may hold the input and output embeddings, as after the vocabulary was resized, and
            they take the place of the model's, of the same size, for all adapters, until this one is deleted.

    Returns:
        The model.

    Raises:
        AdapterFileError: a file is missing, damaged or hostile, or its tensors do not fit; ConfigError, TargetError,
        PatchError as `patch`. The model is then as it was.
    """
    files.adapter_directory(directory, adapter_name)
    flags = {"trainable": trainable, "autocast_adapter_dtype": autocast_adapter_dtype, "embeddings": embeddings}
    check_flags("load_adapter", **flags, **({} if hf_quirks is None else {"hf_quirks": hf_quirks}))
    patched = "_fastpeft" in getattr(model, "__dict__", {})
    if not patched:
        check_model(model)
    elif adapter_name in state_of(model).configs:
        raise PatchError(f"load_adapter: there is already an adapter {adapter_name!r}; choose another adapter_name")
    planned = []

    def validate(raw_config, header, side) -> None:
        config = config_of(raw_config, side)
        config.inference_mode = not trainable
        plan = tuner_of(config).plan(model, config)
        places = places_in_file(model, plan, embeddings)
        check_names_and_shapes(places, {key: each.shape for key, each in header.items()}, str(directory))
        check_plan(model, plan, state_of(model).backend if patched else None)
        planned.append((plan, places))

    found = read_for(model, directory, validate)
    hf_quirks = _quirks_of(found) if hf_quirks is None else hf_quirks
    begun = {"autocast": autocast_adapter_dtype, "hf_quirks": hf_quirks}
    with adding(model, adapter_name) if patched else beginning(model, None, **begun) as state:
        plan, places = planned[-1]
        check_encoder(plan.config, found)
        check_replaced(model, places, found.tensors, found.path)
        resumes = trainable and found.encoder is not None
        plan = plan.resuming() if resumes else plan
        options = {"autocast": autocast_adapter_dtype, "quirky": hf_quirks}
        add_planned(model, state, plan, adapter_name, init=False, **options)
        fill(model, adapter_name, places, plan.in_today_s_layout(found.tensors), found.path)
        if resumes:
            fill_encoder(model, adapter_name, found)
        elif found.encoder is not None:
            forget_encoder(model, adapter_name)
        if not patched:
            activate(model, state, (adapter_name,))
        if not trainable:
            model.eval()
    return model


def _quirks_of(found: files.AdapterFiles) -> bool:
    """Whether a directory's adapter computes as HF peft where that is wrong."""
    return True if found.side is None else found.side.get("hf_quirks", False)


def add_adapter(model: nn.Module, adapter_name: str, config: Any, *, autocast_adapter_dtype: bool = True) -> None:
    """Add a new, initialised adapter to a patched model; it waits for `set_adapter`."""
    state = state_of(model)
    check_flags("add_adapter", autocast_adapter_dtype=autocast_adapter_dtype)
    files.adapter_directory("", adapter_name)
    if adapter_name in state.configs:
        raise PatchError(f"add_adapter: there is already an adapter {adapter_name!r}; choose another name")
    config = as_config(config)
    config.validate_new()
    plan = tuner_of(config).plan(model, config)
    check_plan(model, plan, state.backend)
    with adding(model, adapter_name):
        add_planned(model, state, plan, adapter_name, init=True, autocast=autocast_adapter_dtype)


def set_adapter(model: nn.Module, name_or_names: str | list[str], *, trainable: bool = True) -> None:
    """Make one adapter, or several added up, the one that every call uses and that trains, also if it was loaded for
    inference (as in peft); with `trainable` False it is frozen. A merged one is unmerged first, with a warning. Raises
    PatchError for a name that is not an adapter's, or is given twice."""
    state = state_of(model)
    names = names_of(name_or_names, "set_adapter")
    check_flags("set_adapter", trainable=trainable)
    check_names(state, names, "set_adapter")
    activate(model, state, names, trainable, set.union if trainable else set.difference)
    _say_whose_copies_are_used(model, names)
    if state.merged and state.merged != names:
        warnings.warn(f"{', '.join(state.merged)} was merged and is unmerged, to use {names}", stacklevel=2)
        unmerge(model)


def _say_whose_copies_are_used(model: nn.Module, names: tuple[str, ...]) -> None:
    for path, layer in layers(model):
        owners = [name for name in names if isinstance(layer, SavedModule) and name in layer._fastpeft.adapters]
        if len(owners) > 1:
            warnings.warn(
                f"{path} is trained whole by {', '.join(owners)}; calls use the copy of the last, and train no other",
                stacklevel=3,
            )


def delete_adapter(model: nn.Module, name: str) -> None:
    """Remove an adapter. If it was the only active one, the first that is left becomes active, with a warning. What is
    active after an active one is gone trains, as in peft.

    Raises PatchError if there is no such adapter, or it is merged.
    """
    state = state_of(model)
    if not isinstance(name, str):
        raise PatchError(f"delete_adapter: {shown(name)} names no adapter; give the name of one")
    only_adapter(state, name)
    if name in state.merged:
        raise PatchError(f"delete_adapter: {name!r} is merged into the base weights; unmerge first")
    if name in state.active:
        remaining = [other for other in state.active if other != name]
        others = [other for other in state.configs if other != name]
        if not remaining and others:
            remaining = others[:1]
            warnings.warn(f"adapter {name!r} was active and is deleted; {remaining[0]!r} is active now", stacklevel=2)
        set_adapter(model, remaining)  # first, so that what is active is there, whatever interrupts this
    remove_adapter(model, state, name)


@contextlib.contextmanager
def use_adapter(model: nn.Module, name: str | list[str]):
    """Inside, this thread's calls use this adapter (or these, added up), whatever `set_adapter` says. Raises PatchError
    for a name that is not an adapter's, and while another adapter is merged into the weights."""
    state = state_of(model)
    names = names_of(name, "use_adapter")
    check_names(state, names, "use_adapter")
    check_together(state, names, "use_adapter")
    if state.merged and state.merged != names:
        raise PatchError(f"use_adapter: {', '.join(state.merged)} is merged into the base weights; unmerge first")
    with override(state, names):
        yield model


@contextlib.contextmanager
def disable_adapter(model: nn.Module):
    """Inside, this thread's calls compute the base model. A merged adapter is taken out and put back in the end. Raises
    PatchError if the model is not patched."""
    state = state_of(model)
    if any(trains_biases(state.configs[name]) for name in state.active):
        warnings.warn("the adapter trains biases of the base model, which stay as trained inside", stacklevel=3)
    if replaced := [name for name in state.in_place if not is_bias(name)]:
        warnings.warn(f"{', '.join(replaced)}: values of an adapter's file, which stay inside", stacklevel=3)
    merged = state.merged
    try:
        if merged:
            unmerge(model)
        with override(state, ()):
            yield model
    finally:
        if merged:
            unmerge(model)  # all of it, where that was interrupted
            merge(model, merged)


def merge(model: nn.Module, adapter_names: str | list[str] | None = None) -> None:
    """Add the active adapters (or `adapter_names`) to the base weights; what was there is kept for `unmerge`. Merging
    twice changes nothing. Raises PatchError, with the weights untouched, if the model is not patched, a name is not an
    adapter's, the result would not be finite, or a layer's weight cannot be changed (its library has no way back into
    its format, or it is sharded)."""
    state = state_of(model)
    names = state.active if adapter_names is None else names_of(adapter_names, "merge")
    check_names(state, names, "merge")
    if state.merged:
        warnings.warn("already merged; unmerge first to merge another choice", stacklevel=2)
        return
    owners = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
    try:
        for path, layer in layers(model):
            if isinstance(layer, SavedModule):
                continue
            tied = owners[id(layer._parameters.get("weight"))] > 1
            try:
                ready = layer.prepare_merge(names)
            except PatchError as error:
                raise PatchError(f"merge: {path}: {error}") from None
            if ready is not None:
                layer.merge(ready, untie=tied)
        state.merged = names
    except BaseException:
        unmerge(model)
        raise


def unmerge(model: nn.Module) -> None:
    """Restore the base weights that `merge` changed, bit for bit. Raises PatchError if the model is not patched."""
    state = state_of(model)
    for _, layer in layers(model):
        layer.unmerge()
    state.merged = ()


def merge_and_unload(model: nn.Module, adapter_names: str | list[str] | None = None) -> nn.Module:
    """The plain model with the active adapters (or `adapter_names`) in its weights, and with the trained copies in
    place of the modules that they were made of. The parameters stay frozen, as in peft. Returns the same object. Raises
    PatchError as `merge`; the model is then still patched."""
    state = state_of(model)
    wanted = state.merged or state.active if adapter_names is None else names_of(adapter_names, "merge_and_unload")
    check_names(state, wanted, "merge_and_unload")
    if state.merged != wanted:
        unmerge(model)
        merge(model, wanted)
    untied = [path for path, layer in layers(model) if any(map(_is_own, layer._fastpeft.unmerged.values()))]
    if untied:
        warnings.warn(
            f"{', '.join(untied)} shared its weight with another module (tied embeddings) and has one of its own now; "
            "tie_weights() would give both the same again",
            stacklevel=2,
        )
    for _, layer in list(layers(model)):
        names = [name for name in wanted if name in layer._fastpeft.adapters]
        if isinstance(layer, SavedModule) and names:
            clone = layer.unloaded(names[-1])
            for parent in list(model.modules()):
                for leaf, child in parent._modules.items():
                    if child is layer:
                        parent._modules[leaf] = clone
    restore(model, state, keep_weights=True)
    return model


def _is_own(kept: torch.Tensor) -> bool:
    """Whether a layer's merged weight is a parameter of its own, so that the shared one was kept itself."""
    return isinstance(kept, nn.Parameter)


def check_resize(model: nn.Module, new_num_tokens: int | None) -> None:
    """Raises PatchError if the vocabulary is to change under an adapter that was made for its size."""
    for _, embedding in ends_of(model):
        if isinstance(embedding, AdapterLayer) and new_num_tokens not in (None, len(embedding.weight)):
            raise PatchError(
                f"resize_token_embeddings: an adapter is made for {len(embedding.weight)} tokens, not "
                f"{new_num_tokens}; fastpeft.unpatch(model), resize, and patch again"
            )


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters, counted as peft counts them: packed 4-bit parameters by the numbers they hold.
    Raises PatchError for what is no model."""
    if not isinstance(model, nn.Module):
        raise PatchError(f"the parameters of a {type(model).__name__} cannot be counted; give a torch.nn.Module")
    trainable = total = 0
    for parameter in model.parameters():
        count = parameter.numel()
        if type(parameter).__name__ == "Params4bit":
            count *= 2 * parameter.quant_storage.itemsize if hasattr(parameter, "quant_storage") else 2
        total += count
        trainable += count if parameter.requires_grad else 0
    return trainable, total


def print_trainable_parameters(model: nn.Module) -> None:
    """peft's line, character for character; of a model without parameters it says 0 of 0. Raises PatchError for what is
    no model."""
    trainable, total = count_parameters(model)
    share = 100 * trainable / total if total else 0
    print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")
