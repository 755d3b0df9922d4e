"""A whole method, as somebody would add it: (IA)³ (Liu et al., arXiv 2205.05638, section 3.3) on linear layers, whose
outputs are multiplied by a learned vector. CONTRIBUTING.md walks through it; tests/test_new_tuner.py runs it.

Of one's own it is two modules, the configuration in `fastpeft/config_<method>.py` and the rest in `fastpeft/tuners/`.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from fastpeft.configs import PeftConfig, refuse
from fastpeft.errors import TargetError
from fastpeft.tuners.layer import AdapterLayer, attach


@dataclass
class Ia3Config(PeftConfig):
    """(IA)³, with two of peft's fields: the ends of the modules' paths, and those whose input is scaled (none)."""

    target_modules: list[str] | None = None
    feedforward_modules: list[str] | None = None

    method: ClassVar[str] = "IA3"
    tuner: ClassVar[str] = "tests.new_tuner"  # the module with `plan` and `inject`

    def validate(self) -> None:
        super().validate()
        if not self.target_modules:
            refuse("target_modules", self.target_modules, "name the linear layers to scale")
        if self.feedforward_modules:
            refuse("feedforward_modules", self.feedforward_modules, "inputs are not scaled here; leave it empty")


class ScaledLinear(AdapterLayer):
    """A linear layer, in front of its own class: y = (x Wᵀ + bias)⊙l for the adapters in use."""

    prefix = "Scaled"
    containers = {"ia3_l": nn.ParameterDict}

    def add_adapter(self, name: str, init: bool) -> None:
        shape, weight = (self.out_features, 1), self.weight
        vector = torch.ones(shape, device=weight.device) if init else torch.empty(shape, device=weight.device)
        self.ia3_l[name] = nn.Parameter(vector)
        self._fastpeft.adapters[name] = None

    def delete_adapter(self, name: str) -> None:
        if name in self.ia3_l:
            del self.ia3_l[name]
        self._fastpeft.adapters.pop(name, None)

    def parameters_of(self, name: str) -> dict[str, torch.Tensor]:
        return {"ia3_l": self.ia3_l[name]}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.base_forward(x)
        for name in self.active_adapters():
            out = out * self.ia3_l[name].flatten().to(out.dtype)
        return out

    def prepare_merge(self, names) -> None:
        """Not merged; it stays in use beside what is."""

    def unmerge(self) -> None:
        """Nothing to undo."""


@dataclass(frozen=True)
class Plan:
    """What will be touched; nothing has been yet."""

    config: Ia3Config
    layers: tuple[tuple[str, nn.Linear], ...]
    targets = ()
    saved = ()

    def file_shapes(self) -> dict[str, tuple[int, ...]]:
        return {f"base_model.model.{path}.ia3_l": (layer.out_features, 1) for path, layer in self.layers}

    def in_today_s_layout(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return tensors


def plan(model: nn.Module, config: Ia3Config) -> Plan:
    """Find and check everything. Raises TargetError; the model is not touched."""
    ends = tuple(f".{each}" for each in config.target_modules)
    found = tuple((path, module) for path, module in model.named_modules() if f".{path}".endswith(ends))
    for path, module in found:
        if not isinstance(module, nn.Linear) or isinstance(module, AdapterLayer) and type(module).prefix != "Scaled":
            raise TargetError(f"{path} is a {type(module).__name__}; linear layers without another adapter are needed")
    if not found:
        raise TargetError(f"target_modules={config.target_modules!r} matches nothing in {type(model).__name__}")
    return Plan(config, found)


def inject(plan: Plan, name: str, state, *, init: bool, autocast: bool) -> None:
    """Cannot fail for what `plan` has checked. Without `init` a file fills the vectors."""
    for _, layer in plan.layers:
        if not isinstance(layer, AdapterLayer):
            attach(layer, ScaledLinear, state)
        layer.add_adapter(name, init)
