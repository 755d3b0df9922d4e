"""LoRA's part in patching: first a plan that changes nothing and can refuse, then the injection that cannot fail for
what the plan has checked."""

from dataclasses import dataclass

from torch import nn

from fastpeft.configs import LoraConfig
from fastpeft.errors import TargetError
from fastpeft.targets import Target, resolve_targets
from fastpeft.tuners.layer import AdapterLayer, attach
from fastpeft.tuners.lora import LoraLayer, Settings, settings_of
from fastpeft.tuners.lora_kinds import check_target, layer_class, settle_fan_in_fan_out
from fastpeft.tuners.saved_modules import SavedModule


@dataclass(frozen=True)
class Plan:
    """What an adapter will touch: targets with their classes and settings, and the modules it trains whole."""

    config: LoraConfig
    targets: tuple[tuple[Target, type[LoraLayer], Settings], ...]
    saved: tuple[tuple[str, nn.Module], ...]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The names (relative to the model) and shapes of the tensors in the adapter's file, biases aside."""
        out = {}
        for target, kind, settings in self.targets:
            out.update({f"{target.name}.{key}": shape for key, shape in kind.shapes(target.module, settings).items()})
        for name, module in self.saved:
            out.update({f"{name}.{key}": tuple(value.shape) for key, value in own_tensors(module).items()})
        return out


def own_tensors(module: nn.Module) -> dict:
    """The tensors of a module that is trained whole, without those that adapters have added to it."""
    skip = tuple(f"{name}." for name in SavedModule.containers)
    return {key: value for key, value in module.state_dict().items() if not key.startswith(skip)}


def plan(model: nn.Module, config: LoraConfig) -> Plan:
    """Resolve and check everything; the model is not touched. Raises TargetError or ConfigError."""
    resolution = resolve_targets(model, config)
    targets = []
    for target in resolution.targets:
        kind = layer_class(target.module)
        if isinstance(target.module, AdapterLayer) and not isinstance(target.module, LoraLayer):
            raise TargetError(f"{target.name} is already trained whole by another adapter; exclude it from the targets")
        check_target(target.name, target.module, resolution.config, target.r, target.alpha)
        targets.append((target, kind, settings_of(resolution.config, target.r, target.alpha)))
    saved = []
    for name in resolution.saved_modules:
        module = model.get_submodule(name)
        if isinstance(module, LoraLayer):
            raise TargetError(f"{name} already carries a LoRA; it cannot also be in modules_to_save")
        saved.append((name, module))
    return Plan(resolution.config, tuple(targets), tuple(saved))


def inject(plan: Plan, name: str, state, *, init: bool, autocast: bool) -> None:
    """Build the planned adapter into the model, in `named_modules()` order, which is the order of the random draws.

    Without `init` the parameters are left unset, for a file to fill. Trained copies start as the originals are.
    """
    config = plan.config
    for target, kind, settings in plan.targets:
        if not isinstance(target.module, AdapterLayer):
            attach(target.module, kind, state)
        settle_fan_in_fan_out(config, target.module)
        target.module.add_adapter(name, settings, config.init_lora_weights if init else None, autocast)
    for _, module in plan.saved:
        if not isinstance(module, AdapterLayer):
            attach(module, SavedModule, state)
        module.add_adapter(name)
