"""peft's own `get_peft_model`, for configurations of fastpeft's too."""

from dataclasses import fields
from typing import Any

from torch import nn

from fastpeft.configs import PeftConfig, as_config, refuse
from fastpeft.errors import PatchError
from fastpeft.integrations.peft.model import is_swapped


def wrapped_by_peft(model: nn.Module, config: Any, adapter_name: str, **options) -> nn.Module:
    """A `peft.PeftModel` of this model, not yet patched. Raises ConfigError for an option that peft does not have,
    PatchError for a model that is patched."""
    import peft

    if "_fastpeft" in model.__dict__ or is_swapped(model):
        raise PatchError(
            f"get_peft_model: this {type(model).__name__} is patched already; add another adapter with "
            "model.add_adapter(name, config), or fastpeft.unpatch(model) first"
        )
    given = config if isinstance(config, peft.PeftConfig) else peft_s_config(as_config(config))
    return peft.get_peft_model(model, given, adapter_name, **options)


def peft_s_config(config: PeftConfig) -> Any:
    """The object of peft's class of the same name, with the same fields."""
    import peft

    kind = getattr(peft, type(config).__name__)
    known = {each.name for each in fields(kind)}
    values, usual = config.to_dict(), {each.name: each.default for each in fields(config)}
    for name, value in values.items():
        if name not in known and value and value != usual[name]:
            why = "peft has no such option; call fastpeft.patch(model, config) with it, in place of get_peft_model"
            refuse(name, value, why)
    return kind(**{name: value for name, value in values.items() if name in known and name != "peft_type"})
