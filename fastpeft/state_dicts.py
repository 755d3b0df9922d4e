"""An adapter's tensors out of a patched model and into one, by peft's functions of these names."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from fastpeft.encoders import has_network
from fastpeft.errors import AdapterFileError, PatchError
from fastpeft.filling import check_names_and_shapes, fill, places_in_file
from fastpeft.mapping import tuner_of
from fastpeft.patching import layers, state_of
from fastpeft.restoring import in_place
from fastpeft.state import adapter_state_dict, file_key, only_adapter, whole_embeddings, whole_tensors
from fastpeft.untrusted import shown


class Filled(NamedTuple):
    """What torch's load_state_dict returns; both are empty, as a mismatch is an error."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | str = "auto",
) -> dict[str, torch.Tensor]:
    """The tensors of an adapter of a patched model, under the names of HF peft's file.

    Args:
        model: patched by fastpeft.
        state_dict: of the model, with the values to take in place of the model's own, as gathered from shards.
        adapter_name: whose; None is the active adapter, or the only one.
        unwrap_compiled: whether the model is one that torch.compile has wrapped.
        save_embedding_layers: "auto" adds the base weights of targeted embeddings, and those of all if the vocabulary
            was resized; True adds those of all.

    Raises:
        PatchError: the model is not patched, there is no such adapter, `state_dict` lacks a tensor or the adapter has
        one that is computed from others (a prompt's network), or another choice of embeddings is asked for.
    """
    model = getattr(model, "_orig_mod", model) if unwrap_compiled else model
    if save_embedding_layers not in ("auto", True):
        raise PatchError(
            f"get_peft_model_state_dict: save_embedding_layers={save_embedding_layers!r} cannot be honoured; the base "
            "weights of targeted embeddings are always there"
        )
    adapter_name = only_adapter(state_of(model), adapter_name)
    full = None if state_dict is None else dict(state_dict)
    with whole_tensors(model, adapter_name, full):
        own = adapter_state_dict(model, adapter_name)
        if save_embedding_layers is True:
            embeddings = whole_embeddings(model, state_of(model).configs[adapter_name])
            own = {**{key: tensor.detach() for key, tensor in embeddings.items()}, **own}
        return own if full is None else _taken_from(full, model, adapter_name, own)


def _taken_from(full: dict, model: nn.Module, adapter_name: str, own: dict) -> dict[str, torch.Tensor]:
    """`own`, the tensors of an adapter's file, with the values of a state dict of the model. Raises PatchError."""
    names = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    config, found, out = state_of(model).configs[adapter_name], {}, {}
    for path, layer in layers(model):
        if adapter_name in layer._fastpeft.adapters:
            for key, tensor in layer.file_tensors(adapter_name).items():
                found[file_key(config, path, key)] = tensor
    for key, tensor in own.items():
        name = names.get(id(found.get(key)))
        if name is None and key in found:
            raise PatchError(f"get_peft_model_state_dict: {key} is computed; leave state_dict out")
        if name is not None and name not in full:
            raise PatchError(f"get_peft_model_state_dict: state_dict has no {name}; give the whole model's")
        out[key] = tensor if name is None else full[name]
    return out


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, torch.Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> Filled:
    """Give an adapter of a patched model, in place, the tensors of `get_peft_model_state_dict` or of HF peft's file.

    Args:
        model: patched by fastpeft.
        peft_model_state_dict: all of the adapter's tensors.
        adapter_name: whose.
        ignore_mismatched_sizes: False; a mismatch is an error.
        low_cpu_mem_usage: of no effect, as the parameters are there.

    Returns:
        (missing_keys, unexpected_keys), both empty.

    Raises:
        AdapterFileError: a tensor is missing, unknown, of another shape, beyond the range of where it goes, or none of
        finite floating-point numbers.
        PatchError: the model is not patched, there is no such adapter, it is merged, or its tensors come out of a
        network that the dict lacks. The adapter is then as it was.
    """
    state = state_of(model)
    if adapter_name not in state.configs:
        have = ", ".join(map(repr, state.configs)) or "none"
        raise PatchError(f"set_peft_model_state_dict: there is no adapter {shown(adapter_name)}; there are {have}")
    if ignore_mismatched_sizes:
        raise PatchError("set_peft_model_state_dict: ignore_mismatched_sizes=True cannot be honoured; leave it out")
    if state.merged:
        raise PatchError(f"set_peft_model_state_dict: {', '.join(state.merged)} is merged; unmerge first")
    if has_network(model, adapter_name):
        raise PatchError(
            f"set_peft_model_state_dict: {adapter_name!r} comes out of a network, which such a dict does not hold; use "
            "save_adapter and fastpeft.restoring.restore_adapter"
        )
    config = type(state.configs[adapter_name])(**vars(state.configs[adapter_name]))
    config.inference_mode = True
    plan = tuner_of(config).plan(model, config)
    places, tensors = places_in_file(model, plan, embeddings=True), dict(peft_model_state_dict)
    where = "peft_model_state_dict"
    for key, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            what = str(tensor.dtype) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise AdapterFileError(f"{where}: {key} is a {what}; a tensor of finite floating-point numbers is needed")
    check_names_and_shapes(places, {key: tuple(tensor.shape) for key, tensor in tensors.items()}, where)
    with in_place(model, adapter_name, plan.config):
        fill(model, adapter_name, places, tensors, where)
    return Filled([], [])
