"""`patch` and `unpatch`: the only place that changes a user's model.

A patch is planned and checked first; then classes are swapped on the instances concerned, parameters are attached, and
what was there is remembered. If anything fails on the way, the model is put back before the error leaves.
"""

import contextlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fastpeft.adapted_model import patched_model_class
from fastpeft.arguments import check_flags
from fastpeft.attention.interface import switch_back
from fastpeft.configs import LoraConfig, PeftConfig, as_config
from fastpeft.dispatch import backend as forced_backend
from fastpeft.dispatch import checked_backend, choose_backend
from fastpeft.distributed import give_class
from fastpeft.errors import ConfigError, PatchError
from fastpeft.files import adapter_directory
from fastpeft.forward import Part
from fastpeft.in_place import Before, give_back, is_bias, note, trains_biases, undone_on_failure
from fastpeft.mapping import task_class, tuner_of
from fastpeft.model import PatchedModel
from fastpeft.neighbours import check_head
from fastpeft.preconditions import adapted_by_peft, check_model, check_not_wrapped, check_transformers
from fastpeft.quantised import stand_in
from fastpeft.selection import CarriedCheckpoint, carry_no_more
from fastpeft.tuners.attention_layer import AdaptedAttention
from fastpeft.tuners.experts import calls_of
from fastpeft.tuners.fusions import part_all
from fastpeft.tuners.layer import AdapterLayer, attached, detach, give_back_forward, offloaded_to, take_forward
from fastpeft.tuners.prefix_encoder import PromptEncoders
from fastpeft.tuners.prompt_call import argument_names
from fastpeft.untrusted import shown


@dataclass
class PatchState:
    """What a patched model knows of its adapters and of itself before the patch."""

    original_class: type
    backend: str | None
    hf_quirks: bool
    autocast: bool
    requires_grad: dict[str, bool]
    training: dict[str, bool]
    configs: dict[str, PeftConfig] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    trainable: bool = True  # whether the active adapters may be trained
    thawed: set[str] = field(default_factory=set)  # trained although their inference_mode is True
    merged: tuple[str, ...] = ()
    in_place: dict[str, Before] = field(default_factory=dict)  # base parameters that adapters have changed
    input_hooks: list = field(default_factory=list)  # what makes the input embeddings' outputs want a gradient
    quirky: set[str] = field(default_factory=set)  # which compute as HF peft does where that is wrong
    parts: dict[str, Part] = field(default_factory=dict)  # what adapters do at the root of the model
    original_forward: Any = None  # a forward that stood on the instance, or None
    traced_call: Any = None  # the call that torch.compile is tracing
    traced_rows: tuple[str, ...] | None = None  # the names of its samples' adapters
    undo: list | None = None  # inside `undone_on_failure`: what undoes the changes of the base, last first


def state_of(model: nn.Module) -> PatchState:
    """The model's PatchState. Raises PatchError if it is not a patched model."""
    state = model.__dict__.get("_fastpeft") if isinstance(model, nn.Module) else None
    if not isinstance(state, PatchState):
        inside = isinstance(model, nn.Module) and model._modules.get("module", model._modules.get("_orig_mod"))
        if "_fastpeft" in getattr(inside, "__dict__", {}):
            raise PatchError(f"the patched model is inside this {type(model).__name__}; give that, as in model.module")
        raise PatchError(f"this {type(model).__name__} is not patched; call fastpeft.patch(model, config) first")
    return state


