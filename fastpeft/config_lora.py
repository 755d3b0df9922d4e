"""LoRA's configuration."""

import re
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field
from typing import Any, ClassVar

from fastpeft.config_base import (
    PeftConfig,
    PeftType,
    in_order,
    is_count,
    is_int,
    is_names,
    is_number,
    one_of,
    refuse,
    require_bool,
    require_pattern,
    require_patterns,
    require_saved_names,
    unhonoured,
)

# The initialisations of peft that loading does not repeat, so that an adapter made by one is as good as any other, and
# the field with the settings of each.
MADE_BY_PEFT = {"eva": "eva_config", "orthogonal": None, "mica": None, "lora_ga": "lora_ga_config"}


@dataclass
class LoraRuntimeConfig:
    """Settings that hold while a program runs and are never saved. None of them is honoured yet."""

    ephemeral_gpu_offload: bool = False


@dataclass
class LoraConfig(PeftConfig):
    """LoRA (Hu et al., arXiv 2106.09685), with peft's fields.

    r, lora_alpha: the rank, and what the update is scaled by, as lora_alpha / r.
    target_modules: a list of names (each the whole path of a module or its end after a dot), a string (a regular
    expression for the whole path) or "all-linear"; None takes the model family's default.
    exclude_modules: likewise, what is left out of these.
    layers_to_transform, layers_pattern: the numbers of the layers that get it, and what the list of layers is called.
    rank_pattern, alpha_pattern: other values of r and lora_alpha, by regular expressions for the end of a path.
    lora_dropout: the probability that an element of the update's input is left out in training.
    bias: which biases of the base model are trained: "none", "all", or "lora_only", those of the targets.
    lora_bias: whether B has a bias.
    modules_to_save: modules trained whole and saved besides; the head of the task is one of them by itself.
    use_rslora: lora_alpha / sqrt(r) in place of lora_alpha / r (arXiv 2312.03732).
    use_dora: the norms of the weight's rows are trained too (arXiv 2402.09353).
    init_lora_weights: True or False (B is zero or random), "gaussian", "pissa" and "pissa_niter_N" (arXiv 2404.02948),
    "olora" (arXiv 2406.01775).
    fan_in_fan_out: whether weights are stored as (K, N); what the layer's class says counts, with a warning.
    target_parameters: a list of names of parameters, such as the experts that lie in one tensor (each the whole path or
    its end after a dot, as in "experts.down_proj"), of 2 or 3 dimensions; each expert gets an update of its own.
    exclude_modules and layers_to_transform do not reach them, and dropout, DoRA and lora_bias do not go with them.
    """

    r: int = 8
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    lora_alpha: int | float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict | None = field(default_factory=dict)
    alpha_pattern: dict | None = field(default_factory=dict)
    megatron_config: Any = unhonoured(None)
    megatron_core: Any = unhonoured("megatron.core")
    trainable_token_indices: Any = unhonoured(None)
    loftq_config: Any = unhonoured(factory=dict)
    eva_config: Any = unhonoured(None)
    corda_config: Any = unhonoured(None)
    lora_ga_config: Any = unhonoured(None)
    use_dora: bool = False
    velora_config: Any = unhonoured(None)
    alora_invocation_tokens: Any = unhonoured(None)
    use_qalora: Any = unhonoured(False)
    qalora_group_size: Any = unhonoured(16)
    monteclora_config: Any = unhonoured(None)
    layer_replication: Any = unhonoured(None)
    runtime_config: LoraRuntimeConfig = field(default_factory=LoraRuntimeConfig)
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: Any = unhonoured(None)
    arrow_config: Any = unhonoured(None)
    kasa_config: Any = unhonoured(None)
    ensure_weight_tying: Any = unhonoured(False)

    method: ClassVar[PeftType | None] = PeftType.LORA
    tuner: ClassVar[str] = "fastpeft.tuners.lora_injection"

    def normalise(self) -> None:
        super().normalise()
        for name in ("target_modules", "exclude_modules"):
            if is_names(getattr(self, name)):
                setattr(self, name, set(getattr(self, name)))
        for name in ("modules_to_save", "target_parameters"):
            if is_names(getattr(self, name)):
                setattr(self, name, in_order(getattr(self, name)))
        if is_names(self.layers_pattern):
            self.layers_pattern = in_order(self.layers_pattern)
        if isinstance(self.layers_to_transform, list | tuple | set | frozenset | range):
            self.layers_to_transform = in_order(self.layers_to_transform)
        for name in ("rank_pattern", "alpha_pattern"):
            if getattr(self, name) is None or isinstance(getattr(self, name), Mapping):
                setattr(self, name, dict(getattr(self, name) or {}))
        runtime = self.runtime_config
        empty = runtime is None or isinstance(runtime, Mapping) and runtime == {"ephemeral_gpu_offload": False}
        if empty or _keeps_gpu(runtime):
            self.runtime_config = LoraRuntimeConfig()

    def validate(self) -> None:
        super().validate()
        for name in ("fan_in_fan_out", "use_rslora", "use_dora", "lora_bias"):
            require_bool(self, name)
        if not is_count(self.r):
            refuse("r", self.r, "the rank must be an int of at least 1")
        if not is_number(self.lora_alpha):
            refuse("lora_alpha", self.lora_alpha, "must be a finite int or float")
        if not is_number(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            refuse("lora_dropout", self.lora_dropout, "must be a number from 0 to below 1")
        if not one_of(self.bias, ["none", "all", "lora_only"]):
            refuse("bias", self.bias, "must be 'none', 'all' or 'lora_only'")
        self._validate_patterns("rank_pattern", is_count, "a rank, an int of at least 1")
        self._validate_patterns("alpha_pattern", is_number, "a finite int or float")
        self._validate_targets()
        self._validate_layers()
        self._validate_init()
        self._validate_parameters()
        if not _keeps_gpu(self.runtime_config):
            refuse("runtime_config", self.runtime_config, "fastpeft does not honour it; leave it at its default")

    def honours(self, which: Field) -> bool:
        settings = one_of(self.init_lora_weights, MADE_BY_PEFT) and MADE_BY_PEFT[self.init_lora_weights] == which.name
        return super().honours(which) or settings and isinstance(getattr(self, which.name), Mapping | None)

    def validate_new(self) -> None:
        if one_of(self.init_lora_weights, MADE_BY_PEFT):
            refuse("init_lora_weights", self.init_lora_weights, f"{_INITS}; such an adapter made by peft can be loaded")

    def trains(self, key: str) -> bool:
        """MiCA (arXiv 2604.01694) trains A alone."""
        return self.init_lora_weights != "mica" or not key.startswith(("lora_B", "lora_embedding_B"))

    def _validate_patterns(self, name: str, fits: Callable[[object], bool], wanted: str) -> None:
        patterns = getattr(self, name)
        if not isinstance(patterns, dict):
            refuse(name, patterns, "must be a dict from patterns to values")
        require_patterns(name, patterns)
        for pattern, value in patterns.items():
            require_pattern(f"a key of {name}", pattern)
            if not fits(value):
                refuse(f"{name}[{pattern!r}]", value, f"must be {wanted}")

    def _validate_targets(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, str):
                require_pattern(name, value)
            elif value is not None and not is_names(value):
                refuse(name, value, "must be a list of module names, a string (a regular expression) or None")
        require_saved_names(self)

    def _validate_parameters(self) -> None:
        named = self.target_parameters
        if named is not None and not is_names(named):
            refuse("target_parameters", named, "must be a list of names of parameters or None")
        if not named:
            return
        for name, neutral in _WITHOUT_PARAMETERS.items():
            if getattr(self, name) != neutral:
                refuse(name, getattr(self, name), f"target_parameters needs {neutral}; set it, or leave them out")
        if not isinstance(self.init_lora_weights, bool) and self.init_lora_weights not in ("gaussian", "eva"):
            refuse("init_lora_weights", self.init_lora_weights, "target_parameters needs True, False or 'gaussian'")

    def _validate_layers(self) -> None:
        layers, pattern = self.layers_to_transform, self.layers_pattern
        numbers = layers if isinstance(layers, list) else [] if layers is None else [layers]
        if not all(is_int(number) and number >= 0 for number in numbers):
            refuse("layers_to_transform", layers, "must be a layer's number, a list of them, from 0 up, or None")
        if isinstance(pattern, str) or is_names(pattern):
            entries = [pattern] if isinstance(pattern, str) else pattern
            require_patterns("layers_pattern", entries)
            for entry in entries:
                require_pattern("layers_pattern", entry)
        elif pattern is not None:
            refuse("layers_pattern", pattern, "must be the name of the list of layers, a list of such names, or None")
        if isinstance(self.target_modules, str) and (layers is not None or pattern is not None):
            name = "layers_to_transform" if layers is not None else "layers_pattern"
            refuse(name, getattr(self, name), "needs a list of target_modules; write the layers into the string")
        if pattern and layers is None:
            refuse("layers_pattern", pattern, "has no effect without layers_to_transform; set that, or leave this out")

    def _validate_init(self) -> None:
        init = self.init_lora_weights
        named = isinstance(init, str) and re.fullmatch(r"gaussian|olora|pissa(_niter_\d{1,4})?", init)
        if not isinstance(init, bool) and not named and not one_of(init, MADE_BY_PEFT):
            refuse("init_lora_weights", init, _INITS)
        if self.lora_bias and not isinstance(init, bool):
            refuse("lora_bias", True, f"needs init_lora_weights True or False, not {init!r}")
        if self.lora_bias and self.use_dora:
            refuse("lora_bias", True, "does not go with use_dora=True; set one of them to False")


_INITS = "fastpeft has True, False, 'gaussian', 'pissa', 'pissa_niter_N' and 'olora'; choose one"

# What does not go with target_parameters, in peft neither: the update of a parameter cannot be told from the product
# that the parameter is used in.
_WITHOUT_PARAMETERS = {"lora_dropout": 0.0, "use_dora": False, "lora_bias": False, "fan_in_fan_out": False}


def _keeps_gpu(runtime: object) -> bool:
    return getattr(runtime, "ephemeral_gpu_offload", None) is False
