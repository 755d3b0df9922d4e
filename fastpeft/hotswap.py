"""Another LoRA adapter in the place of one that a model has: the same parameters, other values.

Nothing that compiled code has looked at changes, so nothing is compiled again. A smaller rank is filled up with zeros,
which add nothing and get no gradients. Two things can differ between adapters that are no values of parameters: the
greatest rank, and the scaling. `prepare_model_for_compiled_hotswap` makes room for the one, and a tensor of the other.
"""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from fastpeft.base_names import read_for
from fastpeft.configs import LoraConfig, PeftType
from fastpeft.errors import AdapterFileError, ConfigError, PatchError
from fastpeft.filling import check_names_and_shapes, config_of, places_in_file
from fastpeft.mapping import task_class, tuner_of
from fastpeft.names import listed
from fastpeft.patching import layers, state_of
from fastpeft.state import PREFIX, only_adapter, own_tensors_of
from fastpeft.tuners.lora import SCALING, LoraLayer
from fastpeft.tuners.lora_init import decomposes
from fastpeft.tuners.lora_kinds import MAX_RANK, LoraEmbedding

# The attributes that say the rank of a layer: of A the first two, of B the others.
SIZES = ("out_features", "out_channels", "in_features", "in_channels")

# What compiled code has read of a configuration, besides what is a number of each layer.
_SAME = ("use_dora", "lora_bias", "lora_dropout", "bias")


def prepare_model_for_compiled_hotswap(model: nn.Module, *, target_rank: int | None = None) -> None:
    """Make the LoRA adapters of a model such that adapters of other scalings and ranks can take their places without
    compiling again: each scaling becomes a tensor, which B is multiplied by in every call, and each rank becomes
    `target_rank`, by zeros. The outputs stay the same. Call it after the first adapter is loaded, before an optimizer
    is made and before `torch.compile`.

    Args:
        model: a patched model with LoRA adapters, and no others.
        target_rank: the greatest rank that will come; None leaves the ranks as they are.

    Raises:
        PatchError: the model is not patched, an adapter is merged, or has a greater rank or an embedding.
        ConfigError: `target_rank` is no rank; an adapter is not LoRA.
        The model is then as it was.
    """
    state = state_of(_plain(model))
    for name, config in state.configs.items():
        _check_lora("prepare_model_for_compiled_hotswap", f"adapter {name!r}", config)
    if state.merged:
        raise PatchError(f"prepare_model_for_compiled_hotswap: {listed(state.merged)} is merged; unmerge first")
    if target_rank is not None and (type(target_rank) is not int or not 0 < target_rank <= MAX_RANK):
        raise ConfigError(f"target_rank is {target_rank!r}; a whole number from 1 to {MAX_RANK}, or None is needed")
    held = [(path, layer, name) for path, layer in _lora_layers(model) for name in layer._fastpeft.adapters]
    for path, layer, name in held:
        _check_here(f"prepare_model_for_compiled_hotswap: {path}", layer.parameters_of(name).values())
        if isinstance(layer, LoraEmbedding):
            raise PatchError(f"{path} is an embedding, whose adapter {name!r} cannot be made ready; exclude it")
        rank = layer._fastpeft.adapters[name].r
        if target_rank is not None and rank > target_rank:
            raise PatchError(f"target_rank={target_rank} is less than {rank}, the rank of {name!r} at {path}; raise it")
        if target_rank not in (None, rank) and getattr(layer, "groups", 1) > 1:
            raise PatchError(f"{path} is a convolution with groups, whose rank cannot grow; leave target_rank out")
    with _undone_on_failure([(layer, name) for _, layer, name in held]):
        for _, layer, name in held:
            _make_ready(layer, name, target_rank)


def _make_ready(layer: LoraLayer, name: str, target_rank: int | None) -> None:
    settings, outer = layer._fastpeft.adapters[name], layer.lora_B[name]
    if SCALING not in outer._buffers:
        outer.register_buffer(SCALING, _bits(settings.scaling).to(outer.weight.device), persistent=False)
        settings = replace(settings, scaling=1.0)
    more = 0 if target_rank is None else target_rank - settings.r
    if more:
        for dimension, parameter in enumerate((layer.lora_A[name].weight, outer.weight)):
            shape = list(parameter.shape)
            shape[dimension] = more
            parameter.data = torch.cat((parameter.detach(), parameter.new_zeros(shape)), dimension)
        for holder, names in ((layer.lora_A[name], SIZES[:2]), (outer, SIZES[2:])):
            vars(holder).update({key: settings.r + more for key in names if key in vars(holder)})
        settings = replace(settings, r=settings.r + more, own_r=settings.own_r or settings.r)
    layer._fastpeft.adapters[name] = settings


