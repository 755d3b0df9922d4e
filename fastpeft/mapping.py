"""The two tables that drive `patch`, and what a configuration finds in them.

PEFT_TYPE_TO_CONFIG_MAPPING: a method's PEFT type -> its configuration class, which names the module that injects it.
MODEL_TYPE_TO_PEFT_MODEL_MAPPING: a task -> the class in front of the model's own that gives it the task's behaviour.

A method, or a task, is one entry, whoever makes it.
"""

import importlib
from types import ModuleType

from fastpeft.configs import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig
from fastpeft.errors import ConfigError
from fastpeft.model import PatchedModel
from fastpeft.tasks import MODEL_TYPE_TO_PEFT_MODEL_MAPPING


def tuner_of(config: PeftConfig) -> ModuleType:
    """The module with a method's `plan(model, config)` and `inject(...)`; it is imported when it is first used. Raises
    ConfigError for a configuration that names none."""
    if not config.tuner:
        raise ConfigError(f"{type(config).__name__} names no tuner; set its class attribute `tuner` to a module's name")
    return importlib.import_module(config.tuner)


def task_class(config: PeftConfig) -> type[PatchedModel]:
    """The class of a configuration's task; `PatchedModel` itself where it has none."""
    return MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PatchedModel)


__all__ = ["MODEL_TYPE_TO_PEFT_MODEL_MAPPING", "PEFT_TYPE_TO_CONFIG_MAPPING", "task_class", "tuner_of"]
