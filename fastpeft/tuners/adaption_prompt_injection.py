"""LLaMA-Adapter's part in patching: the plan, and the injection that cannot fail for what the plan has checked."""

from dataclasses import dataclass

import torch
from torch import nn

from fastpeft.attention.interface import register, switch
from fastpeft.attention.prompts import check_projections
from fastpeft.attention.sites import find_sites
from fastpeft.configs import AdaptionPromptConfig
from fastpeft.errors import TargetError
from fastpeft.names import leaf, listed
from fastpeft.prefix_geometry import geometry
from fastpeft.targets import saved_modules
from fastpeft.tuners.attention_layer import NOTHING, AdaptedAttention
from fastpeft.tuners.layer import AdapterLayer, attach
from fastpeft.tuners.saved_modules import SavedModule, check_apart, check_saved, own_tensors


@dataclass(frozen=True)
class Plan:
    """What gated prompts will touch: attention modules, others that must know of it, their configurations, and the
    modules trained whole."""

    config: AdaptionPromptConfig
    hidden: int
    attention: tuple[tuple[str, nn.Module, type[AdaptedAttention]], ...]
    others: tuple[tuple[str, nn.Module, type[AdaptedAttention]], ...]
    configs: tuple
    saved: tuple[tuple[str, nn.Module], ...]
    targets = ()

    def in_today_s_layout(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A file's tensors as they are: there has been one layout only."""
        return tensors

    def file_shapes(self) -> dict[str, tuple[int, ...]]:
        """The names and shapes of the tensors in the adapter's file."""
        out = {}
        for name, _, _ in self.attention:
            out[f"base_model.model.{name}.adaption_prompt"] = (1, self.config.adapter_len, self.hidden)
            out[f"base_model.model.{name}.adaption_gate"] = (1,)
        for name, module in self.saved:
            out.update({f"base_model.model.{name}.{key}": tuple(t.shape) for key, t in own_tensors(module).items()})
        return out


def plan(model: nn.Module, config: AdaptionPromptConfig) -> Plan:
    """Resolve and check everything; the model is not touched. Raises TargetError or ConfigError."""
    sites = find_sites(model)
    names = {leaf(name) for name, _, _ in sites.attention}
    if config.target_modules is None and len(names) == 1:
        config.target_modules = next(iter(names))
    chosen = [site for site in sites.attention if leaf(site[0]) == config.target_modules]
    if not chosen:
        raise TargetError(
            f"target_modules={listed([config.target_modules])}: no attention module of this {type(model).__name__} is "
            f"called that; they are called {listed(sorted(names))}"
        )
    if len(chosen) < config.adapter_layers:
        shares = sites.layers > len(chosen)
        shared = f", which {sites.layers} layers share, and a module has one prompt" if shares else ""
        raise TargetError(
            f"adapter_layers={config.adapter_layers!r}: this {type(model).__name__} has {len(chosen)} attention "
            f"modules called {config.target_modules!r}{shared}; choose no more"
        )
    chosen = chosen[-config.adapter_layers :]
    for name, module, mixin in chosen:
        check_projections(name, module, mixin)
    saved = tuple((name, model.get_submodule(name)) for name in saved_modules(model, config))
    check_saved(model, saved)
    check_apart(model, saved, [site[0] for site in sites.attention], "a gated prompt")
    others = tuple(site for site in sites.attention if site not in chosen and site[2].attends_itself)
    return Plan(config, geometry(model).width, tuple(chosen), others, sites.configs, saved)


def inject(plan: Plan, name: str, state, *, init: bool, autocast: bool) -> None:
    """Give each attention module its prompt and gate, in the order of the layers. They stay in the base's dtype."""
    register()
    for each in plan.configs:
        switch(each)
    for _, module, mixin in plan.attention:
        if not isinstance(module, AdapterLayer):
            attach(module, mixin, state)
        module.add_prompt(name, plan.config.adapter_len, plan.hidden, init)
    for _, module, mixin in plan.others:
        if not isinstance(module, AdapterLayer):
            attach(module, mixin, state)
        module._fastpeft.adapters[name] = NOTHING
    for _, module in plan.saved:
        if not isinstance(module, AdapterLayer):
            attach(module, SavedModule, state)
        module.add_adapter(name)
