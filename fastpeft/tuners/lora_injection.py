"""LoRA's part in patching: first a plan that changes nothing and can refuse, then the injection that cannot fail for
what the plan has checked."""

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from fastpeft.configs import LoraConfig
from fastpeft.errors import ConfigError, TargetError
from fastpeft.targets import Resolution, Target, resolve_targets
from fastpeft.tuners.experts import parameters_class
from fastpeft.tuners.layer import AdapterLayer, attach
from fastpeft.tuners.lora import LoraLayer, Settings, settings_of
from fastpeft.tuners.lora_init import decomposes
from fastpeft.tuners.lora_kinds import check_target, layer_class, settle_fan_in_fan_out
from fastpeft.tuners.lora_parameters import ParameterSettings, plan_parameters, shapes
from fastpeft.tuners.saved_modules import SavedModule, check_saved, own_tensors


@dataclass(frozen=True)
class Plan:
    """What an adapter will touch: targets with their classes and settings, the modules it trains whole, and those of
    which it adapts parameters, with their settings."""

    config: LoraConfig
    targets: tuple[tuple[Target, type[LoraLayer], Settings], ...]
    saved: tuple[tuple[str, nn.Module], ...]
    parameters: tuple[tuple[str, nn.Module, ParameterSettings], ...] = ()

    def in_today_s_layout(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A file's tensors as they are: there has been one layout only."""
        return tensors

    def file_shapes(self) -> dict[str, tuple[int, ...]]:
        """The names and shapes of the tensors in the adapter's file, biases aside."""
        out = {}
        for target, kind, settings in self.targets:
            out.update({f"{target.name}.{key}": shape for key, shape in kind.shapes(target.module, settings).items()})
        for path, module, settings in self.parameters:
            out.update({f"{path}.{key}": shape for key, shape in shapes(module, settings).items()})
        for name, module in self.saved:
            out.update({f"{name}.{key}": tuple(value.shape) for key, value in own_tensors(module).items()})
        return {f"base_model.model.{name}": shape for name, shape in out.items()}


def plan(model: nn.Module, config: LoraConfig) -> Plan:
    """Resolve and check everything; the model is not touched. Raises TargetError or ConfigError."""
    resolution = resolve_targets(model, config)
    targets = tuple(
        (target, kind, settings_of(resolution.config, target.r, target.alpha))
        for target, kind in checked_targets(model, resolution, lambda name, module: layer_class(module))
    )
    if decomposes(resolution.config.init_lora_weights):
        _check_untied(model, resolution)
    saved = tuple((name, model.get_submodule(name)) for name in resolution.saved_modules)
    check_saved(model, saved)
    parameters = tuple(plan_parameters(resolution.parameters, resolution.config))
    _check_apart(model, targets, saved, parameters)
    return Plan(resolution.config, targets, saved, parameters)


def _check_apart(model: nn.Module, targets, saved, parameters) -> None:
    """Raises TargetError for a parameter of a module that is a target, or is trained whole, here or by another."""
    modules, whole = {target.name for target, *_ in targets}, tuple(f"{name}." for name, _ in saved)
    whole += tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, SavedModule))
    for path, _, settings in parameters:
        if path in modules or f"{path}.".startswith(whole):
            how = "in target_modules" if path in modules else "trained whole by modules_to_save"
            raise TargetError(
                f"target_parameters has {path}.{next(iter(settings.each))}, and its module is {how}; choose one"
            )


def checked_targets(model: nn.Module, resolution: Resolution, class_of: Callable) -> list[tuple[Target, type]]:
    """The targets and the class that `class_of(name, module)` has for each. Raises TargetError or ConfigError for one
    that cannot carry the adapter, by itself or because of what it carries already."""
    whole = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, SavedModule))
    found = []
    for target in resolution.targets:
        name, module = target.name, target.module
        if isinstance(module, SavedModule) or name.startswith(whole):
            raise TargetError(f"{name} is already trained whole by another adapter; exclude it from the targets")
        kind = class_of(name, module)
        if isinstance(module, AdapterLayer) and type(module).__bases__[0] is not kind:
            raise TargetError(
                f"{name} already carries an adapter of another method ({type(module).__bases__[0].__name__}, not "
                f"{kind.__name__}); choose one method for each module, with exclude_modules"
            )
        _check_called(name, model.get_submodule(name.rpartition(".")[0]))
        check_target(name, module, resolution.config, target.r, target.alpha)
        found.append((target, kind))
    return found


def _check_called(name: str, parent: nn.Module) -> None:
    if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
        raise TargetError(
            f"{name}: in eval mode torch.nn.TransformerEncoderLayer reads this weight in a fused kernel and never "
            "calls the module, so an adapter would do nothing; call torch.backends.mha.set_fastpath_enabled(False)"
        )


def _check_untied(model: nn.Module, resolution) -> None:
    owners = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
    for target in resolution.targets:
        weight = getattr(target.module, "weight", None)  # some quantised layers call theirs by another name
        if weight is not None and owners[id(weight)] > 1:
            raise ConfigError(
                f"init_lora_weights={resolution.config.init_lora_weights!r} changes the weight of {target.name}, which "
                "another module shares (tied embeddings) and which would change with it; exclude it from the targets"
            )


def inject(plan: Plan, name: str, state, *, init: bool, autocast: bool) -> None:
    """Build the planned adapter into the model, in `named_modules()` order, which is the order of the random draws.

    Without `init` the parameters are left unset, for a file to fill, and only what the initialisation did to the base
    is done again, as HF peft does. Trained copies start as the originals are.
    """
    config = plan.config
    again = decomposes(config.init_lora_weights)  # an adapter that was trained on a changed base needs that base
    if again and not init and "niter" in config.init_lora_weights:
        warnings.warn(
            f"init_lora_weights={config.init_lora_weights!r} has changed the base weights by a random approximation, "
            "which loading repeats: the result is right only if torch's seed is what it was then",
            stacklevel=2,
        )
    if config.init_lora_weights == "lora_ga":
        warnings.warn(
            "init_lora_weights='lora_ga' has changed the base weights by gradients that no file holds; loading leaves "
            "the base as it is, as peft does. peft can convert the adapter for an unchanged base",
            stacklevel=2,
        )
    for target, kind, settings in plan.targets:
        if not isinstance(target.module, AdapterLayer):
            attach(target.module, kind, state)
        settle_fan_in_fan_out(config, target.module)
        target.module.add_adapter(name, settings, config.init_lora_weights if init or again else None, autocast)
    for _, module, settings in plan.parameters:
        if not isinstance(module, AdapterLayer):
            attach(module, parameters_class(module), state)
        module.add_adapter(name, settings, config.init_lora_weights if init else None, autocast)
    for _, module in plan.saved:
        if not isinstance(module, AdapterLayer):
            attach(module, SavedModule, state)
        module.add_adapter(name)