@contextlib.contextmanager
def _undone_on_failure(held: list[tuple[LoraLayer, str]]):
    """Around what changes adapters of layers: if it fails, they are as they were."""
    before = [_restorer(layer, name) for layer, name in held]
    try:
        yield
    except BaseException:
        for put_back in before:
            put_back()
        raise


def _restorer(layer: LoraLayer, name: str) -> Callable[[], None]:
    """What makes an adapter of a layer again what it is now."""
    settings = layer._fastpeft.adapters[name]
    values = [(each, each.data, each.detach().clone()) for each in layer.parameters_of(name).values()]
    holders = [held[name] for held in (layer.lora_A, layer.lora_B) if name in held]  # none of an embedding
    sizes = [{key: vars(holder)[key] for key in SIZES if key in vars(holder)} for holder in holders]
    scalings = [(each, each.clone()) for holder in holders for each in holder._buffers.values() if each is not None]

    @torch.no_grad()
    def put_back() -> None:
        for parameter, data, before in values:
            parameter.data = data
            data.copy_(before)
        for holder, known in zip(holders, sizes, strict=True):
            vars(holder).update(known)
            if SCALING in holder._buffers and not scalings:
                delattr(holder, SCALING)
        for tensor, before in scalings:
            tensor.copy_(before)
        layer._fastpeft.adapters[name] = settings

    return put_back


def hotswap_adapter(model: nn.Module, directory: str | Path, adapter_name: str = "default") -> None:
    """Give the adapter `adapter_name` the values of the one in `directory`, in place: its parameters stay the same
    objects, of the same shapes. What is saved afterwards is the new adapter, with its own rank.

    Args:
        model: a patched model, or what `torch.compile` has made of one.
        directory: an adapter that fastpeft or HF peft wrote; local.
        adapter_name: a LoRA adapter of the model, with the same targets, of the same or a greater rank.

    Raises:
        PatchError: there is no such adapter, it is merged, its targets are others or its rank is less.
        ConfigError: one of the two is not LoRA, or they differ in what compiled code has read.
        AdapterFileError: a file is missing, damaged or hostile, or its tensors do not fit.
        The model is then as it was.
    """
    model = _plain(model)
    state, name = state_of(model), adapter_name
    only_adapter(state, name)
    _check_lora("hotswap_adapter", f"adapter {name!r}", state.configs[name])
    if name in state.merged:
        raise PatchError(f"hotswap_adapter: {name!r} is merged into the base weights; unmerge first")
    planned = []

    def validate(raw_config, header, side) -> None:
        config = config_of(raw_config, side)
        _check_lora("hotswap_adapter", str(directory), config)
        config.inference_mode = state.configs[name].inference_mode
        _check_alike(model, name, config, True if side is None else bool(side.get("hf_quirks", False)))
        plan = tuner_of(config).plan(model, config)
        check_names_and_shapes(
            places_in_file(model, plan), {key: each.shape for key, each in header.items()}, str(directory)
        )
        _check_fits(model, name, plan, header, directory)
        planned.append((config, plan))

    found = read_for(model, directory, validate)
    config, plan = planned[-1]
    own = _live(model, name)
    for key, tensor in found.tensors.items():
        if not torch.isfinite(tensor.to(own[key].dtype)).all():
            raise AdapterFileError(
                f"{found.path}: {key} has values that its {own[key].dtype} in this model cannot hold; load "
                "it into a model of a wider dtype"
            )
    swapped = [(target.module, name) for target, _, _ in plan.targets]
    with torch.no_grad(), _undone_on_failure(swapped):
        for key, tensor in found.tensors.items():
            target = own[key]
            if target.shape != tensor.shape:
                target.zero_()
                target = target[tuple(slice(size) for size in tensor.shape)]
            target.copy_(tensor)
        for target, _, settings in plan.targets:
            _settle(target.module, name, settings)
        state.configs[name] = config


def _bits(scaling: float) -> torch.Tensor:
    return torch.tensor(scaling, dtype=torch.float32).view(torch.int32)


