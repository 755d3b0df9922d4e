"""What the user asks for: the configuration classes of Hugging Face peft 0.21.2, checked in words.

Names, order and defaults of the fields are peft's, so that a configuration, a `peft.LoraConfig` object and the dict of
an adapter_config.json mean the same everywhere. A field that fastpeft does not honour is there too, at its default
only: setting it is an error, never ignored. Fields that merely describe where an adapter comes from (`peft_version`,
`revision`, `base_model_name_or_path`, `auto_mapping`, `inference_mode`) are kept and written back.
"""

import math
import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from enum import Enum
from typing import Any, ClassVar, NoReturn

from fastpeft.errors import ConfigError
from fastpeft.patterns import pattern_problem

FORMAT_VERSION = "0.21.2"  # the peft whose adapter_config.json is written

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 120
_repr.maxlist = _repr.maxset = _repr.maxtuple = _repr.maxdict = 12


class PeftType(str, Enum):
    """The methods, named as in peft."""

    PROMPT_TUNING = "PROMPT_TUNING"
    P_TUNING = "P_TUNING"
    PREFIX_TUNING = "PREFIX_TUNING"
    LORA = "LORA"
    ADALORA = "ADALORA"
    ADAPTION_PROMPT = "ADAPTION_PROMPT"


class TaskType(str, Enum):
    """The tasks, named as in peft."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


@dataclass
class LoraRuntimeConfig:
    """Settings that hold while a program runs and are never saved. None of them is honoured yet."""

    ephemeral_gpu_offload: bool = False


def refuse(name: str, value: object, why: str) -> NoReturn:
    """Raises ConfigError for a field: its name, its value, what is wrong and what to write instead."""
    raise ConfigError(f"{name}={_repr.repr(value)}: {why}")


def _unhonoured(default: Any = MISSING, factory: Any = MISSING) -> Any:
    return field(default=default, default_factory=factory, metadata={"honoured": False})


@dataclass
class PeftConfig:
    """What every method's configuration has. Raises ConfigError for a value that cannot be honoured."""

    task_type: TaskType | str | None = None
    peft_type: PeftType | str | None = None
    auto_mapping: dict | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    method: ClassVar[PeftType | None] = None

    def __post_init__(self):
        if self.peft_type is None or self.peft_type == self.method:
            self.peft_type = self.method
        if self.peft_version is None:
            self.peft_version = FORMAT_VERSION
        self.normalise()
        self.validate()

    def normalise(self) -> None:
        """Give equal requests one form, in containers of this object's own. What has the wrong type stays as it is."""
        if isinstance(self.auto_mapping, Mapping):
            self.auto_mapping = dict(self.auto_mapping)
        if isinstance(self.task_type, str) and self.task_type in list(TaskType):
            self.task_type = TaskType(self.task_type)

    def validate(self) -> None:
        """Raises ConfigError unless every field is one that fastpeft can honour. Changes nothing."""
        if self.peft_type != self.method:
            refuse("peft_type", self.peft_type, f"a {type(self).__name__} is for {_value(self.method)}; leave it out")
        if self.task_type is not None and self.task_type not in list(TaskType):
            refuse("task_type", self.task_type, f"choose one of {', '.join(t.value for t in TaskType)}")
        for name in ("peft_version", "base_model_name_or_path", "revision"):
            if not isinstance(getattr(self, name), str | None):
                refuse(name, getattr(self, name), "must be a string or None")
        mapping = self.auto_mapping
        if mapping is not None and not (isinstance(mapping, dict) and all(isinstance(key, str) for key in mapping)):
            refuse("auto_mapping", mapping, "must be a dict with string keys or None")
        require_bool(self, "inference_mode")
        for each in fields(self):
            if not each.metadata.get("honoured", True) and not _neutral(getattr(self, each.name), _default(each)):
                why = f"fastpeft does not honour this field; leave it at its default {_default(each)!r}"
                refuse(each.name, getattr(self, each.name), why)

    def to_dict(self) -> dict:
        """All fields but `runtime_config`, as a dict of this object's values; enums stay enums, as in peft."""
        values = asdict(self)
        values.pop("runtime_config", None)
        return values

    def to_file_dict(self, auto_mapping: dict | None = None) -> dict:
        """What peft writes to adapter_config.json, with JSON's types only and lists in a fixed order.

        peft fills `auto_mapping` in when there is no task type: {"base_model_class": ..., "parent_library": ...}.
        """
        values = {name: _to_json(value) for name, value in self.to_dict().items()}
        values["inference_mode"] = True
        if auto_mapping is not None:
            values["auto_mapping"] = dict(auto_mapping)
        return values

    @classmethod
    def from_dict(cls, values: Mapping) -> "PeftConfig":
        """The configuration that `to_dict` or an adapter_config.json describes; on PeftConfig, of any method.

        Raises ConfigError for a field that is not known and not empty, besides what `validate` refuses.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"a configuration must be a dict of fields, not {type(values).__name__}")
        target = cls if cls.method is not None and "peft_type" not in values else _class_for(values.get("peft_type"))
        if not issubclass(target, cls):
            refuse("peft_type", values["peft_type"], f"a {cls.__name__} is for {_value(cls.method)}")
        known = {each.name for each in fields(target)}
        for name in values:
            if name not in known and not _neutral(values[name], None):
                why = f"{target.__name__} has no such field (of a newer peft?); remove it if the adapter works without"
                refuse(str(name), values[name], why)
        return target(**{name: value for name, value in values.items() if name in known})


@dataclass
class LoraConfig(PeftConfig):
    """LoRA (Hu et al., arXiv 2106.09685), with peft's fields.

    target_modules: a list of names (each the whole path of a module or its end after a dot), a string (a regular
    expression for the whole path) or "all-linear"; None takes the model family's default. rank_pattern and
    alpha_pattern map regular expressions for the end of a path to other values of r and lora_alpha.
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
    megatron_config: Any = _unhonoured(None)
    megatron_core: Any = _unhonoured("megatron.core")
    trainable_token_indices: Any = _unhonoured(None)
    loftq_config: Any = _unhonoured(factory=dict)
    eva_config: Any = _unhonoured(None)
    corda_config: Any = _unhonoured(None)
    lora_ga_config: Any = _unhonoured(None)
    use_dora: bool = False
    velora_config: Any = _unhonoured(None)
    alora_invocation_tokens: Any = _unhonoured(None)
    use_qalora: Any = _unhonoured(False)
    qalora_group_size: Any = _unhonoured(16)
    monteclora_config: Any = _unhonoured(None)
    layer_replication: Any = _unhonoured(None)
    runtime_config: LoraRuntimeConfig = field(default_factory=LoraRuntimeConfig)
    lora_bias: bool = False
    target_parameters: Any = _unhonoured(None)
    use_bdlora: Any = _unhonoured(None)
    arrow_config: Any = _unhonoured(None)
    kasa_config: Any = _unhonoured(None)
    ensure_weight_tying: Any = _unhonoured(False)

    method: ClassVar[PeftType | None] = PeftType.LORA

    def normalise(self) -> None:
        super().normalise()
        for name in ("target_modules", "exclude_modules"):
            if _is_names(getattr(self, name)):
                setattr(self, name, set(getattr(self, name)))
        if _is_names(self.modules_to_save):
            self.modules_to_save = _in_order(self.modules_to_save)
        if _is_names(self.layers_pattern):
            self.layers_pattern = _in_order(self.layers_pattern)
        if isinstance(self.layers_to_transform, list | tuple | set | frozenset | range):
            self.layers_to_transform = _in_order(self.layers_to_transform)
        for name in ("rank_pattern", "alpha_pattern"):
            if getattr(self, name) is None or isinstance(getattr(self, name), Mapping):
                setattr(self, name, dict(getattr(self, name) or {}))
        runtime = self.runtime_config
        if runtime in (None, {"ephemeral_gpu_offload": False}) or _keeps_gpu(runtime):
            self.runtime_config = LoraRuntimeConfig()

    def validate(self) -> None:
        super().validate()
        for name in ("fan_in_fan_out", "use_rslora", "use_dora", "lora_bias"):
            require_bool(self, name)
        if not _is_rank(self.r):
            refuse("r", self.r, "the rank must be an int of at least 1")
        if not _is_number(self.lora_alpha):
            refuse("lora_alpha", self.lora_alpha, "must be a finite int or float")
        if not _is_number(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            refuse("lora_dropout", self.lora_dropout, "must be a number from 0 to below 1")
        if self.bias not in ("none", "all", "lora_only"):
            refuse("bias", self.bias, "must be 'none', 'all' or 'lora_only'")
        self._validate_patterns("rank_pattern", _is_rank, "a rank, an int of at least 1")
        self._validate_patterns("alpha_pattern", _is_number, "a finite int or float")
        self._validate_targets()
        self._validate_layers()
        self._validate_init()
        if not _keeps_gpu(self.runtime_config):
            refuse("runtime_config", self.runtime_config, "fastpeft does not honour it; leave it at its default")

    def _validate_patterns(self, name: str, fits: Callable[[object], bool], wanted: str) -> None:
        patterns = getattr(self, name)
        if not isinstance(patterns, dict):
            refuse(name, patterns, "must be a dict from patterns to values")
        for pattern, value in patterns.items():
            require_pattern(f"a key of {name}", pattern)
            if not fits(value):
                refuse(f"{name}[{pattern!r}]", value, f"must be {wanted}")

    def _validate_targets(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, str):
                require_pattern(name, value)
            elif value is not None and not _is_names(value):
                refuse(name, value, "must be a list of module names, a string (a regular expression) or None")
        if self.modules_to_save is not None and not _is_names(self.modules_to_save):
            refuse("modules_to_save", self.modules_to_save, "must be a list of module names or None, as in ['lm_head']")

    def _validate_layers(self) -> None:
        layers, pattern = self.layers_to_transform, self.layers_pattern
        numbers = layers if isinstance(layers, list) else [] if layers is None else [layers]
        if not all(_is_int(number) and number >= 0 for number in numbers):
            refuse("layers_to_transform", layers, "must be a layer's number, a list of them, from 0 up, or None")
        if isinstance(pattern, str) or _is_names(pattern):
            for entry in [pattern] if isinstance(pattern, str) else pattern:
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
        if not isinstance(init, bool) and not named:
            refuse(
                "init_lora_weights", init, "fastpeft has True, False, 'gaussian', 'pissa', 'pissa_niter_N' and 'olora'"
            )
        if self.lora_bias and not isinstance(init, bool):
            refuse("lora_bias", True, f"needs init_lora_weights True or False, not {init!r}")
        if self.lora_bias and self.use_dora:
            refuse("lora_bias", True, "does not go with use_dora=True; set one of them to False")


# Method -> configuration class; a method that is in PeftType and not here is known and not yet supported.
PEFT_TYPE_TO_CONFIG_MAPPING: dict[PeftType, type[PeftConfig]] = {PeftType.LORA: LoraConfig}


def as_config(config: object) -> PeftConfig:
    """A checked configuration of our own, made from one of ours, a `peft` one, or the dict of an adapter_config.json.

    Always a new object: nothing that the caller holds is changed later. Raises ConfigError.
    """
    if isinstance(config, PeftConfig):
        _class_for(config.peft_type)
        return type(config)(**{each.name: getattr(config, each.name) for each in fields(config)})
    if isinstance(config, Mapping):
        return PeftConfig.from_dict(config)
    if not (callable(getattr(config, "to_dict", None)) and hasattr(config, "peft_type")):
        raise ConfigError(
            f"expected a configuration such as LoraConfig(r=8), a peft configuration or the dict of an "
            f"adapter_config.json, not {type(config).__name__}"
        )
    if getattr(config, "_custom_modules", None):
        refuse("_custom_modules", config._custom_modules, "fastpeft has no custom LoRA layers; do not register any")
    values = dict(config.to_dict())
    if hasattr(config, "runtime_config"):  # which to_dict drops
        values["runtime_config"] = config.runtime_config
    return PeftConfig.from_dict(values)


def get_peft_config(config_dict: Mapping) -> PeftConfig:
    """The configuration object for a dict with `peft_type` and any of its fields, as in peft. Raises ConfigError."""
    return PeftConfig.from_dict(config_dict)


def _class_for(peft_type: object) -> type[PeftConfig]:
    supported = ", ".join(method.value for method in PEFT_TYPE_TO_CONFIG_MAPPING)
    if peft_type is None:
        raise ConfigError(f"peft_type is missing from the configuration; fastpeft supports {supported}")
    if not isinstance(peft_type, str) or peft_type not in list(PeftType):
        refuse("peft_type", peft_type, f"unknown method; fastpeft supports {supported}")
    method = PeftType(peft_type)
    if method not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise ConfigError(f"peft_type={method.value}: not supported yet; fastpeft supports {supported}")
    return PEFT_TYPE_TO_CONFIG_MAPPING[method]


def require_bool(config: PeftConfig, name: str) -> None:
    """Raises ConfigError unless the field is True or False itself."""
    if not isinstance(getattr(config, name), bool):
        refuse(name, getattr(config, name), "must be True or False")


def require_pattern(name: str, pattern: object) -> None:
    """Raises ConfigError unless `pattern` is a regular expression that can be matched in bounded time."""
    problem = pattern_problem(pattern) if isinstance(pattern, str) else "must be a string"
    if problem:
        refuse(name, pattern, problem)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_rank(value: object) -> bool:
    return _is_int(value) and value >= 1


def _is_number(value: object) -> bool:
    try:
        return (_is_int(value) or isinstance(value, float)) and math.isfinite(value)
    except OverflowError:  # an int beyond every float
        return False


def _is_names(value: object) -> bool:
    return isinstance(value, list | tuple | set | frozenset) and all(isinstance(n, str) and n for n in value)


def _in_order(values) -> list:
    """A list without repetitions, in the order given; a set, which has none, is sorted."""
    try:
        return list(dict.fromkeys(sorted(values) if isinstance(values, set | frozenset) else values))
    except TypeError:  # a mixture of types, which `validate` refuses
        return list(values)


def _keeps_gpu(runtime: object) -> bool:
    return getattr(runtime, "ephemeral_gpu_offload", None) is False


def _neutral(value: object, default: object) -> bool:
    """Whether a value asks for nothing: empty in any way, or the default itself."""
    empty = value is None or value is False or (isinstance(value, str | Mapping | list | tuple | set) and not value)
    return empty or (type(value) is type(default) and value == default)


def _default(each) -> object:
    return each.default if each.default is not MISSING else each.default_factory()


def _value(method: PeftType | None) -> str:
    return method.value if method is not None else "no method"


def _to_json(value: object) -> object:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, set | frozenset):
        return sorted(value)
    return list(value) if isinstance(value, tuple) else value
