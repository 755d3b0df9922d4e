"""Where a model attends: the self-attention modules that can carry a prefix, found by structure, one for each layer."""

import importlib
import inspect
from dataclasses import dataclass

from torch import nn

from fastpeft.attention.numbering import Numbering
from fastpeft.attention.positions import RelativeBias, Shift, shifted_modules
from fastpeft.errors import TargetError
from fastpeft.names import listed
from fastpeft.tuners.attention_layer import AdaptedAttention
from fastpeft.tuners.layer import AdapterLayer
from fastpeft.tuners.saved_modules import SavedModule

# Attention classes of transformers' families that do not ask its interface, or need more than that -> the module of
# this package with the mixin of the same name.
OWN_FORWARD = {
    "albert.AlbertTransformer": "albert",
    "bloom.BloomAttention": "bloom",
    "codegen.CodeGenAttention": "own_scores",
    "deberta_v2.DisentangledSelfAttention": "deberta_v2",
    "falcon.FalconAttention": "falcon",
    "gpt2.GPT2Attention": "gpt2",
    "gptj.GPTJAttention": "own_scores",
    "gpt_neo.GPTNeoSelfAttention": "own_scores",
    "mpt.MptAttention": "mpt",
}
# Families that ask the interface, and whose own code wants a matrix for a mask.
UNSERVED = ("bigbird_pegasus", "nllb_moe")
COPIES = frozenset(SavedModule.containers)  # of modules that an adapter trains whole
CROSS = (
    *("crossattention", "cross_attention", "cross_attn", "encoder_attn", "EncDecAttention"),
    "encoder_decoder_attention",
)


@dataclass(frozen=True)
class Sites:
    """The attention modules of a stack of layers, in the order of the layers: (path, module, mixin) each; what makes
    something of positions; the configurations that their attention functions are named by; for each attention module
    {number of a pass: the layer that it is in it}, and the stacks that number passes where layers share modules."""

    attention: tuple[tuple[str, nn.Module, type[AdaptedAttention]], ...]
    positions: tuple[tuple[str, nn.Module, type[Shift]], ...]
    configs: tuple
    passes: tuple[dict[int, int], ...] = ()
    stacks: tuple[tuple[str, nn.Module, type[Numbering]], ...] = ()

    @property
    def layers(self) -> int:
        """How many layers attend."""
        return sum(map(len, self.passes))

    @property
    def companions(self) -> tuple[tuple[str, nn.Module, type], ...]:
        """What is not attention, and works for a prefix."""
        return (*self.positions, *self.stacks)


def find_sites(model: nn.Module, part: str = "decoder") -> Sites:
    """Of the stack that a prefix belongs to: the "decoder", if the model has one, its "cross"-attention, or the
    "encoder". Raises TargetError, naming the model, where prefixes cannot be served."""
    name = type(model).__name__
    if not hasattr(model, "config"):
        raise TargetError(
            f"{name} is not a transformers model: it has no config, so nothing says how it attends; use LoRA"
        )
    stack = model.get_encoder() if part == "encoder" else _stack(model)
    path = next(path for path, module in model.named_modules() if module is stack)
    served = [
        (each, module, mixin)
        for each, module in stack.named_modules(prefix=path)
        if COPIES.isdisjoint(each.split("."))
        and _is_cross(each, module) == (part == "cross")
        and (mixin := _mixin(module)) is not None
    ]
    found = [each for each in served if issubclass(each[2], AdaptedAttention)]
    stacks = tuple(each for each in served if issubclass(each[2], Numbering))
    if not found or any(_family(module) in UNSERVED for _, module, _ in found):
        classes = sorted({type(m).__name__ for m in stack.modules() if "ttention" in type(m).__name__})
        raise TargetError(
            f"{name} cannot carry a prefix: none of its attention classes ({', '.join(classes) or 'none'}) asks "
            "transformers' attention interface alone, and fastpeft has no forward of its own for them; use LoRA"
        )
    found = _in_order(name, found)
    configs = {id(config): config for config in _configs(stack, found)}
    positions = () if part == "cross" else shifted_modules(stack, path)  # which is without positions
    shared = {key: value for _, module, mixin in stacks for key, value in mixin.passes_of(module).items()}
    passes = tuple(shared.get(id(module), {0: layer}) for layer, (_, module, _) in enumerate(found))
    return Sites(tuple(found), tuple(positions), tuple(configs.values()), passes, stacks)


def _stack(model: nn.Module) -> nn.Module:
    """The decoder of an encoder-decoder model, the language model of one with more modalities, or the model itself."""
    if getattr(model.config, "is_encoder_decoder", False):
        return model.get_decoder()
    text = model.config.get_text_config(decoder=True)
    own = [m for m in model.modules() if getattr(m, "config", None) is text and hasattr(m, "get_input_embeddings")]
    return own[0] if own else model


def _is_cross(path: str, module: nn.Module) -> bool:
    return getattr(module, "is_cross_attention", False) is True or any(part in CROSS for part in path.split("."))


def _original(module: nn.Module) -> type:
    return module._fastpeft.original_class if isinstance(module, AdapterLayer) else type(module)


def _family(module: nn.Module) -> str:
    """The folder of transformers' models that the module's class is from; "" for any other."""
    package, _, family = _original(module).__module__.rpartition(".")[0].rpartition(".")
    return family if package == "transformers.models" else ""


def _mixin(module: nn.Module) -> type[AdaptedAttention] | type[Numbering] | None:
    """What makes this module carry a prefix, or number the passes of one that does; None if it does neither."""
    original = _original(module)
    home = OWN_FORWARD.get(f"{_family(module)}.{original.__name__}")
    if home is not None:
        return getattr(importlib.import_module(f"fastpeft.attention.{home}"), original.__name__)
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
            paths = listed([path for path, _, _ in found])
            raise TargetError(f"{name} has more than one attention module for one layer: {paths}; use LoRA")
    return found


def _configs(stack: nn.Module, found: list):
    for owner in (stack, *(module for _, module, _ in found)):
        if hasattr(owner, "config"):
            yield owner.config
