"""An adapter of a patched model given what a directory holds of it, in place: its parameters stay the objects that an
optimizer knows, in their order, and what training needs besides them comes back too."""

import contextlib
import dataclasses
from dataclasses import fields
from pathlib import Path

import torch
from torch import nn

from fastpeft.base_names import read_for
from fastpeft.configs import PeftConfig
from fastpeft.encoders import fill_encoder, has_network
from fastpeft.errors import AdapterFileError, ConfigError, PatchError
from fastpeft.filling import OWN, Place, check_names_and_shapes, config_of, fill, places_in_file
from fastpeft.in_place import undone_on_failure
from fastpeft.mapping import tuner_of
from fastpeft.patching import layers, state_of
from fastpeft.state import keeps_embeddings, only_adapter, own_tensors_of
from fastpeft.tuners.adalora import AdaLoraLayer, settings_of
from fastpeft.untrusted import shown

# The fields in which a directory's configuration may differ: where it comes from, and how its targets are written, of
# which the names and shapes of the tensors tell more.
_FREE = frozenset(
    {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"}
    | {"exclude_modules", "layers_pattern", "layers_to_transform", "target_modules"}
)


def restore_adapter(model: nn.Module, directory: str | Path, *, adapter_name: str | None = None) -> None:
    """Give an adapter the values that a directory holds of it, so that training can go on from there bit for bit.

    Args:
        model: a patched model with the adapter, made with the configuration that the directory has.
        directory: local, as `save_adapter` wrote it.
        adapter_name: None is the active adapter, or the only one.

    Raises:
        ConfigError: a field of the configuration differs. AdapterFileError: a file is missing, damaged or hostile, its
        tensors do not fit, or the network is not there that the adapter comes out of. PatchError: the model is not
        patched, or the adapter is merged. The adapter is then as it was.
    """
    state = state_of(model)
    name = only_adapter(state, adapter_name)
    if state.merged:
        raise PatchError(f"restore_adapter: {', '.join(state.merged)} is merged into the base weights; unmerge first")
    planned = []

    def validate(raw_config, header, side) -> None:
        config = config_of(raw_config, side)
        config.inference_mode = True  # of several that train, some methods refuse the second
        plan = tuner_of(config).plan(model, config)
        _check_same(state.configs[name], plan.config, name, directory)
        if side is not None and side.get("hf_quirks", False) is not (name in state.quirky):
            raise ConfigError(_differs("hf_quirks", side.get("hf_quirks"), name in state.quirky, name, directory))
        places = places_in_file(model, plan, keeps_embeddings(model, plan.config))
        check_names_and_shapes(places, {key: each.shape for key, each in header.items()}, str(directory))
        _check_same_layers(own_tensors_of(model, name).keys(), places, name, directory)
        planned.append((plan, places))

    found = read_for(model, directory, validate)
    plan, places = planned[-1]
    network = has_network(model, name)
    if network and found.encoder is None:
        raise AdapterFileError(
            f"{found.path} has the table of {name!r}, and not the network that it comes out of; load it with "
            "load_adapter for use, and save with save_adapter what is to be trained on"
        )
    with in_place(model, name, plan.config):
        fill(model, name, places, plan.in_today_s_layout(found.tensors), found.path)
        if found.encoder is not None and (network or hasattr(tuner_of(plan.config), "fill_training")):
            fill_encoder(model, name, found)


def _check_same(current: PeftConfig, found: PeftConfig, name: str, directory) -> None:
    """Raises ConfigError for the first field in which an adapter and a directory differ."""
    if type(current) is not type(found):
        raise ConfigError(_differs("peft_type", _plain(found.peft_type), _plain(current.peft_type), name, directory))
    learned = {"rank_pattern"} if hasattr(found, "kept_of") else set()  # AdaLoRA's is what it has come to
    for field in fields(current):
        mine, theirs = (_plain(getattr(config, field.name)) for config in (current, found))
        if field.name not in _FREE | learned and mine != theirs:
            raise ConfigError(_differs(field.name, theirs, mine, name, directory))


def _check_same_layers(mine, places: dict[str, Place], name: str, directory) -> None:
    """Raises AdapterFileError if an adapter and a directory are of different layers."""
    theirs = {key for key, place in places.items() if place.use == OWN}
    if different := sorted(theirs ^ set(mine)):
        who = "the directory alone" if different[0] in theirs else f"adapter {name!r} alone"
        raise AdapterFileError(
            f"{directory} and adapter {name!r} are of different layers: {who} has {different[0]}; make the adapter "
            "with the target_modules and modules_to_save that it was trained with"
        )


def _differs(field: str, theirs: object, mine: object, name: str, directory) -> str:
    return (
        f"{directory} was saved with {field}={shown(theirs)}, and adapter {name!r} has {field}={shown(mine)}; "
        f"make the adapter with the configuration that it was trained with"
    )


def _plain(value: object) -> object:
    """An enum's value; of an empty container, which asks for nothing, None."""
    return None if isinstance(value, list | set | dict) and not value else getattr(value, "value", value)


@contextlib.contextmanager
def in_place(model: nn.Module, name: str, config: PeftConfig):
    """Around what fills an adapter as `config`, that of a file, has it: if it fails, the adapter is as it was."""
    with _undone_on_failure(model, name), _triplets_in_place(model, name, config):
        yield


@contextlib.contextmanager
def _undone_on_failure(model: nn.Module, name: str):
    tensors = [t for _, layer in layers(model) if name in layer._fastpeft.adapters for t in _tensors_of(layer, name)]
    before = [tensor.detach().clone() for tensor in tensors]
    try:
        with undone_on_failure(state_of(model)):
            yield
    except BaseException:
        with torch.no_grad():
            for tensor, values in zip(tensors, before, strict=True):
                tensor.copy_(values)
        raise


def _tensors_of(layer: nn.Module, name: str) -> list[torch.Tensor]:
    return list(layer.parameters_of(name).values())


@contextlib.contextmanager
def _triplets_in_place(model: nn.Module, name: str, config: PeftConfig):
    """Around what fills an AdaLoRA adapter: inside it has as many triplets as the directory, outside as many as ever,
    in the same parameters. Raises AdapterFileError if the two cannot be brought together."""
    own = state_of(model).configs[name]
    held = [(path, each) for path, each in layers(model) if isinstance(each, AdaLoraLayer) and _has(each, name)]
    pattern = getattr(own, "rank_pattern", None)
    before = [(layer, layer._fastpeft.adapters[name], layer.parameters_of(name)) for _, layer in held]
    if held:
        own.rank_pattern = config.rank_pattern
    try:
        for path, layer in held:
            settings = settings_of(config, config.kept_of(path))
            settings = dataclasses.replace(settings, dropout=layer._fastpeft.adapters[name].dropout)
            for key, shape in type(layer).__bases__[0].shapes(layer, settings).items():
                parameter = layer.parameters_of(name)[key]
                getattr(layer, key)[name] = nn.Parameter(parameter.new_empty(shape), parameter.requires_grad)
            layer._fastpeft.adapters[name] = settings
        yield
        for (path, layer), (_, _, parameters) in zip(held, before, strict=True):
            _take_over(path, layer, name, parameters)
    except BaseException:
        for layer, settings, parameters in before:
            _put_back(layer, name, parameters)
            layer._fastpeft.adapters[name] = settings
        if held:
            own.rank_pattern = pattern
        raise


def _has(layer: nn.Module, name: str) -> bool:
    return name in layer._fastpeft.adapters


def _take_over(path: str, layer: AdaLoraLayer, name: str, parameters: dict[str, nn.Parameter]) -> None:
    filled = layer.parameters_of(name)
    have, need = len(filled["lora_E"]), len(parameters["lora_E"])
    if have != need:
        raise AdapterFileError(
            f"{path} has {need} triplets, and {have} in the directory, which was saved without the others; load it "
            "with load_adapter into a model that has no such adapter"
        )
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(filled[key])
    _put_back(layer, name, parameters)


def _put_back(layer: AdaLoraLayer, name: str, parameters: dict[str, nn.Parameter]) -> None:
    for key, parameter in parameters.items():
        getattr(layer, key)[name] = parameter
