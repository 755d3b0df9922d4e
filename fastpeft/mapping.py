"""The table that drives `patch`: a method's PEFT type -> what its configuration is and what injects it.

A method is one tuner module and one entry here. Its module is imported when it is first used.
"""

import importlib
from types import ModuleType

from fastpeft.configs import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType
from fastpeft.errors import ConfigError

TUNERS: dict[PeftType, str] = {
    PeftType.LORA: "fastpeft.tuners.lora_injection",
    PeftType.ADAPTION_PROMPT: "fastpeft.tuners.adaption_prompt_injection",
    PeftType.PREFIX_TUNING: "fastpeft.tuners.prefix_injection",
}


def tuner_of(peft_type: PeftType) -> ModuleType:
    """The module with a method's `plan(model, config)` and `inject(...)`. Raises ConfigError for an unknown method."""
    if peft_type not in TUNERS:
        raise ConfigError(f"peft_type {peft_type} has no tuner; available: {', '.join(map(str, TUNERS))}")
    return importlib.import_module(TUNERS[peft_type])


__all__ = ["PEFT_TYPE_TO_CONFIG_MAPPING", "TUNERS", "tuner_of"]
