"""What a quantised model needs before adapters are trained on it, as HF peft's function of the same name does it."""

from typing import Any

import torch
from torch import nn

from fastpeft.arguments import check_flags
from fastpeft.errors import ConfigError, PatchError

# Of these the layers' own parameters are in half precision, and are computed with as they are.
HALF_PRECISION_METHODS = ("gptq", "aqlm", "eetq", "hqq", "torchao")
# transformers' method and its argument, and what both were called before.
ENABLES = (
    ("activation_checkpointing_enable", "activation_checkpointing_kwargs"),
    ("gradient_checkpointing_enable", "gradient_checkpointing_kwargs"),
)


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> nn.Module:
    """Freeze a transformers model, widen its half-precision parameters (norms, embeddings, head) to fp32 unless it is
    of GPTQ, AQLM, EETQ, HQQ or torchao, and of a quantised one enable gradient checkpointing. To be called before
    `patch`; HF peft's function (0.21.2) has the same arguments, defaults and effects.

    Args:
        model: a model of transformers', as `from_pretrained(quantization_config=...)` gives it.
        use_gradient_checkpointing: whether to enable it, with the hook on the embeddings that reentrant checkpointing
            needs.
        gradient_checkpointing_kwargs: for `torch.utils.checkpoint.checkpoint`, for example {"use_reentrant": False}.
        auto_clear_cache: whether to give the memory of the narrower copies back to the device.

    Returns:
        The same object.

    Raises:
        PatchError: it is no module, has adapters already, or cannot checkpoint; a flag is no bool.
        ConfigError: gradient_checkpointing_kwargs is no dict.
    """
    where = "prepare_model_for_kbit_training"
    _check(model, where)
    flags = {"use_gradient_checkpointing": use_gradient_checkpointing, "auto_clear_cache": auto_clear_cache}
    check_flags(where, **flags)
    options = {} if gradient_checkpointing_kwargs is None else gradient_checkpointing_kwargs
    if not isinstance(options, dict):
        raise ConfigError(f"{where}: gradient_checkpointing_kwargs is {options!r}; give a dict or None")
    narrow = _method(model) in HALF_PRECISION_METHODS or getattr(model, "hqq_quantized", False)
    in_bits = getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False)
    checkpoints = use_gradient_checkpointing and (narrow or in_bits)
    if checkpoints and not any(hasattr(model, method) for method, _ in ENABLES):
        raise PatchError(
            f"{where}: this {type(model).__name__} has no activation_checkpointing_enable; set "
            "use_gradient_checkpointing=False"
        )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if not narrow:
        _widen(model)
        if auto_clear_cache and torch.cuda.is_available():
            torch.cuda.empty_cache()
    if checkpoints:
        if options.get("use_reentrant", True):
            _want_input_grads(model)
        method, argument = next(each for each in ENABLES if hasattr(model, each[0]))
        getattr(model, method)(**{argument: options})
    return model


def _check(model: Any, where: str) -> None:
    if not isinstance(model, nn.Module):
        raise PatchError(f"{where}: model is a {type(model).__name__}; a torch.nn.Module is needed")
    if "_fastpeft" in model.__dict__:
        raise PatchError(f"{where}: the model has adapters, which this would freeze; call it before patch")


def _method(model: nn.Module) -> str | None:
    """The name of the quantisation that transformers has loaded the model with."""
    method = getattr(model, "quantization_method", None)
    return getattr(method, "value", method)


def _widen(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16) and type(parameter).__name__ != "Params4bit":
            parameter.data = parameter.data.to(torch.float32)


def _want_input_grads(model: nn.Module) -> None:
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
    else:
        model.get_input_embeddings().register_forward_hook(_require)


def _require(module, args, output) -> None:
    output.requires_grad_(True)
