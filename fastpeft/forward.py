"""One call of a patched model, around the base model's own forward: virtual tokens in front, terms of the loss."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.calls import Call, Room, calling
from fastpeft.errors import PatchError
from fastpeft.mixed_batches import call_with_rows
from fastpeft.selection import active_names
from fastpeft.tuners.prompt_call import (
    behind_virtual_tokens,
    check_mask,
    explaining,
    goes_on,
    named_arguments,
    places,
    prompt_of,
    spare_logits,
    takes,
    with_virtual_tokens,
    without_virtual_tokens,
)


@dataclass(frozen=True)
class Part:
    """What one adapter does to a call of its model.

    task: its class in MODEL_TYPE_TO_PEFT_MODEL_MAPPING. quirky: as HF peft does it where that is wrong. encoder: what
    its virtual tokens' rows come from, or None. shows_virtual: whether the result has places for these. after:
    `after(model, name, output) -> output`, or None.
    """

    task: type
    quirky: bool
    encoder: nn.Module | None = None
    shows_virtual: bool = False
    after: Callable | None = None

    @property
    def acts(self) -> bool:
        """Whether it does anything."""
        return self.encoder is not None or self.after is not None or (self.quirky and bool(self.task.peft_drops))


def forward(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The forward of a patched model; one that was wrapped by somebody (accelerate) outlives the patch."""
    if getattr(model, "_fastpeft", None) is None:
        return type(model).forward(model, *args, **kwargs)
    return call_with_rows(model, functools.partial(_forward, model), args, kwargs)


def _forward(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    state = model._fastpeft
    parts = {name: state.parts[name] for name in active_names(state) if name in state.parts}
    if not parts:
        return _base(model, state)(*args, **kwargs)
    given = named_arguments(state.original_class, args, kwargs)
    for part in parts.values():
        if part.quirky:
            given = {key: value for key, value in given.items() if key not in part.task.peft_drops}
    prompted = [part for part in parts.values() if part.encoder is not None]
    output = _prompted(model, prompted, given) if prompted else _base(model, state)(**given)
    for name, part in parts.items():
        if part.after is not None:
            output = part.after(model, name, output)
    return output


def _base(model: nn.Module, state) -> Callable:
    """The forward that the model had: one that stood on the instance, or its class's."""
    if state.original_forward is not None:
        return state.original_forward
    return functools.partial(state.original_class.forward, model)


def text_embedding(model: nn.Module) -> nn.Module:
    """The embedding of the tokens that virtual tokens stand in front of: an encoder's, if there is one."""
    encoder_decoder = getattr(model.config, "is_encoder_decoder", False)
    return (model.get_encoder() if encoder_decoder else model).get_input_embeddings()


def prompt_length(model: nn.Module) -> tuple[int, bool]:
    """How many virtual tokens a call of a decoder now begins with, and whether before all padding."""
    state = model._fastpeft
    parts = [part for name in active_names(state) if (part := state.parts.get(name)) and part.encoder is not None]
    if not parts or getattr(model.config, "is_encoder_decoder", False):
        return 0, False
    return sum(part.encoder.used for part in parts), any(part.quirky for part in parts)


def _prompted(model: nn.Module, parts: list[Part], given: dict[str, Any]) -> Any:
    state = model._fastpeft
    base = _base(model, state)
    task, quirky = parts[0].task, any(part.quirky for part in parts)
    encoder_decoder = getattr(model.config, "is_encoder_decoder", False)
    cached = given.get("encoder_outputs") is not None if encoder_decoder else goes_on(given)
    if cached:
        behind_virtual_tokens(given, sum(part.encoder.used for part in parts), foremost=quirky)
        if quirky:
            given.pop("position_ids", None)
        return base(**given)
    if given.get("input_ids") is None and given.get("inputs_embeds") is None:
        return base(**given)  # which says what is missing
    prompt = prompt_of([part.encoder for part in parts])
    if quirky:
        call, given = _as_in_peft(model, task, prompt, given)
        return _called(state, parts, call, base, given)
    decodes = encoder_decoder and task.decodes_its_input(given)
    packs = not encoder_decoder and takes(state.original_class, "use_cache")  # which encoders do not
    call = with_virtual_tokens(given, prompt, packs=packs, decodes=decodes)
    room, total = call.room, (given["inputs_embeds"] if call.ids is None else given["input_ids"]).shape[1]
    trims = (decodes or not encoder_decoder) and not any(part.shows_virtual for part in parts)
    spares = trims and _may_spare(state) and spare_logits(given, room)
    task.move_targets(given, room, spares)
    as_dict = given.pop("return_dict", None)
    as_dict = getattr(model.config, "return_dict", True) if as_dict is None else as_dict
    output = _called(state, parts, call, base, {**given, "return_dict": True})
    if trims:
        output = without_virtual_tokens(output, room, total)
    return output if as_dict else output.to_tuple()


def _may_spare(state) -> bool:
    """Whether the model's own class computes logits, and of some places alone if it is asked to. Liger's cross-entropy
    computes none and cannot."""
    liger = state.original_class.forward.__module__.startswith("liger_kernel.")
    return state.original_forward is None and not liger and takes(state.original_class, "logits_to_keep")


def _called(state, parts: list[Part], call: Call, base: Callable, given: dict[str, Any]) -> Any:
    if torch.compiler.is_dynamo_compiling():
        return calling(state, call, base, **given)
    with explaining(parts[0].encoder, call.room.count, call.room.tokens):
        return calling(state, call, base, **given)


def _as_in_peft(model: nn.Module, task: type, prompt: Tensor, given: dict[str, Any]) -> tuple[Call, dict[str, Any]]:
    """The arguments that HF peft calls the base model with: embeddings, the prompt before everything, a mask of floats,
    positions dropped; places of answers not moved, and results not either."""
    given = dict(given)
    ids = given.pop("input_ids", None)
    mask = given.get("attention_mask")
    embedding = text_embedding(model)
    rows = given.get("inputs_embeds")
    room = Room(len(prompt), (ids if rows is None else rows).shape[1])
    if not hasattr(embedding, "in_front"):
        raise PatchError(
            f"the model's input embedding, a {type(embedding).__name__}, took its place after the patch, and knows "
            "nothing of virtual tokens; fastpeft.unpatch(model) and patch it again"
        )
    hooks = embedding._forward_hooks or embedding._forward_pre_hooks or "_hf_hook" in embedding.__dict__
    if rows is None and hooks:
        rows = embedding(ids)
    given["inputs_embeds"] = embedding.in_front(ids if rows is None else None, rows, prompt, room)
    if check_mask(mask, begins=True):
        longer = torch.cat((torch.ones(len(mask), room.count, device=mask.device), mask), 1)
        whole = mask.shape[1] == places(given.get("past_key_values"))  # of a static cache, and stays as long
        given["attention_mask"] = longer[:, : mask.shape[1]] if whole else longer
    given.pop("position_ids", None)
    task.move_targets_as_peft(given, room)
    return Call(None, prompt, room), given
