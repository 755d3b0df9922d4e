"""A call of a model with virtual tokens in front: what becomes of its arguments, and of what comes back."""

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.calls import Call, Room, packed_room_for, room_for, trimmed, widened
from fastpeft.errors import PatchError
from fastpeft.ops.prompt_embedding import prepend_prompt

# What of a model's result has a place for each token.
PER_TOKEN = {"logits": 3, "start_logits": 2, "end_logits": 2, "last_hidden_state": 3}  # name -> dimensions


@functools.cache
def _argument_names(kind: type) -> tuple[str, ...]:
    return tuple(inspect.signature(kind.forward).parameters)[1:]


def takes(kind: type, name: str) -> bool:
    """Whether a class's forward names this argument."""
    return name in _argument_names(kind)


def named_arguments(kind: type, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of a class's forward by name."""
    return {**dict(zip(_argument_names(kind), args, strict=False)), **kwargs}


def prompt_of(encoders: Sequence[nn.Module]) -> Tensor:
    """(P, H): the rows of these prompts, one after the other."""
    rows = [encoder.rows() for encoder in encoders]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def filled(cache: Any) -> bool:
    """Whether a cache has tokens in it, and so the prompt before them."""
    length = 0 if cache is None else cache.get_seq_length()
    if isinstance(length, Tensor) and torch.compiler.is_compiling():
        return True  # a static cache is filled outside of compiled code
    return bool(length)


def check_mask(mask: Any, begins: bool) -> bool:
    """Whether the mask is (B, S), to be widened. Raises PatchError for a matrix where the prompt is yet to come."""
    if mask is None or isinstance(mask, Tensor) and mask.ndim == 2:
        return mask is not None
    if begins:
        raise PatchError(
            "attention_mask: a prompt stands in front of the tokens, and only a mask (batch, tokens) can be made "
            "longer for it; pass that one"
        )
    return False


def with_virtual_tokens(
    given: dict[str, Any], prompt: Tensor, first: int, *, decodes: bool = False, foremost: bool = False
) -> Call:
    """Put virtual tokens, whose ids begin at `first`, into the arguments of a call, in place: behind padding that
    stands in front, or `foremost`. Embeddings that the caller gives are longer then, and the call has no ids."""
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    room = _room(given, len(prompt), (ids if ids is not None else embeds).shape[:2], foremost)
    if (mask := given.get("attention_mask")) is not None:
        given["attention_mask"] = widened(mask, room, 1)
    if (kinds := given.get("token_type_ids")) is not None:
        given["token_type_ids"] = widened(kinds, room, 0)
    if (positions := given.get("position_ids")) is not None:
        given["position_ids"] = _positions(positions, room)
    if ids is None:
        given["inputs_embeds"] = prepend_prompt(embeds, prompt, start=room.start)
        return Call(None, prompt, room)
    given["input_ids"] = widened(ids, room, torch.arange(first, first + len(prompt), device=ids.device))
    return Call(ids, prompt, room, decodes)


def _positions(positions: Tensor, room: Room) -> Tensor:
    """Those of the tokens are moved behind the prompt's, which are the first; padding in front keeps its own."""
    if positions.ndim != 2:
        raise PatchError(f"position_ids: shape {tuple(positions.shape)}; with a prompt (batch, tokens) is needed")
    moved = positions + room.count
    if room.start is not None:
        padding = torch.arange(room.tokens, device=positions.device) < room.start[:, None]
        moved = positions.where(padding, moved)
    return widened(moved, room, torch.arange(room.count, device=positions.device))


def _room(given: dict[str, Any], count: int, shape: Sequence[int], foremost: bool) -> Room:
    batch, tokens = shape
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    check_mask(mask, begins=True)
    if foremost:
        return Room(count, tokens)
    if mask is None and positions is not None and _may_be_packed(positions, given):
        packed = packed_room_for(count, positions.expand(batch, -1))
        if packed is not None:
            given.setdefault("use_cache", False)  # with which a model does not see that sequences are packed
            _move_bounds(given, count)
            return packed
    return room_for(count, tokens, mask)


def _may_be_packed(positions: Tensor, given: dict[str, Any]) -> bool:
    plain = given.get("input_ids") is not None and given.get("past_key_values") is None
    return plain and positions.ndim == 2 and not torch.compiler.is_compiling()


def _move_bounds(given: dict[str, Any], count: int) -> None:
    """What flash attention is told of packed sequences in one row: each is longer by the prompt."""
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        if (bounds := given.get(name)) is not None:
            given[name] = bounds + count * torch.arange(len(bounds), dtype=bounds.dtype, device=bounds.device)
    for name in ("max_length_q", "max_length_k"):
        if given.get(name) is not None:
            given[name] = given[name] + count


def behind_virtual_tokens(given: dict[str, Any], count: int, foremost: bool) -> None:
    """The arguments of a call that goes on with a cache, in place: the mask and positions know of the prompt in it."""
    mask = given.get("attention_mask")
    if check_mask(mask, begins=False):
        given["attention_mask"] = longer_mask(mask, count, foremost)
    if (positions := given.get("position_ids")) is not None:
        given["position_ids"] = positions + count


def longer_mask(mask: Tensor, count: int, foremost: bool) -> Tensor:
    """A mask (B, T) with ones for P virtual tokens, (B, P + T)."""
    return widened(mask, room_for(count, mask.shape[1], None if foremost else mask), 1)


def without_virtual_tokens(output: Any, room: Room, total: int) -> Any:
    """A model's result (transformers' ModelOutput) for the tokens alone, in place."""
    for name, dimensions in PER_TOKEN.items():
        value = output.get(name)
        if value is not None and value.ndim == dimensions and _long(value, room, total):
            output[name] = trimmed(value, room)
    if (states := output.get("hidden_states")) is not None:
        output["hidden_states"] = tuple(trimmed(each, room) if _long(each, room, total) else each for each in states)
    return output


def _long(value: Tensor, room: Room, total: int) -> bool:
    """Whether there are places for virtual tokens: for all of them, or for the last, which predicts the first token."""
    return value.shape[1] == total or room.kept is None and value.shape[1] == room.tokens + 1
