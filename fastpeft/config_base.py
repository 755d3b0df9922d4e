"""What every configuration is made of: the names of the methods and tasks, the common fields, the checks in words.

The classes for the methods are in config_lora.py and config_prompt.py; `fastpeft.configs` has all of them.
"""

import math
import reprlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from enum import Enum
from typing import Any, ClassVar, NoReturn

from fastpeft.errors import ConfigError
from fastpeft.patterns import pattern_problem, patterns_problem
from fastpeft.untrusted import shown

MOST_SHOWN = 200  # characters of a field's name, which a file may have made up
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


def refuse(name: str, value: object, why: str) -> NoReturn:
    """Raises ConfigError for a field: its name, its value, what is wrong and what to write instead."""
    name = name if name.isprintable() and len(name) < MOST_SHOWN else shown(name)
    raise ConfigError(f"{name}={_repr.repr(value)}: {why}")


def unhonoured(default: Any = MISSING, factory: Any = MISSING) -> Any:
    """A field that is there for peft's sake, at its default only."""
    return field(default=default, default_factory=factory, metadata={"honoured": False})


def own(default: Any, *, stored: bool = True) -> Any:
    """A field that peft does not have. It is never in adapter_config.json; if `stored`, it goes to our side file."""
    return field(default=default, metadata={"own": True, "stored": stored})


# Method -> configuration class, filled in by `fastpeft.configs`. The class names the module that injects the method, so
# that one entry, of anybody's, makes a method known.
PEFT_TYPE_TO_CONFIG_MAPPING: "dict[str, type[PeftConfig]]" = {}

# Task -> the class that gives a patched model that task's behaviour, filled in by `fastpeft.tasks`; open to all too.
MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[str, type] = {}


@dataclass
class PeftConfig:
    """What every method's configuration has. Raises ConfigError for a value that cannot be honoured.

    task_type: a TaskType, which says what head is trained and what virtual tokens do to targets; None is the model as
    it is.
    peft_type: the method; each class has its own by itself.
    inference_mode: whether the adapter is frozen.
    base_model_name_or_path, revision, auto_mapping, peft_version: where the adapter is from; kept and written back.
    """

    task_type: TaskType | str | None = None
    peft_type: PeftType | str | None = None
    auto_mapping: dict | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    method: ClassVar[PeftType | str | None] = None
    tuner: ClassVar[str] = ""  # the module with the method's `plan(model, config)` and `inject(plan, name, state, ...)`
    of_peft_s_files: ClassVar[dict] = {}  # what our own fields are for a file that says nothing of them

    def __post_init__(self):
        if self.peft_type is None or one_of(self.peft_type, [self.method]):
            self.peft_type = self.method
        if self.peft_version is None:
            self.peft_version = FORMAT_VERSION
        self.normalise()
        self.validate()

    def normalise(self) -> None:
        """Give equal requests one form, in containers of this object's own. What has the wrong type stays as it is."""
        if isinstance(self.auto_mapping, Mapping):
            self.auto_mapping = dict(self.auto_mapping)
        if one_of(self.task_type, TaskType):
            self.task_type = TaskType(self.task_type)

    def validate(self) -> None:
        """Raises ConfigError unless every field is one that fastpeft can honour. Changes nothing."""
        if self.peft_type is not self.method:
            refuse("peft_type", self.peft_type, f"a {type(self).__name__} is for {_value(self.method)}; leave it out")
        if self.task_type is not None and not one_of(self.task_type, MODEL_TYPE_TO_PEFT_MODEL_MAPPING):
            known = ", ".join(map(_plain, MODEL_TYPE_TO_PEFT_MODEL_MAPPING))
            refuse("task_type", self.task_type, f"choose one of {known}")
        for name in ("peft_version", "base_model_name_or_path", "revision"):
            if not isinstance(getattr(self, name), str | None):
                refuse(name, getattr(self, name), "must be a string or None")
        mapping = self.auto_mapping
        if mapping is not None and not (isinstance(mapping, dict) and all(isinstance(key, str) for key in mapping)):
            refuse("auto_mapping", mapping, "must be a dict with string keys or None")
        require_bool(self, "inference_mode")
        for each in fields(self):
            if not self.honours(each) and not _neutral(getattr(self, each.name), _default(each)):
                why = f"fastpeft does not honour this field; leave it at its default {_default(each)!r}"
                refuse(each.name, getattr(self, each.name), why)

    def honours(self, which: Field) -> bool:
        """Whether a field of this configuration may have another value than its default."""
        return which.metadata.get("honoured", True)

    def validate_new(self) -> None:
        """Raises ConfigError for what can be loaded and used, but not made anew."""

    def trains(self, key: str) -> bool:
        """Whether the adapter's tensor of this name, relative to its module, is trained."""
        return True

    def to_dict(self) -> dict:
        """All of peft's fields but `runtime_config`, and those of our own fields that are not at their default, as a
        dict of this object's values; enums stay enums, as in peft."""
        values = asdict(self)
        values.pop("runtime_config", None)
        for name, default in _own_fields(self).items():
            if values[name] == default:
                del values[name]
        return values

    def to_file_dict(self, auto_mapping: dict | None = None) -> dict:
        """What peft writes to adapter_config.json, with JSON's types only and lists in a fixed order.

        peft fills `auto_mapping` in when there is no task type: {"base_model_class": ..., "parent_library": ...}.
        """
        ours = _own_fields(self)
        values = {name: _to_json(value) for name, value in self.to_dict().items() if name not in ours}
        values["inference_mode"] = True
        if auto_mapping is not None:
            values["auto_mapping"] = dict(auto_mapping)
        return values

    def side_values(self) -> dict:
        """What belongs into our side file, with JSON's types only: peft has no field for it and it is no default."""
        found = {name: getattr(self, name) for name in _own_fields(self, stored=True)}
        return {name: _to_json(value) for name, value in found.items() if value != _own_fields(self)[name]}

    def with_side_values(self, values: object) -> "PeftConfig":
        """A copy with the content of `side_values`, which a file may hold: it can set nothing else.

        Raises ConfigError.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"the options of a side file must be a dict of fields, not {type(values).__name__}")
        ours = _own_fields(self, stored=True)
        for name in values:
            if name not in ours:
                refuse(str(name), values[name], f"{type(self).__name__} keeps no such option in a side file; remove it")
        current = {each.name: getattr(self, each.name) for each in fields(self)}
        return type(self)(**{**current, **values})

    @classmethod
    def from_dict(cls, values: Mapping) -> "PeftConfig":
        """The configuration that `to_dict` or an adapter_config.json describes; on PeftConfig, of any method.

        Raises ConfigError for a field that is not known and not empty, besides what `validate` refuses.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"a configuration must be a dict of fields, not {type(values).__name__}")
        target = cls if cls.method is not None and "peft_type" not in values else class_for(values.get("peft_type"))
        if not issubclass(target, cls):
            refuse("peft_type", values["peft_type"], f"a {cls.__name__} is for {_value(cls.method)}")
        known = {each.name for each in fields(target)}
        for name in values:
            if name not in known and not _neutral(values[name], None):
                why = f"{target.__name__} has no such field (of a newer peft?); remove it if the adapter works without"
                refuse(str(name), values[name], why)
        return target(**{name: value for name, value in values.items() if name in known})

    @classmethod
    def from_pretrained(cls, directory) -> "PeftConfig":
        """The configuration in a local directory's adapter_config.json; on PeftConfig, of any method. Raises
        AdapterFileError if there is none, ConfigError as `from_dict`."""
        from fastpeft.files import read_config

        return cls.from_dict(read_config(directory))


