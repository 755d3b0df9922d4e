"""`get_peft_model`, in place of peft's: one changed line of imports for a script that is written for peft."""

import importlib.util
from typing import Any

from torch import nn

from fastpeft.configs import as_config
from fastpeft.dispatch import checked_backend
from fastpeft.errors import ConfigError
from fastpeft.patching import patch
from fastpeft.rollback import put_back_on_failure


def get_peft_model(
    model: nn.Module,
    config: Any = None,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
    *,
    peft_config: Any = None,
    backend: str | None = None,
) -> nn.Module:
    """Give a model a trainable adapter, as peft's function of this name, and make it fast.

    Where peft is installed, the result is its `PeftModel`, patched (`isinstance` holds, and everything but the
    arithmetic is peft's); where it is not, it is the model itself, patched natively, with the methods scripts call.

    Args:
        model: a transformers model or torch module.
        config: a configuration of fastpeft's or peft's, or its dict; `peft_config` is the same under peft's name.
        adapter_name, mixed, autocast_adapter_dtype, revision, low_cpu_mem_usage: as in peft 0.21.
        backend: as in `fastpeft.patch`.

    Raises:
        ConfigError: no configuration, or two; or one with an option of fastpeft's own, which peft does not know:
            `fastpeft.patch(model, config)` does. Besides, what peft or `fastpeft.patch` raises.
        The model is then as it was.
    """
    if (config is None) == (peft_config is None):
        raise ConfigError("get_peft_model: one configuration is needed, for example LoraConfig(r=16)")
    config = peft_config if config is None else config
    if backend is not None:
        checked_backend(backend, "get_peft_model(backend=)")
    if importlib.util.find_spec("peft") is not None:
        from fastpeft.integrations.peft import wrapped_by_peft

        options = {"revision": revision, "low_cpu_mem_usage": low_cpu_mem_usage, "mixed": mixed}
        options["autocast_adapter_dtype"] = autocast_adapter_dtype
        with put_back_on_failure(model, values=_changes_base(config)):
            return patch(wrapped_by_peft(model, config, adapter_name, **options), backend=backend)
    if mixed:
        raise ConfigError(
            "get_peft_model: mixed=True is peft's; fastpeft.patch takes adapters of several methods as it is"
        )
    config = as_config(config)
    config.revision = config.revision if revision is None else revision
    return patch(
        model, config, adapter_name=adapter_name, backend=backend, autocast_adapter_dtype=autocast_adapter_dtype
    )


def _changes_base(config: Any) -> bool:
    """Whether an adapter's initialisation may change the base weights, as PiSSA's does."""
    config = config if isinstance(config, dict) else vars(config)
    return config.get("init_lora_weights") not in (None, True, False, "gaussian")
