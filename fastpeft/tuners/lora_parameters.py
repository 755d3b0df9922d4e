"""LoRA on parameters instead of modules (HF peft's `target_parameters`): the experts of a mixture that lie in one
3-D parameter, and matrices of modules that are no linear layers.

An adapter of a parameter of E experts is A [E·r, K] and B [N, r·E]: expert e has the rows e·r … of A and every E-th
column of B, from e on. In a file those of a module's last targeted parameter stand at the module, and those of each
one before under one `base_layer.` more, as peft nests its wrappers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastpeft.configs import LoraConfig
from fastpeft.distributed import check_gathered
from fastpeft.errors import ConfigError, PatchError, TargetError
from fastpeft.selection import row_names
from fastpeft.targets import Target
from fastpeft.tuners import lora_init
from fastpeft.tuners.layer import AdapterLayer
from fastpeft.tuners.lora import Settings, _widen, settings_of
from fastpeft.tuners.lora_kinds import MAX_RANK, MAX_SCALING

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class ParameterSettings:
    """One adapter's numbers in one module, parameter by parameter, in the module's order."""

    each: dict[str, Settings]


@dataclass(frozen=True)
class Sizes:
    """Of a parameter as its adapter sees it: E experts of (N, K), stored as (E, N, K), (E, K, N) or, of one, (N, K)."""

    experts: int
    outputs: int
    inputs: int


def sizes_of(module: nn.Module, name: str) -> Sizes:
    """A 3-D parameter is (E, K, N) where the module says `is_transposed`, as in peft."""
    shape = module._parameters[name].shape
    if len(shape) == 2:
        return Sizes(1, *shape)
    return Sizes(shape[0], *(shape[:0:-1] if getattr(module, "is_transposed", False) else shape[1:]))


def file_keys(names: list[str]) -> dict[str, str]:
    """Of each targeted parameter what its tensors' names in HF's file begin with, relative to the module."""
    return {name: "base_layer." * depth for depth, name in enumerate(reversed(names))}


def shapes(module: nn.Module, settings: ParameterSettings) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the tensors that HF's file holds for one adapter of a module."""
    out, keys = {}, file_keys(list(settings.each))
    for name, each in settings.each.items():
        sizes = sizes_of(module, name)
        out[f"{keys[name]}lora_A.weight"] = (sizes.experts * each.r, sizes.inputs)
        out[f"{keys[name]}lora_B.weight"] = (sizes.outputs, each.r * sizes.experts)
    return out


def plan_parameters(targets: tuple[Target, ...], config: LoraConfig) -> list[tuple[str, nn.Module, ParameterSettings]]:
    """(path, module, settings) of the modules whose parameters are targets. Raises TargetError or ConfigError for one
    that cannot carry the adapter, by itself or because of what it carries already."""
    by_module: dict[str, list[Target]] = {}
    for target in targets:
        check_parameter(target, config)
        by_module.setdefault(target.name, []).append(target)
    planned = []
    for path, each in by_module.items():
        module = each[0].module
        settings = ParameterSettings({t.parameter: settings_of(config, t.r, t.alpha) for t in each})
        _check_carried(path, module, settings)
        planned.append((path, module, settings))
    return planned


def check_parameter(target: Target, config: LoraConfig) -> None:
    """Refuse what cannot be served, before anything changes. Raises TargetError or ConfigError."""
    name, parameter = f"{target.name}.{target.parameter}", target.module._parameters[target.parameter]
    if parameter.ndim not in (2, 3):
        raise TargetError(f"{name} has {parameter.ndim} dimensions; target_parameters needs 2, or 3 of experts")
    if parameter.is_meta:
        raise TargetError(f"{name} is on the meta device, or offloaded; load it without before patching")
    if parameter.dtype not in DTYPES or type(parameter) is not nn.Parameter:
        raise TargetError(
            f"{name} is a {type(parameter).__name__} of {parameter.dtype}, which is not served; convert it to a "
            "floating type, or leave it out of target_parameters"
        )
    if min(parameter.shape) == 0:
        raise TargetError(f"{name} has the shape {tuple(parameter.shape)}, without elements; leave it out")
    if getattr(target.module, "_is_expert_parallel", False):
        raise TargetError(
            f"{name} has a part of the experts, the others are elsewhere; load without expert parallelism"
        )
    if target.r > MAX_RANK:
        raise ConfigError(f"r={target.r} for {name}, which is {tuple(parameter.shape)}; the most is {MAX_RANK}")
    if abs(settings_of(config, target.r, target.alpha).scaling) > MAX_SCALING:
        raise ConfigError(
            f"lora_alpha={target.alpha} with r={target.r} scales {name} by more than {MAX_SCALING:g}; lower lora_alpha"
        )


def _check_carried(path: str, module: nn.Module, settings: ParameterSettings) -> None:
    if not isinstance(module, AdapterLayer):
        return
    if not isinstance(module, LoraParameters):
        raise TargetError(
            f"{path} carries an adapter of its own already; leave its parameters out of target_parameters"
        )
    for other, held in module._fastpeft.adapters.items():
        if held.each.keys() != settings.each.keys():
            raise ConfigError(
                f"target_parameters adapts {', '.join(settings.each)} of {path}, and adapter {other!r} has "
                f"{', '.join(held.each)}; adapters of one module need the same, as their files' names say no more"
            )


