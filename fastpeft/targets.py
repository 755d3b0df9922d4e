"""Which modules of a model an adapter goes to, by the rules of Hugging Face peft 0.21.2 and with better answers when
nothing, or not everything, is found.

The rules are those of peft's `check_target_module_exists`, `inject_adapter` and `_maybe_include_all_linear_layers`.
Nothing here changes the model.
"""

import re
import sys
import warnings
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from fastpeft.configs import (
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
    AdaptionPromptConfig,
    LoraConfig,
    PeftConfig,
    PeftType,
    as_config,
)
from fastpeft.default_targets import (
    ADALORA_TARGETS,
    DEFAULT_TARGETS,
    PARAMETERS_ALONE,
    QUERY_VALUE_NAMES,
    UNCALLED_FAMILIES,
    UNCALLED_NAMES,
)
from fastpeft.errors import TargetError
from fastpeft.names import dotted_ends, leaf, listed, nearest, shortest_ends
from fastpeft.patterns import in_bounded_time, layer_index, matches_name, matches_tail
from fastpeft.quantised import entry_of
from fastpeft.tuners.prefix_encoder import PromptEncoders
from fastpeft.untrusted import shown

ALL_LINEAR = "all-linear"

# The children that a tuner adds to a module of the base model; what lies below them is never a target.
ADAPTER_CHILDREN = frozenset(
    (
        *("lora_A", "lora_B", "lora_E", "lora_embedding_A", "lora_embedding_B"),
        *("lora_dropout", "lora_magnitude_vector", "modules_to_save"),
    )
)

_MODULES_ONLY = ("exclude_modules", "layers_to_transform")

_SAID = 12  # how many entries of one kind a warning is for

_SUPPORTED = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)


@dataclass(frozen=True)
class Target:
    """One module that gets an adapter: its path, the module, and the rank and alpha that hold for it. parameter: which
    of its parameters, where the module itself is no target."""

    name: str
    module: nn.Module
    r: int
    alpha: int | float
    parameter: str | None = None


@dataclass(frozen=True)
class Resolution:
    """What a configuration means in one model. `config` is a copy with target_modules and modules_to_save filled in;
    `parameters` are what target_parameters names."""

    targets: tuple[Target, ...]
    saved_modules: tuple[str, ...]
    config: LoraConfig
    parameters: tuple[Target, ...] = ()


def resolve_targets(model: nn.Module, config: LoraConfig, method: PeftType = PeftType.LORA) -> Resolution:
    """The modules that `config` asks for, in the order of `model.named_modules()`, and the ones trained whole. Where
    it has no target_modules, those that are usual for the model and the method.

    Raises ConfigError for a configuration that cannot be honoured, TargetError when nothing matches, when a match is
    of a class that cannot carry the adapter, or when layers or modules are named that the model does not have. Warns
    about entries without a match.
    """
    if not isinstance(model, nn.Module):
        raise TargetError(f"expected a torch.nn.Module to adapt, not {type(model).__name__}")
    defaults = ADALORA_TARGETS if method is PeftType.ADALORA else DEFAULT_TARGETS
    selection = _Selection(model, as_config(config), defaults)
    with in_bounded_time():
        selection.fill_target_modules()
        selection.check_layers()
        chosen, parameters = selection.chosen(), selection.parameters()
        if not chosen and not parameters:
            raise TargetError(selection.why_nothing())
        targets = tuple(selection.target(name) for name in chosen)
        selection.warn(chosen, parameters)
    return Resolution(targets, selection.saved, selection.config, parameters)


def saved_modules(model: nn.Module, config: PeftConfig) -> tuple[str, ...]:
    """The paths of the modules that `config` trains whole; config.modules_to_save is extended by the heads of its task.

    A path counts if it ends with an entry; a module inside another one of them is trained with that one. An entry that
    matches nothing is legal if the task adds it. Raises TargetError for any other, and for a container of modules.
    """
    if isinstance(config, AdaptionPromptConfig) and config.modules_to_save == []:
        return ()  # a file of peft's, which has no heads
    # Every path, as in peft: one module may be reached by two, and is replaced under each.
    every = _modules_of(model, remove_duplicate=False)
    paths = list(every)
    heads = getattr(MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type), "heads", ())
    _add_heads(model, config, heads, paths)
    entries = config.modules_to_save or []
    for entry in entries:
        if entry not in heads and not any(name.endswith(entry) for name in paths):
            raise TargetError(f"modules_to_save={shown(entry)} is not in the model{nearest(entry, paths)}")
    found = [name for name in paths if name.endswith(tuple(entries))]
    for name in found:
        if isinstance(every[name], _CONTAINERS):
            kind = type(every[name]).__name__
            raise TargetError(f"modules_to_save matches {name}, a {kind}; name the modules in it instead")
    return tuple(name for name in found if not any(name.startswith(f"{outer}.") for outer in found))