def layers(model: nn.Module):
    """(path, layer) of every patched layer, in `named_modules()` order."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, AdapterLayer))


def patch(
    model: nn.Module,
    config: Any = None,
    *,
    adapter_name: str = "default",
    backend: str | None = None,
    autocast_adapter_dtype: bool = True,
    hf_quirks: bool = False,
) -> nn.Module:
    """Give a model trainable adapters, in place, and freeze everything else; or take over the arithmetic, and nothing
    else, of a model that HF peft has adapted already.

    Args:
        model: any transformers model (or torch module), with its weights loaded; or a `peft.PeftModel`, or a model with
            adapters of transformers' own `add_adapter`: then `backend` is all that there is to choose, and the result
            computes what peft computes.
        config: a `fastpeft.LoraConfig`, `AdaLoraConfig`, `PrefixTuningConfig`, `PromptTuningConfig`,
            `PromptEncoderConfig` or `AdaptionPromptConfig`, the `peft` object of the same name, or the dict of an
            adapter_config.json.
        adapter_name: what the adapter is called.
        backend: "auto", "triton" or "torch" for this model; None leaves it to `set_backend` and the environment.
        autocast_adapter_dtype: adapters on a half-precision base are fp32 (HF peft's default); False: the base's dtype.
        hf_quirks: whether the adapter computes what HF peft computes also where that is wrong: segments and positions
            dropped in question answering; prompts before padding, their logits returned, answers not moved, classes
            read off padding; windows over a prefix counted from the padding. It is written beside the adapter, for
            `load_adapter`.

    Returns:
        The same object, still of its own class, with peft's methods (`save_pretrained` writes the adapter alone, …).

    Raises:
        ConfigError: a field's value cannot be honoured.
        TargetError: the targets match nothing, or something that cannot carry the adapter.
        PatchError: the model is patched already, by fastpeft or another library.
        BackendError: "triton" is demanded and cannot serve the model where and as it is now.
        The model is then as it was.
    """
    check_flags("patch", autocast_adapter_dtype=autocast_adapter_dtype, hf_quirks=hf_quirks)
    if backend is not None:
        checked_backend(backend, "patch(backend=)")
    if adapted_by_peft(model):
        return _patch_peft(model, config, backend, adapter_name, autocast_adapter_dtype, hf_quirks)
    check_model(model)
    if config is None:
        raise ConfigError("patch: a configuration is needed, for example fastpeft.LoraConfig(r=16)")
    config = as_config(config)
    config.validate_new()
    adapter_directory("", adapter_name)
    plan = tuner_of(config).plan(model, config)
    check_plan(model, plan, backend)
    with beginning(model, backend, autocast_adapter_dtype, hf_quirks) as state:
        add_planned(model, state, plan, adapter_name, init=True)
        activate(model, state, (adapter_name,))
    return model


def _patch_peft(model: nn.Module, config: Any, backend: str | None, name: str, autocast: bool, quirks: bool):
    from fastpeft.integrations.peft import patch_peft

    kind = type(model).__name__
    if config is not None:
        raise PatchError(
            f"patch: this {kind} has adapters of peft's; fastpeft.patch(model) makes them fast as they are, and "
            "model.add_adapter(name, config) adds another"
        )
    if (name, autocast, quirks) != ("default", True, False):
        raise PatchError(
            f"patch: this {kind} has adapters of peft's, which keep their names, dtypes and meaning; leave out "
            "adapter_name, autocast_adapter_dtype and hf_quirks"
        )
    check_not_wrapped(model)
    return patch_peft(model, backend)


def check_plan(model: nn.Module, plan, backend: str | None) -> None:
    """Raises PatchError if another library would pass the planned adapter by or get it wrong, BackendError if
    `patch(backend="triton")` asks for what the first call would refuse."""
    check_head(model, plan)
    check_transformers(plan.config)
    if backend != "triton":
        return
    if isinstance(plan.config, LoraConfig):
        calls = [(each.module, stand_in(each.module), 0) for each, kind, _ in plan.targets if kind.has_op]
        calls += calls_of(getattr(plan, "parameters", ()))
    else:
        calls = [(model, parameter, 0) for parameter in model.parameters()][:1]
    with forced_backend("triton"):
        for module, like, rank in calls:
            choose_backend(torch.empty(0, device=offloaded_to(module) or like.device), like.dtype, rank)


@contextlib.contextmanager
def beginning(model: nn.Module, backend: str | None, autocast: bool, hf_quirks: bool):
    """Around what gives a plain model its first adapter: inside it is a patched one without, of this PatchState; if
    anything fails it is as it was."""
    try:
        yield _begin(model, backend, autocast, hf_quirks)
    except BaseException:
        if "_fastpeft" in model.__dict__:
            unpatch(model)
        raise


def _begin(model: nn.Module, backend: str | None, autocast: bool, hf_quirks: bool) -> PatchState:
    """Make the root a patched model without adapters: class swapped, everything frozen, checkpointing bound."""
    requires_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    training = {name: module.training for name, module in model.named_modules()}
    state = PatchState(type(model), backend, hf_quirks, autocast, requires_grad, training)
    state.original_forward = model.__dict__.get("forward")
    model.__dict__["_fastpeft"] = state
    model.__class__ = patched_model_class(type(model), PatchedModel)
    state.original_forward = take_forward(model, state.original_class)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    bind_checkpoints(model, state)
    return state


def bind_checkpoints(model: nn.Module, state: PatchState) -> None:
    """Where checkpointing is on: let it carry the choice of adapters along, and the embeddings' outputs want a
    gradient."""
    if not any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return
    for module in model.modules():
        if "_gradient_checkpointing_func" in module.__dict__:
            module._gradient_checkpointing_func = CarriedCheckpoint(module._gradient_checkpointing_func, state)
    enable_input_grads(model, state)


def enable_input_grads(model: nn.Module, state: PatchState) -> None:
    """Reentrant checkpointing needs an input that wants a gradient, and with a frozen base there is none.

    The hooks are our own: transformers' `enable_input_require_grads` would forget those that a user has put there, and
    its hook cannot be pickled.
    """
    if state.input_hooks:
        return
    embeddings = {}
    for module in model.modules():
        get = getattr(module, "get_input_embeddings", None)
        with contextlib.suppress(NotImplementedError):
            embedding = get() if callable(get) else None
            if isinstance(embedding, nn.Module):
                embeddings[id(embedding)] = embedding
    for embedding in embeddings.values():
        state.input_hooks.append(embedding.register_forward_hook(_want_gradient))


def disable_input_grads(state: PatchState) -> None:
    """Undo `enable_input_grads`."""
    for hook in state.input_hooks:
        hook.remove()
    state.input_hooks = []


def _want_gradient(module, args, output) -> None:
    output.requires_grad_(True)


@contextlib.contextmanager
def adding(model: nn.Module, adapter_name: str):
    """Around what adds an adapter to a patched model, of the PatchState inside: if it fails, it is taken out."""
    state, modes = state_of(model), [(module, module.training) for module in model.modules()]
    try:
        with undone_on_failure(state):
            yield state
    except BaseException:
        remove_adapter(model, state, adapter_name)
        for module, mode in modes:
            module.training = mode
        raise


def remove_adapter(model: nn.Module, state: PatchState, name: str) -> None:
    """Take one adapter out, as far as it is in. A layer without another one becomes what it was before the patch, and
    so do the base parameters that the adapter has changed in place."""
    for layer in attached(model):
        if isinstance(layer, AdapterLayer):
            layer.delete_adapter(name)
        if not layer._fastpeft.adapters and not isinstance(layer, PromptEncoders):
            detach(layer)
    give_back(model, state, name)
    drop_unused(model)
    for names in (state.thawed, state.quirky):
        names.discard(name)
    for held in (state.parts, state.configs):
        held.pop(name, None)


def drop_unused(model: nn.Module) -> None:
    """Give back what no adapter uses any more: the holder of encoders, the attention implementation."""
    holder = model._modules.get(PromptEncoders.NAME)
    if isinstance(holder, PromptEncoders) and not len(holder):
        holder.leave(model)
    if not any(isinstance(module, AdaptedAttention) for module in model.modules()):
        for config in {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values():
            switch_back(config)


def add_planned(
    model: nn.Module, state: PatchState, plan, adapter_name: str, *, init: bool, autocast: bool | None = None,
    quirky: bool | None = None,
) -> None:  # fmt: skip
    """Inject a planned adapter and note its configuration; it is not active yet. `autocast`, `quirky` None: as in
    `patch`."""
    config = plan.config
    if state.merged:
        raise PatchError(
            f"adapter {adapter_name!r} cannot be added while {', '.join(state.merged)} is merged; unmerge first"
        )
    if trains_biases(config):
        others = [name for name, other in state.configs.items() if trains_biases(other)]
        if others:
            raise ConfigError(
                f"adapter {adapter_name!r} has bias={config.bias!r} and so has {others[0]!r}: both would train "
                "the same biases; set bias='none' in one of them"
            )
    if init or config.base_model_name_or_path is None:
        config.base_model_name_or_path = getattr(model, "name_or_path", None) or None
    autocast = state.autocast if autocast is None else autocast
    tuner = tuner_of(config)
    if state.hf_quirks if quirky is None else quirky:
        state.quirky.add(adapter_name)
    tuner.inject(plan, adapter_name, state, init=init, autocast=autocast)
    state.configs[adapter_name] = config
    _note_part(model, state, adapter_name, getattr(tuner, "after_call", None))
    for name, parameter in _biases(model, plan):
        note(state, name, parameter, adapter_name)
    for _, layer in layers(model):
        if adapter_name in layer._fastpeft.adapters:
            layer.train(layer.training)
    _set_trainable(model, state)


def _note_part(model: nn.Module, state: PatchState, name: str, after) -> None:
    """What the adapter does where the model is entered."""
    config, holder = state.configs[name], model._modules.get(PromptEncoders.NAME)
    encoder = holder[name] if isinstance(holder, PromptEncoders) and name in holder else None
    encoder = encoder if hasattr(encoder, "rows") else None  # a prefix's has no rows in front
    shows = getattr(config, "virtual_logits", False)
    part = Part(task_class(config), name in state.quirky, encoder, shows, after)
    if part.acts:
        state.parts[name] = part
        argument_names(state.original_class)  # which are found here, before torch.compile asks for them


def added_names(model: nn.Module) -> tuple[str, ...]:
    """How the names of parameters begin that adapters have added."""
    inside = [f"{path}.{held}." for path, layer in layers(model) for held in layer.containers]
    return (*inside, *(f"{path}." for path, layer in layers(model) if isinstance(layer, PromptEncoders)))


def _biases(model: nn.Module, plan):
    """(name, parameter) of the base parameters that `bias="all"` or `"lora_only"` trains in place."""
    bias = getattr(plan.config, "bias", "none")
    if bias == "all":
        # The original of a module that is trained whole is not called, and stays as it is.
        whole = [f"{path}." for path, layer in layers(model) if "modules_to_save" in layer.containers]
        owned = (*added_names(model), *whole)
        return [(n, p) for n, p in model.named_parameters() if is_bias(n) and not n.startswith(owned)]
    if bias == "lora_only":
        return [
            (f"{target.name}.bias", target.module.bias)
            for target, _, _ in plan.targets
            if getattr(target.module, "bias", None) is not None
        ]
    return []


def _is_trained(state: PatchState, name: str) -> bool:
    if not state.trainable or name not in state.active or name not in state.configs:
        return False
    return name in state.thawed or not state.configs[name].inference_mode


def _set_trainable(model: nn.Module, state: PatchState) -> None:
    """The active adapters' parameters train, unless loaded for inference; all others are frozen."""
    for _, layer in layers(model):
        for name in layer._fastpeft.adapters:
            wanted = _is_trained(state, name)
            for key, parameter in layer.parameters_of(name).items():
                if isinstance(parameter, nn.Parameter):
                    parameter.requires_grad_(wanted and state.configs[name].trains(key))
    train_biases = any(trains_biases(config) and _is_trained(state, name) for name, config in state.configs.items())
    if state.in_place:
        for name, parameter in model.named_parameters():
            if name in state.in_place and is_bias(name):
                parameter.requires_grad_(train_biases)


def activate(model: nn.Module, state: PatchState, names: tuple[str, ...], trainable: bool = True, thaw=None) -> None:
    """Make these the adapters that every call uses from now on; `thaw(thawed, names)`: which are thawed then."""
    check_names(state, names, "set_adapter")
    check_together(state, names, "set_adapter")
    before = state.active, state.trainable, state.thawed, type(model)
    try:
        state.active, state.trainable = tuple(names), trainable
        state.thawed = state.thawed if thaw is None else thaw(state.thawed, names)
        kinds = (each for name in names if (each := task_class(state.configs[name])) is not PatchedModel)
        give_class(model, patched_model_class(state.original_class, next(kinds, PatchedModel)))
        _set_trainable(model, state)
    except BaseException:
        state.active, state.trainable, state.thawed, model.__class__ = before
        _set_trainable(model, state)
        raise


def check_names(state: PatchState, names: tuple[str, ...], where: str) -> None:
    """Raises PatchError unless each is an adapter's name, and none is given twice."""
    for name in names:
        if name not in state.configs:
            known = ", ".join(map(repr, state.configs)) or "none"
            raise PatchError(f"{where}: there is no adapter {shown(name)}; there are {known}")
        if names.count(name) > 1:
            raise PatchError(f"{where}: {name!r} is named twice, which would add it twice; name it once")


def check_together(state: PatchState, names: tuple[str, ...], where: str) -> None:
    """Raises PatchError for adapters that a call cannot use at once."""
    configs = {name: state.configs[name] for name in names}
    windows = {name: each.prefix_window for name, each in configs.items() if hasattr(each, "prefix_window")}
    if len(set(windows.values())) > 1:
        said = ", ".join(f"{name!r} has {window!r}" for name, window in windows.items())
        raise PatchError(f"{where}: the prefixes of one call have one prefix_window, and {said}; use one at a time")


def unpatch(model: nn.Module) -> nn.Module:
    """Take every adapter out and restore what `patch` found: objects, classes, parameters bit for bit, requires_grad,
    training modes, input hooks. A model that peft has adapted keeps its adapters and what they have learned. Returns
    the same model. Raises PatchError if it is not patched."""
    if adapted_by_peft(model):
        from fastpeft.integrations.peft import unpatch_peft

        return unpatch_peft(model)
    state = state_of(model)
    _take_out(model, state, keep_weights=False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(state.requires_grad.get(name, parameter.requires_grad))
    for name, module in model.named_modules():
        module.training = state.training.get(name, module.training)
    _leave(model, state)
    return model


def restore(model: nn.Module, state: PatchState, keep_weights: bool) -> None:
    """Put classes and hooks back as before the patch; with `keep_weights` merged weights and trained biases stay."""
    _take_out(model, state, keep_weights)
    _leave(model, state)


def _take_out(model: nn.Module, state: PatchState, keep_weights: bool) -> None:
    part_all(model)
    for layer in attached(model):
        if keep_weights:
            layer._fastpeft.unmerged.clear()
            layer._fastpeft.kept.clear()
        if isinstance(layer, PromptEncoders):
            layer.clear()
        else:
            detach(layer)
    drop_unused(model)
    if not keep_weights:
        give_back(model, state)
    carry_no_more(model)
    disable_input_grads(state)


def _leave(model: nn.Module, state: PatchState) -> None:
    give_back_forward(model, state.original_class, state.original_forward)
    model.__dict__.pop("_fastpeft", None)