class LoraParameters(AdapterLayer):
    """LoRA on parameters of a module. Each kind says by `adapted_forward(names, ...)` what the module computes then."""

    prefix = "Lora"
    containers = {"lora_A": nn.ModuleDict, "lora_B": nn.ModuleDict}

    def add_adapter(self, name: str, settings: ParameterSettings, init: bool | str | None, autocast: bool) -> None:
        """Build, initialise and place one adapter's parameters; `init` None leaves them unset, for a file to fill."""
        self.lora_A[name], self.lora_B[name] = nn.ModuleDict(), nn.ModuleDict()
        for key, each in settings.each.items():
            sizes, weight = sizes_of(self, key), self._parameters[key]
            place = {"device": torch.device("meta")} if init is None else {}
            a = nn.Linear(sizes.inputs, each.r * sizes.experts, bias=False, **place)
            b = nn.Linear(each.r * sizes.experts, sizes.outputs, bias=False, **place)
            if init is None:
                a, b = (half.to(weight.dtype).to_empty(device=weight.device) for half in (a, b))
            else:
                lora_init.reset(a.weight, b.weight, None, init, each.r)
                a, b = (half.to(weight.device, weight.dtype) for half in (a, b))
            self.lora_A[name][key], self.lora_B[name][key] = a, b
            if autocast:
                _widen(self.lora_A[name], key)
                _widen(self.lora_B[name], key)
        self._fastpeft.adapters[name] = settings

    def delete_adapter(self, name: str) -> None:
        for container in self.containers:
            held = self._modules.get(container, ())
            if name in held:
                held.pop(name)
        self._fastpeft.adapters.pop(name, None)

    def parameters_of(self, name: str) -> dict[str, nn.Parameter]:
        """The adapter's parameters by their names in HF's file, relative to this module."""
        out = {}
        for key, start in file_keys(list(self._fastpeft.adapters[name].each)).items():
            for container in self.containers:
                out[f"{start}{container}.weight"] = getattr(self, container)[name][key].weight
        return out

    def factors(self, name: str, key: str) -> tuple[Tensor, Tensor, float]:
        """(A [E·r, K], B [N, r·E], scaling) of one adapter of a parameter."""
        a, b = self.lora_A[name][key].weight, self.lora_B[name][key].weight
        check_gathered("a factor of LoRA", a, b)
        return a, b, self._fastpeft.adapters[name].each[key].scaling

    def adapted(self, names: list[str], key: str, dtype: torch.dtype | None = None) -> Tensor:
        """The parameter with these adapters added, in its own shape, and its dtype or another."""
        weight = self._parameters[key]
        check_gathered(key, weight)
        value = weight if dtype is None else weight.to(dtype, copy=True)
        with torch.autocast(weight.device.type, enabled=False):
            for name in names:
                value = _plus(value, *self.factors(name, key), sizes_of(self, key))
        return value

    # Merging. What was there is kept, so that unmerging is exact and not an estimate.
    @torch.no_grad()
    def prepare_merge(self, names) -> dict[str, Tensor] | None:
        """What `merge` will write, computed and checked beforehand; None if this module has none of the adapters."""
        names = [name for name in names if name in self._fastpeft.adapters]
        ready = {}
        for key in self._fastpeft.adapters[names[0]].each if names else ():
            weight = self._parameters[key]
            merged = self.adapted(names, key, torch.promote_types(weight.dtype, torch.float32))
            if not torch.isfinite(merged).all():
                raise PatchError(f"merging {', '.join(names)} would put NaN or Inf into {key}; the adapter is broken")
            ready[key] = merged.to(weight.dtype)
        return ready or None

    def merge(self, prepared: dict[str, Tensor], untie: bool) -> None:
        """Put the prepared values in place. With `untie` a `weight` becomes a parameter of its own, because another
        module (a tied head) uses the same one."""
        for key, value in prepared.items():
            parameter = self._parameters[key]
            if untie and key == "weight":
                self._fastpeft.unmerged[key] = parameter
                self._parameters[key] = nn.Parameter(value, requires_grad=parameter.requires_grad)
            else:
                self._fastpeft.unmerged[key] = parameter.detach().to("cpu", copy=True)
                with torch.no_grad():
                    parameter.copy_(value)

    def unmerge(self) -> None:
        """Put back what `merge` replaced, bit for bit."""
        for key, kept in self._fastpeft.unmerged.items():
            if isinstance(kept, nn.Parameter):
                self._parameters[key] = kept
            else:
                with torch.no_grad():
                    self._parameters[key].copy_(kept)
        self._fastpeft.unmerged.clear()

    def forward(self, *args, **kwargs):
        names = self.active_adapters()
        if not names or self._fastpeft.model.merged:
            return self.base_forward(*args, **kwargs)
        if row_names(self._fastpeft.model) is not None:
            raise PatchError(
                f"adapter_names: {', '.join(names)} adapts parameters (target_parameters), whose update belongs to no "
                "sample; use one adapter for the whole batch"
            )
        return self.adapted_forward(names, *args, **kwargs)


def by_expert(a: Tensor, b: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """(A [E, r, K], B [E, N, r]), views."""
    return a.view(sizes.experts, -1, sizes.inputs), b.view(sizes.outputs, -1, sizes.experts).permute(2, 0, 1)


def _plus(weight: Tensor, a: Tensor, b: Tensor, scaling: float, sizes: Sizes) -> Tensor:
    """weight + scaling·B A, expert by expert, in the weight's layout and dtype."""
    a, b = by_expert(a.to(weight.dtype), b.to(weight.dtype), sizes)
    if weight.ndim == 2:
        return torch.addmm(weight, b[0], a[0], alpha=scaling)
    if weight.shape[1:] == (sizes.outputs, sizes.inputs):
        return torch.baddbmm(weight, b, a, alpha=scaling)
    return torch.baddbmm(weight, a.transpose(1, 2), b.transpose(1, 2), alpha=scaling)
