"""Mixed batches: a call, or a `generate`, that names for each of its samples an adapter (`adapter_names=`), as in HF
peft; and, which HF peft refuses, in training."""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.configs import LoraConfig, PeftType
from fastpeft.errors import PatchError
from fastpeft.in_place import trains_biases
from fastpeft.selection import BASE, by_rows, chosen_here, disabled, row_names
from fastpeft.tuners.mixed import WrongRows

ARGUMENT = "adapter_names"
# The arguments whose first dimension is the batch of what is called: the decoder's, where there are both.
BATCHED = ("decoder_input_ids", "decoder_inputs_embeds", "input_ids", "inputs_embeds", "inputs")


# What transformers' files of models define that call layers with the sequence in front, (S, B, ...).
SEQUENCE_FIRST = ("FSMTEncoder", "LEDEncoderSelfAttention", "LongformerSelfAttention", "XLNetModel")


def checked_rows(state, given: Any, batch: int | None) -> tuple[str, ...]:
    """The names that a call gives for its samples, of which there are `batch`. Raises PatchError for what is no such
    list, for an adapter that there is not, or that no sample can have alone, and while one is merged into the
    weights."""
    if not isinstance(given, list | tuple) or not given or not all(isinstance(name, str) for name in given):
        raise PatchError(f"{ARGUMENT}={given!r}: a list is needed, for each sample an adapter's name or {BASE!r}")
    if batch not in (None, len(given)):
        raise PatchError(f"{ARGUMENT} has {len(given)} names, and the batch {batch} samples; name one for each")
    if state.merged:
        merged = ", ".join(state.merged)
        raise PatchError(
            f"{ARGUMENT}: {merged} is merged into the base weights, which all samples share; unmerge first"
        )
    if any(trains_biases(config) for config in state.configs.values()):
        raise PatchError(
            f"{ARGUMENT}: an adapter trains biases of the base model in place (bias='all' or 'lora_only'), which all "
            "samples share; call the model with one adapter at a time"
        )
    if _calls_sequence_first(state.original_class):
        raise PatchError(
            f"{ARGUMENT}: layers of a {state.original_class.__name__} are called with the sequence in front of the "
            "samples, which they cannot tell apart; call the model with one adapter at a time"
        )
    for name in dict.fromkeys(given):
        config = state.configs.get(name)
        if name == BASE:
            continue
        if config is None:
            known = ", ".join(map(repr, state.configs))
            raise PatchError(
                f"{ARGUMENT} names {name!r}, which is no adapter of this model; there are {known}, {BASE!r}"
            )
        if config.peft_type != PeftType.LORA or not isinstance(config, LoraConfig):
            kind = getattr(config.peft_type, "value", config.peft_type)
            raise PatchError(
                f"{ARGUMENT} names {name!r}, which is {kind}: samples of one batch can have LoRA adapters each; call "
                f"the model with that adapter alone"
            )
        if config.use_dora:
            raise PatchError(
                f"{ARGUMENT} names {name!r}, which has use_dora=True: that changes the base product as well, which the "
                "samples share; call the model with that adapter alone"
            )
    return tuple(given)


@functools.cache
def _calls_sequence_first(model_class: type) -> bool:
    files = [sys.modules.get(each.__module__) for each in model_class.__mro__]
    return any(hasattr(file, name) for file in files for name in SEQUENCE_FIRST)


def with_rows(model: nn.Module, given: Any, batch: int | None, function: Callable, /, *args, **kwargs) -> Any:
    """`function(*args, **kwargs)`, in which `model` uses for each sample the adapter that is named for it; where
    adapters are disabled, as ever. Raises PatchError, also where a layer's input has not the samples as its rows."""
    state = model._fastpeft
    rows = checked_rows(state, given, batch)
    if disabled(state):
        return function(*args, **kwargs)
    if torch.compiler.is_dynamo_compiling():
        return by_rows(state, rows, function, *args, **kwargs)
    try:
        return by_rows(state, rows, function, *args, **kwargs)
    except WrongRows as error:
        path = next((name for name, module in model.named_modules() if module is error.layer), "")
        raise PatchError(
            f"{path}: {error.what}; leave the module out of the adapters' targets, or {ARGUMENT}"
        ) from None


def call_with_rows(model: nn.Module, call: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """`call(args, kwargs)` of a model's root, without the argument that is not the model's own, which is taken out of
    kwargs. Inside `generate` a sample's beams, or its several sequences, follow each other and have its adapter."""
    given, rows = kwargs.pop(ARGUMENT, None), row_names(model._fastpeft)
    if given is None and rows is None:
        return call(args, kwargs)
    batch = _batch(args, kwargs)
    if given is not None:
        return with_rows(model, given, batch, call, args, kwargs)
    if batch is None or batch == len(rows) or batch % len(rows):
        return call(args, kwargs)
    repeated = tuple(name for name in rows for _ in range(batch // len(rows)))
    return by_rows(model._fastpeft, repeated, call, args, kwargs)


def _batch(args: tuple, kwargs: dict[str, Any]) -> int | None:
    """How many samples a call has, as far as its arguments say."""
    for name in BATCHED:
        if isinstance(tensor := kwargs.get(name), Tensor):
            return tensor.shape[0]
    return args[0].shape[0] if args and isinstance(args[0], Tensor) else None


@functools.cache
def generating(original: type) -> dict:
    """The `generate` of `original`, if it has one, as it is to be in front of it: with `adapter_names`."""
    own = getattr(original, "generate", None)
    if own is None:
        return {}

    @functools.wraps(own)
    def generate(self, *args, **kwargs):
        given = kwargs.pop(ARGUMENT, None)
        if given is None:
            return own(self, *args, **kwargs)
        settings = kwargs.get("generation_config", getattr(self, "generation_config", None))
        guidance = kwargs.get("guidance_scale", getattr(settings, "guidance_scale", None))
        if guidance not in (None, 1, 1.0):
            raise PatchError(
                f"{ARGUMENT} with guidance_scale={guidance!r}: some models are then called with each sample twice, in "
                "another order than its beams; call generate for one adapter at a time"
            )
        return with_rows(self, given, _batch(args, kwargs), own, self, *args, **kwargs)

    return {own.__name__: generate, **_continuous(original)}


def _continuous(original: type) -> dict:
    """transformers' continuous batching, which calls the model in a thread of its own and packs samples into one row:
    what is said for this thread, or for samples, does not reach it, and is refused."""
    own = getattr(original, "init_continuous_batching", None)
    batch = getattr(original, "generate_batch", None)
    if own is None or batch is None:
        return {}

    @functools.wraps(own)
    def init_continuous_batching(self, *args, **kwargs):
        if chosen_here(self._fastpeft):
            raise PatchError(
                "continuous batching calls the model in a thread of its own, which use_adapter and disable_adapter do "
                "not reach; use set_adapter, or generate"
            )
        return own(self, *args, **kwargs)

    @functools.wraps(batch)
    def generate_batch(self, *args, **kwargs):
        if kwargs.get(ARGUMENT) is not None:
            raise PatchError(f"{ARGUMENT}: continuous batching packs samples into one row; use generate")
        return batch(self, *args, **kwargs)

    return {"init_continuous_batching": init_continuous_batching, "generate_batch": generate_batch}
