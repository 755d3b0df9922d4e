"""Where a model attends: the self-attention modules that can carry a prefix, found by structure, one for each layer."""

import importlib
import inspect
from dataclasses import dataclass

from torch import nn

from fastpeft.attention.positions import RelativeBias, Shift, shifted_modules
from fastpeft.errors import TargetError
from fastpeft.tuners.attention_layer import AdaptedAttention
from fastpeft.tuners.layer import AdapterLayer

# Attention classes of transformers that do not ask its interface, or need more than that -> the module of this package
# with the mixin of the same name.
OWN_FORWARD = {
    "BloomAttention": "bloom",
    "CodeGenAttention": "own_scores",
    "FalconAttention": "falcon",
    "GPT2Attention": "gpt2",
    "GPTJAttention": "own_scores",
    "GPTNeoSelfAttention": "own_scores",
    "MptAttention": "mpt",
}
CROSS = ("crossattention", "encoder_attn", "EncDecAttention", "cross_attn")


@dataclass(frozen=True)
class Sites:
    """The attention modules of a stack of layers, in the order of the layers: (path, module, mixin) each; what makes
    something of positions; and the configurations that their attention functions are named by."""

    attention: tuple[tuple[str, nn.Module, type[AdaptedAttention]], ...]
    positions: tuple[tuple[str, nn.Module, type[Shift]], ...]
    configs: tuple


def find_sites(model: nn.Module) -> Sites:
    """Of the stack that a prefix belongs to: the decoder's, if the model has one. Raises TargetError, naming the model,
    where prefixes cannot be served."""
    name = type(model).__name__
    if not hasattr(model, "config"):
        raise TargetError(f"{name} is not a transformers model: it has no config, so nothing says how it attends")
    path, stack = _stack(model)
    found = [
        (each, module, mixin)
        for each, module in stack.named_modules(prefix=path)
        if (mixin := _mixin(each, module)) is not None
    ]
    if not found:
        classes = sorted({type(m).__name__ for m in stack.modules() if "ttention" in type(m).__name__})
        raise TargetError(
            f"{name} cannot carry a prefix: none of its attention classes ({', '.join(classes) or 'none'}) asks "
            "transformers' attention interface, and fastpeft has no forward of its own for them"
        )
    found = _in_order(name, found)
    configs = {id(config): config for config in _configs(stack, found)}
    return Sites(tuple(found), tuple(shifted_modules(stack, path)), tuple(configs.values()))


def _stack(model: nn.Module) -> tuple[str, nn.Module]:
    """(path, module) of the decoder of an encoder-decoder model, of the language model of one for several
    modalities, or the model itself."""
    if getattr(model.config, "is_encoder_decoder", False):
        stack = model.get_decoder()
    else:
        text = model.config.get_text_config(decoder=True)
        own = [m for m in model.modules() if getattr(m, "config", None) is text and hasattr(m, "get_input_embeddings")]
        stack = own[0] if own else model
    return next((path, module) for path, module in model.named_modules() if module is stack)


def _mixin(path: str, module: nn.Module) -> type[AdaptedAttention] | None:
    """What makes this module carry a prefix; None if it is no self-attention."""
    original = module._fastpeft.original_class if isinstance(module, AdapterLayer) else type(module)
    if getattr(module, "is_cross_attention", False) or any(part in CROSS for part in path.split(".")):
        return None
    if original.__name__ in OWN_FORWARD and original.__module__.startswith("transformers."):
        home = importlib.import_module(f"fastpeft.attention.{OWN_FORWARD[original.__name__]}")
        return getattr(home, original.__name__)
    forward = inspect.unwrap(original.forward)
    if "get_interface" not in getattr(getattr(forward, "__code__", None), "co_names", ()):
        return None
    return RelativeBias if hasattr(original, "compute_bias") else AdaptedAttention


def _in_order(name: str, found: list) -> list:
    """By their layer index, or as they come where they have none. Raises TargetError unless there is one a layer."""
    numbers = [getattr(module, "layer_idx", getattr(module, "layer_id", None)) for _, module, _ in found]
    if all(isinstance(number, int) for number in numbers):
        found = [each for _, each in sorted(zip(numbers, found, strict=True), key=lambda pair: pair[0])]
        if len(set(numbers)) != len(numbers):
            raise TargetError(f"{name} has more than one attention module for one layer: {[p for p, _, _ in found]}")
    return found


def _configs(stack: nn.Module, found: list):
    for owner in (stack, *(module for _, module, _ in found)):
        if hasattr(owner, "config"):
            yield owner.config
