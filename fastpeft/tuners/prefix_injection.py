"""Prefix tuning's part in patching: the plan, and the injection that cannot fail for what the plan has checked."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastpeft.attention.interface import register, switch
from fastpeft.attention.sites import Sites, find_sites
from fastpeft.configs import PrefixTuningConfig
from fastpeft.errors import ConfigError, TargetError
from fastpeft.prefix_geometry import fill_prompt_dims
from fastpeft.targets import saved_modules
from fastpeft.tuners.attention_layer import Slice
from fastpeft.tuners.layer import AdapterLayer, attach, runs_on
from fastpeft.tuners.prefix_encoder import TABLE, PrefixEncoder, PromptEncoders
from fastpeft.tuners.saved_modules import SavedModule, check_apart, check_saved, own_tensors


@dataclass(frozen=True)
class Part:
    """A stack of layers with a prefix, and the table behind it: `blocks` blocks of `heads` heads, `width` wide."""

    name: str
    sites: Sites
    heads: int
    width: int
    blocks: int


@dataclass(frozen=True)
class Plan:
    """What a prefix will touch: stacks of attention modules, of which the first is HF peft's own, and the modules it
    trains whole."""

    model: nn.Module
    config: PrefixTuningConfig
    parts: tuple[Part, ...]
    saved: tuple[tuple[str, nn.Module], ...]
    resumes: bool = False
    targets = ()

    def resuming(self) -> "Plan":
        """The same for an adapter whose network is there to be filled."""
        return dataclasses.replace(self, resumes=True)

    def in_today_s_layout(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """A file's tensors, where `legacy_bloom_layout` says that all keys come before all values; then it is over."""
        if not self.config.legacy_bloom_layout:
            return tensors
        keys, values = (t.unflatten(1, (self.config.num_layers, -1)) for t in tensors[TABLE].chunk(2, 1))
        self.config.legacy_bloom_layout = False
        return {**tensors, TABLE: torch.stack((keys, values), 2).flatten(1)}

    def file_shapes(self) -> dict[str, tuple[int, ...]]:
        """The names and shapes of the tensors in the adapter's file."""
        names = [TABLE, *(f"{TABLE}_{part.name}" for part in self.parts[1:])]
        rows = self.config.num_virtual_tokens
        out = {name: (rows, part.blocks * part.width) for name, part in zip(names, self.parts, strict=True)}
        for name, module in self.saved:
            out.update({f"base_model.{name}.{key}": tuple(t.shape) for key, t in own_tensors(module).items()})
        return out


def plan(model: nn.Module, config: PrefixTuningConfig) -> Plan:
    """Resolve and check everything; the model is not touched. Raises TargetError or ConfigError."""
    config = fill_prompt_dims(model, config)
    sites = find_sites(model)
    if sites.layers > config.num_layers:
        raise ConfigError(
            f"num_layers={config.num_layers!r}: this {type(model).__name__} has {sites.layers} layers that attend; "
            "leave it out"
        )
    if sites.layers < config.num_layers and not hasattr(sites.attention[0][1], "layer_idx"):
        raise TargetError(
            f"this {type(model).__name__} has {sites.layers} attention modules for {config.num_layers} layers, and "
            "nothing says which of them a call is for, so they cannot have a prefix each; use LoRA"
        )
    for path, module, _ in sites.positions:
        rows = getattr(module, "num_embeddings", None)
        if rows is not None and config.num_virtual_tokens >= rows - getattr(module, "offset", 0):
            raise ConfigError(
                f"num_virtual_tokens={config.num_virtual_tokens!r}: {path} has {rows} positions for virtual and real "
                "tokens together; use fewer"
            )
    parts = [Part("decoder", sites, config.num_attention_heads, config.token_dim, 2 * config.num_layers)]
    for name, wanted in (("encoder", config.encoder_prefix), ("cross", config.cross_prefix)):
        if wanted:
            parts.append(_other_part(model, name))
            if parts[-1].sites.attention[0][1] is sites.attention[0][1]:
                raise ConfigError(
                    f"{name}_prefix=True: the {name} is all that this {type(model).__name__} has, and has the prefix; "
                    "leave it out"
                )
    for part in parts:
        for path, module, mixin in (*part.sites.attention, *part.sites.companions):
            if isinstance(module, AdapterLayer) and not isinstance(module, mixin):
                raise TargetError(
                    f"{path} carries another adapter already, beside which a prefix has no place; leave it out there"
                )
    saved = tuple((name, model.get_submodule(name)) for name in saved_modules(model, config))
    check_saved(model, saved)
    paths = [site[0] for part in parts for site in (*part.sites.attention, *part.sites.companions)]
    check_apart(model, saved, paths, "a prefix")
    return Plan(model, config, tuple(parts), saved)


def _other_part(model: nn.Module, name: str) -> Part:
    """The encoder, or the cross-attention, of a sequence-to-sequence model: as wide as its own keys are."""
    sites = find_sites(model, name)
    module = sites.attention[0][1]
    heads = next(getattr(module, each) for each in ("num_heads", "n_heads") if hasattr(module, each))
    width = next(getattr(module, each).out_features for each in ("k_proj", "k") if hasattr(module, each))
    return Part(name, sites, heads, width, 2 * sites.layers)


def blocks_of(config: PrefixTuningConfig, layer: int) -> tuple[int, int]:
    """Which columns of the table are a layer's keys and values. For two submodules HF peft lays the table out twice and
    takes the first two of every four blocks, so that half of them are never read."""
    if config.num_transformer_submodules == 2:
        return 4 * layer % (2 * config.num_layers), (4 * layer + 1) % (2 * config.num_layers)
    return 2 * layer, 2 * layer + 1


def inject(plan: Plan, name: str, state, *, init: bool, autocast: bool) -> None:
    """Build the encoders, and let the attention modules find their share of them. Without `init` they are tables to be
    filled from a file. A prefix is always fp32, as HF peft's."""
    config = plan.config
    hidden = config.encoder_hidden_size if config.prefix_projection and (init or plan.resumes) else None
    encoders = [PrefixEncoder(config.num_virtual_tokens, part.width, part.blocks, hidden) for part in plan.parts]
    encoders[0].parts.update({part.name: each for part, each in zip(plan.parts[1:], encoders[1:], strict=True)})
    if init and config.init_weights == "zero":
        encoders[0].zero()
    device = runs_on(plan.parts[0].sites.attention[0][1])
    PromptEncoders.of(plan.model, state).add_adapter(name, encoders[0].to(device))
    register()
    for part, encoder in zip(plan.parts, encoders, strict=True):
        attach_part(part, encoder, name, state, config)
    for _, module in plan.saved:
        if not isinstance(module, AdapterLayer):
            attach(module, SavedModule, state)
        module.add_adapter(name)


def attach_part(part: Part, encoder: PrefixEncoder, name: str, state, config: PrefixTuningConfig) -> None:
    """Let the attention modules of a stack find their blocks of an encoder, whoever holds that."""
    for each in part.sites.configs:
        switch(each)
    for (_, module, mixin), passes in zip(part.sites.attention, part.sites.passes, strict=True):
        if not isinstance(module, AdapterLayer):
            attach(module, mixin, state)
        blocks = {
            number: blocks_of(config, layer) if part.name == "decoder" else (2 * layer, 2 * layer + 1)
            for number, layer in passes.items()
        }
        module._fastpeft.adapters[name] = Slice(encoder, blocks, part.heads, config.prefix_window)
    for _, module, mixin in part.sites.companions:
        if not isinstance(module, AdapterLayer):
            attach(module, mixin, state)
        module._fastpeft.adapters[name] = config.num_virtual_tokens