def class_for(peft_type: object) -> type[PeftConfig]:
    """The class of a method's configurations. Raises ConfigError."""
    supported = ", ".join(map(_plain, PEFT_TYPE_TO_CONFIG_MAPPING))
    if peft_type is None:
        raise ConfigError(f"peft_type is missing from the configuration; fastpeft supports {supported}")
    if not one_of(peft_type, PEFT_TYPE_TO_CONFIG_MAPPING):
        refuse("peft_type", peft_type, f"unknown method; fastpeft supports {supported}")
    return PEFT_TYPE_TO_CONFIG_MAPPING[peft_type]


def require_bool(config: PeftConfig, name: str) -> None:
    """Raises ConfigError unless the field is True or False itself."""
    if not isinstance(getattr(config, name), bool):
        refuse(name, getattr(config, name), "must be True or False")


def require_pattern(name: str, pattern: object) -> None:
    """Raises ConfigError unless `pattern` is a regular expression that can be matched in bounded time."""
    problem = pattern_problem(pattern) if isinstance(pattern, str) else "must be a string"
    if problem:
        refuse(name, pattern, problem)


def require_patterns(name: str, patterns: Collection[str]) -> None:
    """Raises ConfigError unless there are as few patterns in a field as can be matched in bounded time."""
    if problem := patterns_problem(patterns):
        refuse(name, patterns, problem)


def require_saved_names(config: PeftConfig) -> None:
    """Raises ConfigError unless modules_to_save is None or a list of names."""
    if config.modules_to_save is not None and not is_names(config.modules_to_save):
        refuse("modules_to_save", config.modules_to_save, "must be a list of module names or None, as in ['lm_head']")


def one_of(value: object, names: Iterable[str]) -> bool:
    """Whether it is one of these strings. An array, which compares element by element, is not."""
    return isinstance(value, str) and value in list(names)


def is_int(value: object) -> bool:
    """Whether it is an int and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_count(value: object) -> bool:
    """Whether it is an int of at least 1."""
    return is_int(value) and value >= 1


def is_number(value: object) -> bool:
    """Whether it is a finite int or float."""
    try:
        return (is_int(value) or isinstance(value, float)) and math.isfinite(value)
    except OverflowError:  # an int beyond every float
        return False


def is_names(value: object) -> bool:
    """Whether it is a list, tuple or set of strings, none of them empty."""
    return isinstance(value, list | tuple | set | frozenset) and all(isinstance(n, str) and n for n in value)


def in_order(values) -> list:
    """A list without repetitions, in the order given; a set, which has none, is sorted."""
    try:
        return list(dict.fromkeys(sorted(values) if isinstance(values, set | frozenset) else values))
    except TypeError:  # a mixture of types, which `validate` refuses
        return list(values)


def _own_fields(config: PeftConfig, stored: bool = False) -> dict[str, object]:
    """The fields that peft does not have (if `stored`: those for the side file) and their defaults."""
    ours = (each for each in fields(config) if each.metadata.get("own"))
    return {each.name: _default(each) for each in ours if each.metadata["stored"] or not stored}


def _neutral(value: object, default: object) -> bool:
    """Whether a value asks for nothing: empty in any way, or the default itself."""
    empty = value is None or value is False or (isinstance(value, str | Mapping | list | tuple | set) and not value)
    return empty or (type(value) is type(default) and value == default)


def _default(each) -> object:
    return each.default if each.default is not MISSING else each.default_factory()


def _value(method: PeftType | str | None) -> str:
    return _plain(method) if method is not None else "no method"


def _plain(name: str) -> str:
    return name.value if isinstance(name, Enum) else name


def _to_json(value: object) -> object:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, set | frozenset):
        return sorted(value)
    return list(value) if isinstance(value, tuple) else value
