"""What the user asks for: the configuration classes of Hugging Face peft 0.21.2, checked in words.

Names, order and defaults of the fields are peft's, so that a configuration, a `peft.LoraConfig` object and the dict of
an adapter_config.json mean the same everywhere. A field that fastpeft does not honour is there too, at its default
only: setting it is an error, never ignored. A field that peft does not have is never written where peft reads. Fields
that merely describe where an adapter comes from (`peft_version`, `revision`, `base_model_name_or_path`, `auto_mapping`,
`inference_mode`) are kept and written back.
"""

from collections.abc import Mapping
from dataclasses import fields

from fastpeft.config_adalora import AdaLoraConfig
from fastpeft.config_base import (
    FORMAT_VERSION,
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PeftConfig,
    PeftType,
    TaskType,
    class_for,
    is_count,
    refuse,
    require_bool,
    require_pattern,
)
from fastpeft.config_lora import LoraConfig, LoraRuntimeConfig
from fastpeft.config_prompt import (
    AdaptionPromptConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptEncoderReparameterizationType,
    PromptLearningConfig,
    PromptTuningConfig,
    PromptTuningInit,
)
from fastpeft.errors import ConfigError

_METHODS = (
    *(LoraConfig, AdaLoraConfig),
    *(PromptTuningConfig, PromptEncoderConfig, PrefixTuningConfig, AdaptionPromptConfig),
)
PEFT_TYPE_TO_CONFIG_MAPPING.update({each.method: each for each in _METHODS})


def as_config(config: object) -> PeftConfig:
    """A checked configuration of our own, made from one of ours, a `peft` one, or the dict of an adapter_config.json.

    Always a new object: nothing that the caller holds is changed later. Raises ConfigError.
    """
    if isinstance(config, PeftConfig):
        class_for(config.peft_type)
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


__all__ = [
    "FORMAT_VERSION",
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "AdaLoraConfig",
    "AdaptionPromptConfig",
    "LoraConfig",
    "LoraRuntimeConfig",
    "PeftConfig",
    "PeftType",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptEncoderReparameterizationType",
    "PromptLearningConfig",
    "PromptTuningConfig",
    "PromptTuningInit",
    "TaskType",
    "as_config",
    "get_peft_config",
    "is_count",
    "refuse",
    "require_bool",
    "require_pattern",
]