def _add_heads(model: nn.Module, config: PeftConfig, heads: tuple[str, ...], paths: list[str]) -> None:
    entries = list(config.modules_to_save or [])
    missing = [head for head in heads if head not in entries]
    # A saved configuration names peft's heads already; then it says what its file holds, and nothing is added.
    if missing and missing == list(heads) and not any(name.endswith(heads) for name in paths):
        missing += [name for name in _beside_backbone(model) if name in paths]
    if missing:
        config.modules_to_save = list(dict.fromkeys(entries + missing))


def _beside_backbone(model: nn.Module) -> list[str]:
    """The children of a transformers model that have parameters and are neither its backbone nor what predicts tokens:
    the head, whatever it is called. peft leaves those that it has no name for random and untrained, as BART's, T5's
    and ModernBERT's."""
    backbone = getattr(model, "base_model_prefix", None)
    if backbone not in model._modules:
        return []
    others = (model._modules[backbone], model.get_output_embeddings())
    children = ((name, child) for name, child in model.named_children() if child not in others)
    return [name for name, child in children if next(child.parameters(), None) is not None]


class _Selection:
    """One configuration's view of one model."""

    def __init__(self, model: nn.Module, config: LoraConfig, defaults: dict):
        self.model = model
        self.defaults = defaults
        self.config = config
        self.by_user = config.target_modules
        self.modules = _modules_of(model)
        self.model_type = getattr(getattr(model, "config", None), "model_type", None)
        self.saved = saved_modules(model, config)

    @cached_property
    def linear(self) -> dict[str, nn.Module]:
        kinds = (nn.Linear, *_conv1d())
        return {name: module for name, module in self.modules.items() if isinstance(module, kinds) or entry_of(module)}

    # target_modules that the configuration leaves to us.

    def fill_target_modules(self) -> None:
        given, parameters = self.config.target_modules, self.config.target_parameters
        if parameters and not given:
            self.config.target_modules = self._defaults_beside_parameters() if given is None else set()
        elif given is None:
            self.config.target_modules = self._default_targets()
        elif isinstance(given, str) and given.lower() == ALL_LINEAR:
            self.config.target_modules = self._all_linear()
        elif not given:
            raise TargetError(f"target_modules={given!r} names nothing; the linear layers are {self._linear_leaves()}")

    def _defaults_beside_parameters(self) -> set[str] | str:
        """With target_parameters, peft needs no modules besides, and adds those that it has a default for."""
        known = () if self.model_type in PARAMETERS_ALONE else self.defaults.get(self.model_type, ())
        return known if isinstance(known, str) else set(known)

    def _default_targets(self) -> set[str]:
        known = self.defaults.get(self.model_type, ())
        found = {name for name in self.modules if _hits(known, name)}
        if found:
            return shortest_ends(found, self.modules.keys() - found) if isinstance(known, str) else set(known)
        attention = {name for name, module in self.modules.items() if _is_attention(module)}
        found = {
            name for name in self.linear if leaf(name) in QUERY_VALUE_NAMES and name.rpartition(".")[0] in attention
        }
        if not found:
            raise TargetError(
                f"there is no default for {self._kind()}; set target_modules, for example to some of its linear "
                f"layers: {self._linear_leaves()}"
            )
        return shortest_ends(found, self.modules.keys() - found)

    def _all_linear(self) -> set[str]:
        get_head = getattr(self.model, "get_output_embeddings", None)
        head = get_head() if callable(get_head) else None
        uncalled = UNCALLED_NAMES if self.model_type in UNCALLED_FAMILIES else ()
        found = {
            name
            for name, module in self.linear.items()
            if module is not head and not self._is_saved(name) and leaf(name) not in uncalled
        }
        if not found:
            raise TargetError(
                f"target_modules='all-linear': {self._kind()} has no linear layer besides its heads; name targets"
            )
        fused = sorted(name for name, module in self.modules.items() if _holds_experts(module))
        if fused:
            warnings.warn(
                f"target_modules='all-linear' leaves out {len(fused)} modules whose experts are one fused parameter "
                f"({listed(fused)}): they are not linear layers; target_parameters adapts them",
                stacklevel=4,
            )
        return shortest_ends(found, self.modules.keys() - found)

    # Matching.

    def chosen(self) -> list[str]:
        return [name for name in self.modules if self._in_layers(name) and not self._excluded(name)]

    @cached_property
    def hits(self) -> dict[str, str]:
        """Modules that target_modules names, layers and exclusions left aside -> the entry that names them."""
        found = ((name, _hits(self.config.target_modules, name)) for name in self.modules)
        return {name: entry for name, entry in found if entry}

    def _in_layers(self, name: str) -> bool:
        entry = self.hits.get(name)
        if entry is None:
            return False
        layers = self.layers
        # A module named by its whole path is meant, whatever its layer.
        return not layers or entry == name or self.layer_of(name) in layers

    @property
    def layers(self) -> list[int]:
        layers = self.config.layers_to_transform
        return [layers] if isinstance(layers, int) else layers or []

    def layer_of(self, name: str) -> int | None:
        patterns = self.config.layers_pattern
        if not patterns:
            number = re.match(r".*?\.[^.]*\.(\d+)\.", name)
            return int(number[1]) if number else None
        numbers = (layer_index(pattern, name) for pattern in ([patterns] if isinstance(patterns, str) else patterns))
        return next((number for number in numbers if number is not None), None)

    def check_layers(self) -> None:
        """Raises TargetError if layers are asked for that the model does not have."""
        if not self.layers:
            return
        present = {number for number in map(self.layer_of, self.modules) if number is not None}
        lists = sorted({leaf(name) for name, module in self.modules.items() if isinstance(module, nn.ModuleList)})
        if not present:
            raise TargetError(
                f"layers_pattern={shown(self.config.layers_pattern)} finds no numbered layers for layers_to_transform; "
                f"the model's lists of layers are called {listed(lists)}"
            )
        absent = sorted(set(self.layers) - present)
        if absent:
            raise TargetError(
                f"layers_to_transform={shown(self.config.layers_to_transform)}: the model has no layer "
                f"{listed(absent)}; its layers are {min(present)} to {max(present)}"
            )

    def _excluded(self, name: str) -> bool:
        return self._excluded_by_name(name) or self._is_saved(name)

    def _excluded_by_name(self, name: str) -> bool:
        return bool(self.config.exclude_modules) and bool(_hits(self.config.exclude_modules, name))

    def _is_saved(self, name: str) -> bool:
        """Whether a module is trained whole, or lies inside one that is."""
        return any(name == saved or name.startswith(f"{saved}.") for saved in self.saved)

    # What comes out.

    def target(self, name: str) -> Target:
        """Raises TargetError if the module cannot carry the adapter."""
        module, config = self.modules[name], self.config
        if not isinstance(module, (*_SUPPORTED, *_conv1d())) and entry_of(module) is None:
            kinds = ", ".join(kind.__name__ for kind in _SUPPORTED)
            raise TargetError(
                f"{name} is a {type(module).__name__}, which LoRA does not apply to; it applies to {kinds}, "
                "transformers' Conv1D, and quantised linear layers that fastpeft.quantised.register knows. Narrow "
                f"target_modules={_shown(self.by_user)} or set exclude_modules"
            )
        if self.model_type in UNCALLED_FAMILIES and leaf(name) in UNCALLED_NAMES:
            raise TargetError(
                f"{name}: {self.model_type} reads this weight in a fused kernel without calling the module, so an "
                f"adapter would do nothing; remove it from target_modules"
            )
        return Target(
            name,
            module,
            _looked_up(config.rank_pattern, name, config.r),
            _looked_up(config.alpha_pattern, name, config.lora_alpha),
        )

    def parameters(self) -> tuple[Target, ...]:
        """What target_parameters names, by peft's rule: a whole path, or its end after a dot. Exclusions and layers do
        not count."""
        named, config = frozenset(self.config.target_parameters or ()), self.config
        return tuple(
            Target(
                path,
                module,
                _looked_up(config.rank_pattern, f"{path}.{leaf}", config.r),
                _looked_up(config.alpha_pattern, f"{path}.{leaf}", config.lora_alpha),
                leaf,
            )
            for path, module in (self.modules.items() if named else ())
            for leaf, parameter in module._parameters.items()
            if parameter is not None and _hits(named, f"{path}.{leaf}")
        )

    def warn(self, chosen: list[str], parameters: tuple[Target, ...]) -> None:
        """Say which parts of the configuration have no effect."""
        useless = []
        adapted = [f"{each.name}.{each.parameter}" for each in parameters]
        idle = sorted(set(self.config.target_parameters or ()) - {end for name in adapted for end in dotted_ends(name)})
        useless += [f"target_parameters has {shown(entry)}, which adapts nothing" for entry in idle[:_SAID]]
        if parameters:
            useless += [f"{field} does not reach target_parameters" for field in _MODULES_ONLY if self._sets(field)]
        if isinstance(self.by_user, set):
            used = {end for name in chosen for end in dotted_ends(name)}
            named = {end for name in self.hits for end in dotted_ends(name)}
            entries = sorted(self.by_user - used)
            for entry in entries[:_SAID]:
                why = ": all that it names is excluded or in other layers" if entry in named else self._near(entry)
                useless.append(f"target_modules has {shown(entry)}, which adapts nothing{why}")
            if entries[_SAID:]:
                useless.append(f"target_modules has {len(entries[_SAID:])} more that adapt nothing")
        excluded = self.config.exclude_modules
        if excluded and not any(map(self._excluded_by_name, self.modules)):
            useless.append(f"exclude_modules={_shown(excluded)} is not in the model{self._near(excluded)}")
        for field in ("rank_pattern", "alpha_pattern"):
            every = [*chosen, *adapted]
            idle = [key for key in getattr(self.config, field) if not any(matches_tail(key, name) for name in every)]
            useless += [f"{field} has {key!r}, which matches no adapted module" for key in idle[:_SAID]]
            if idle[_SAID:]:
                useless.append(f"{field} has {len(idle[_SAID:])} more that match no adapted module")
        for name in chosen:
            if isinstance(self.modules.get(name.rpartition(".")[0]), nn.MultiheadAttention):
                useless.append(f"{name} belongs to a torch.nn.MultiheadAttention, which never calls it: exclude it")
        for sentence in useless:
            warnings.warn(sentence, stacklevel=3)

    def _sets(self, field: str) -> bool:
        return getattr(self.config, field) not in (None, set(), [])

    def why_nothing(self) -> str:
        given, named = self.config.target_modules, self.config.target_parameters
        if named and not given:
            leaves = {leaf for module in self.modules.values() for leaf in module._parameters}
            return (
                f"target_parameters={shown(named)} matches no parameter of {self._kind()}; give whole paths, or their "
                f"ends{nearest(named, leaves)}"
            )
        if not self.hits:
            text = f"target_modules={_shown(given)} matches no module of {self._kind()}{self._near(given)}"
            if isinstance(given, str):
                text += ". A string is a regular expression for the whole path: write ['name'] for a name"
            return f"{text}. The linear layers are {self._linear_leaves()}"
        left = [name for name in self.hits if self._in_layers(name)]
        if not left:
            return (
                f"target_modules={_shown(given)} matches modules, but none in layers_to_transform="
                f"{shown(self.config.layers_to_transform)} (layers_pattern={shown(self.config.layers_pattern)}), for "
                f"example {next(iter(self.hits))}; choose layers that have them"
            )
        saved = sum(map(self._is_saved, left))
        by_name = sum(map(self._excluded_by_name, left))
        return (
            f"all {len(left)} modules that target_modules={_shown(given)} matches are excluded: {by_name} by "
            f"exclude_modules={_shown(self.config.exclude_modules)}, {saved} because modules_to_save="
            f"{_shown(self.config.modules_to_save)} trains them whole; leave some in"
        )

    def _kind(self) -> str:
        return f"{type(self.model).__name__} (model type {self.model_type!r})"

    def _near(self, wanted: set[str] | str) -> str:
        return nearest(wanted, self.modules)

    def _linear_leaves(self) -> str:
        return listed(sorted({leaf(name) for name in self.linear})) or "none"