def _settle(layer: LoraLayer, name: str, settings) -> None:
    """Note the rank and the scaling that a layer's tensors have now."""
    before = layer._fastpeft.adapters[name]
    own_r = settings.r if settings.r < before.r else None
    scaling = settings.scaling
    if not isinstance(layer, LoraEmbedding) and (tensor := layer.lora_B[name]._buffers.get(SCALING)) is not None:
        tensor.copy_(_bits(scaling))
        scaling = before.scaling
    layer._fastpeft.adapters[name] = replace(before, scaling=scaling, own_r=own_r)


def _plain(model: nn.Module) -> nn.Module:
    """The model inside what `torch.compile` has made of it."""
    return model._modules.get("_orig_mod", model) if isinstance(model, nn.Module) else model


def _lora_layers(model: nn.Module):
    return ((path, layer) for path, layer in layers(_plain(model)) if isinstance(layer, LoraLayer))


def _live(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    """The parameters of an adapter, zeros and all, by their names in its file."""
    found = {path: layer for path, layer in layers(model) if name in layer._fastpeft.adapters}
    return {
        f"{PREFIX}{path}.{key}": each.detach()
        for path, layer in found.items()
        for key, each in layer.parameters_of(name).items()
    }


def _check_here(what: str, tensors) -> None:
    if any(tensor.is_meta for tensor in tensors):
        raise PatchError(f"{what} is offloaded by accelerate; swap, or prepare, before offloading")


def _check_lora(where: str, what: str, config) -> None:
    if config.peft_type != PeftType.LORA or not isinstance(config, LoraConfig):
        raise ConfigError(f"{where}: {what} is {config.peft_type.value}; only LORA adapters are swapped in place")
    if config.target_parameters:
        raise ConfigError(
            f"{where}: {what} has target_parameters, and parameters are not swapped; load it as another adapter"
        )


def _check_alike(model: nn.Module, name: str, config: LoraConfig, quirky: bool) -> None:
    state = state_of(model)
    before = state.configs[name]
    for key in _SAME:
        if getattr(before, key) != getattr(config, key):
            raise ConfigError(
                f"hotswap_adapter: {key} is {getattr(config, key)!r}, and {name!r} has {getattr(before, key)!r}; load "
                "it as another adapter"
            )
    for whose, each in ((repr(name), before), ("the new one", config)):
        if decomposes(each.init_lora_weights):
            raise ConfigError(
                f"hotswap_adapter: {whose} has init_lora_weights={each.init_lora_weights!r}, for which the base "
                "weights were changed; load the new one as another adapter"
            )
    if task_class(config) is not task_class(before):
        raise ConfigError(
            f"hotswap_adapter: task_type is {config.task_type!r}, and {before.task_type!r} of {name!r}; load it as "
            "another adapter"
        )
    _check_here(f"hotswap_adapter: {name!r}", _live(model, name).values())
    if config.bias != "none":
        raise ConfigError(f"hotswap_adapter: bias={config.bias!r} trains the base model's biases, which stay; load it")
    if quirky != (name in state.quirky) and task_class(config).peft_drops:
        raise ConfigError(
            f"hotswap_adapter: hf_quirks is {quirky} there, and {name in state.quirky} of {name!r}; load it as another "
            "adapter"
        )


def _check_fits(model: nn.Module, name: str, plan, header, directory) -> None:
    """Raises PatchError unless the tensors of a file are those of the adapter, or smaller in their rank."""
    own = own_tensors_of(model, name)
    missing, extra = sorted(own.keys() - header.keys()), sorted(header.keys() - own.keys())
    if missing or extra:
        which, path = ("lacks", missing[0]) if missing else ("has", extra[0])
        raise PatchError(
            f"hotswap_adapter: {directory} {which} {path}, and the targets of {name!r} must be the same; load it as "
            "another adapter"
        )
    for target, _, settings in plan.targets:
        layer, present = target.module, target.module._fastpeft.adapters[name]
        if settings.r > present.r:
            raise PatchError(
                f"hotswap_adapter: rank {settings.r} at {target.name}, and {name!r} has room for {present.r}; before "
                f"compiling, call fastpeft.prepare_model_for_compiled_hotswap(model, target_rank={settings.r})"
            )
        if settings.r < present.r and (isinstance(layer, LoraEmbedding) or getattr(layer, "groups", 1) > 1):
            raise PatchError(
                f"hotswap_adapter: rank {settings.r} at {target.name}, and {name!r} has {present.r}; in an embedding, "
                "or a convolution with groups, they must be equal"
            )
