"""Prefix tuning's part in patching: the plan, and the injection that cannot fail for what the plan has checked."""

from dataclasses import dataclass

import torch
from torch import nn

from fastpeft.attention.interface import register, switch
from fastpeft.attention.sites import Sites, find_sites
from fastpeft.configs import PrefixTuningConfig
from fastpeft.errors import ConfigError
from fastpeft.prefix_geometry import fill_prompt_dims
from fastpeft.targets import saved_modules
from fastpeft.tuners.attention_layer import Slice
from fastpeft.tuners.layer import AdapterLayer, attach
from fastpeft.tuners.prefix_encoder import PrefixEncoder, PromptEncoders
from fastpeft.tuners.saved_modules import SavedModule, check_saved, own_tensors


@dataclass(frozen=True)
class Plan:
    """What a prefix will touch: the attention modules, what makes something of positions, and the modules it trains
    whole."""

    model: nn.Module
    config: PrefixTuningConfig
    sites: Sites
    saved: tuple[tuple[str, nn.Module], ...]
    targets = ()

    def file_shapes(self) -> dict[str, tuple[int, ...]]:
        """The names and shapes of the tensors in the adapter's file."""
        config = self.config
        out = {"prompt_embeddings": (config.num_virtual_tokens, 2 * config.num_layers * config.token_dim)}
        for name, module in self.saved:
            out.update({f"base_model.{name}.{key}": tuple(t.shape) for key, t in own_tensors(module).items()})
        return out


def plan(model: nn.Module, config: PrefixTuningConfig) -> Plan:
    """Resolve and check everything; the model is not touched. Raises TargetError or ConfigError."""
    config = fill_prompt_dims(model, config)
    sites = find_sites(model)
    if len(sites.attention) > config.num_layers:
        raise ConfigError(
            f"num_layers={config.num_layers!r}: this {type(model).__name__} has {len(sites.attention)} layers that "
            "attend; leave it out"
        )
    saved = tuple((name, model.get_submodule(name)) for name in saved_modules(model, config))
    check_saved(model, saved)
    return Plan(model, config, sites, saved)


def blocks_of(config: PrefixTuningConfig, layer: int) -> tuple[int, int]:
    """Which columns of the table are a layer's keys and values. For two submodules HF peft lays the table out twice and
    takes the first two of every four blocks, so that half of them are never read."""
    if config.legacy_bloom_layout:
        return layer, config.num_layers + layer
    if config.num_transformer_submodules == 2:
        return 4 * layer % (2 * config.num_layers), (4 * layer + 1) % (2 * config.num_layers)
    return 2 * layer, 2 * layer + 1


def inject(plan: Plan, name: str, state, *, init: bool, autocast: bool) -> None:
    """Build the encoder, and let the attention modules find their share of it. Without `init` it is a table to be
    filled from a file. The prefix is always fp32, as HF peft's."""
    config = plan.config
    hidden = config.encoder_hidden_size if config.prefix_projection and init else None
    encoder = PrefixEncoder(config.num_virtual_tokens, config.token_dim, 2 * config.num_layers, hidden)
    if init and config.init_weights == "zero":
        encoder.zero()
    device = next((p.device for p in plan.sites.attention[0][1].parameters()), torch.device("cpu"))
    holder = plan.model._modules.get(PromptEncoders.NAME)
    if holder is None:
        holder = PromptEncoders(plan.model, state)
        plan.model.add_module(PromptEncoders.NAME, holder)
    holder.add_adapter(name, encoder.to(device))
    register()
    for each in plan.sites.configs:
        switch(each)
    for layer, (_, module, mixin) in enumerate(plan.sites.attention):
        if not isinstance(module, AdapterLayer):
            attach(module, mixin, state)
        share = Slice(encoder, *blocks_of(config, layer), config.num_attention_heads, config.prefix_window)
        module._fastpeft.adapters[name] = share
    for _, module, mixin in plan.sites.positions:
        if not isinstance(module, AdapterLayer):
            attach(module, mixin, state)
        module._fastpeft.adapters[name] = config.num_virtual_tokens
    for _, module in plan.saved:
        if not isinstance(module, AdapterLayer):
            attach(module, SavedModule, state)
        module.add_adapter(name)