def _hits(named: set[str] | tuple[str, ...] | str, name: str) -> str | None:
    """The entry of target_modules or exclude_modules that names this module, if one does."""
    if isinstance(named, str):
        return named if matches_name(named, name) else None
    return next((end for end in dotted_ends(name) if end in named), None)


def _looked_up(pattern: dict, name: str, default: int | float) -> int | float:
    """The value of the first key that matches; a key that is the path itself counts even if it is no pattern of it."""
    return next((value for key, value in pattern.items() if matches_tail(key, name)), pattern.get(name, default))


def _conv1d() -> tuple[type, ...]:
    """transformers' Conv1D, if a model can have one: if its module has been imported."""
    module = sys.modules.get("transformers.pytorch_utils")
    return (module.Conv1D,) if module is not None else ()


def _modules_of(model: nn.Module, **options) -> dict[str, nn.Module]:
    """The model's modules by their paths, without itself and without what adapters have added."""
    every = dict(model.named_modules(**options))
    ours = tuple(f"{name}." for name, module in every.items() if isinstance(module, PromptEncoders))
    return {
        name: module
        for name, module in every.items()
        if name and ADAPTER_CHILDREN.isdisjoint(name.split(".")) and not f"{name}.".startswith(ours)
    }


def _is_attention(module: nn.Module) -> bool:
    return any("Attention" in kind.__name__ for kind in type(module).__mro__)


def _holds_experts(module: nn.Module) -> bool:
    """Whether a module keeps matrices of several experts in one 3-D parameter."""
    return not isinstance(module, _SUPPORTED) and any(
        parameter.ndim == 3 and min(parameter.shape) > 1 for parameter in module.parameters(recurse=False)
    )


def _shown(names: object) -> str:
    return listed(sorted(names)) if isinstance(names, set) else shown(names)
