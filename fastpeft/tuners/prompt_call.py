"""A call of a model with virtual tokens in front: what becomes of its arguments, and of what comes back."""

import contextlib
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastpeft.attention.positions import TABLES
from fastpeft.calls import FIRST, Call, Room, check_each, packed_room_for, room_for, trimmed, widened
from fastpeft.errors import PatchError
from fastpeft.ops.prompt_embedding import prepend_prompt

# What of a model's result has a place for each token.
PER_TOKEN = {"logits": 3, "start_logits": 2, "end_logits": 2, "last_hidden_state": 3}  # name -> dimensions

# Arguments of some models with places for tokens (XLNet's, Longformer's, XLM's, LayoutLM's).
FIXED = ("perm_mask", "target_mapping", "global_attention_mask", "langs", "bbox")

# What models call their caches.
CACHES = ("past_key_values", "cache_params", "state", "mems")

_names: dict[type, tuple[str, ...]] = {}  # no functools.cache, of which torch.compile warns


def argument_names(kind: type) -> tuple[str, ...]:
    """What a class's forward calls its arguments, but for those that it takes by any name."""
    if kind not in _names:
        parameters = inspect.signature(kind.forward).parameters.values()
        _names[kind] = tuple(each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD)[1:]
    return _names[kind]


def takes(kind: type, name: str) -> bool:
    """Whether a class's forward names this argument."""
    return name in argument_names(kind)


def named_arguments(kind: type, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of a class's forward by name. Raises TypeError for more than it takes."""
    names = argument_names(kind)
    if len(args) > len(names):
        raise TypeError(f"{kind.__name__}.forward() takes {len(names)} positional arguments; {len(args)} were given")
    return {**dict(zip(names, args, strict=False)), **kwargs}


def most_positions(model: nn.Module, path: str) -> int | None:
    """How many tokens a row can have by the table of learned positions beside the embedding at `path`; None without
    one."""
    beside = model.get_submodule(path.rpartition(".")[0])
    for name in TABLES:
        table = beside._modules.get(name)
        if isinstance(table, nn.Embedding):
            unused = getattr(table, "offset", 0)  # BART's first two rows, and up to RoBERTa's for padding
            if type(table).forward is nn.Embedding.forward and table.padding_idx is not None:
                unused = table.padding_idx + 1
            return table.num_embeddings - unused
    return None


@contextlib.contextmanager
def explaining(encoder: nn.Module, count: int, tokens: int):
    """Around a call of a model with learned positions: an error says, if so it is, that the prompt left too few."""
    try:
        yield
    except (IndexError, RuntimeError) as error:
        if encoder.most is None or count + tokens <= encoder.most:
            raise
        raise PatchError(
            f"{count} virtual tokens and {tokens} tokens are {count + tokens}, and the model has a table of "
            f"{encoder.most} positions; shorten one of them"
        ) from error


def prompt_of(encoders: Sequence[nn.Module]) -> Tensor:
    """(P, H): the rows of these prompts, one after the other."""
    rows = [encoder.rows() for encoder in encoders]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def filled(cache: Any) -> bool:
    """Whether a cache has tokens in it, and so the prompt before them."""
    if not hasattr(cache, "get_seq_length"):
        return cache is not None  # the states of RWKV and XLNet, which are there or not
    try:
        length = cache.get_seq_length()
    except ValueError:  # Mamba's has no length
        return cache.has_previous_state()
    if isinstance(length, Tensor) and torch.compiler.is_dynamo_compiling():
        return True  # a static cache is filled outside of compiled code
    return bool(length)


def goes_on(given: dict[str, Any]) -> bool:
    """Whether a call goes on with a cache, by whatever name."""
    return any(filled(given.get(name)) for name in CACHES)


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
    given: dict[str, Any], prompt: Tensor, *, packs: bool = False, decodes: bool = False, foremost: bool = False
) -> Call:
    """Put virtual tokens into the arguments of a call, in place: behind padding that stands in front, or `foremost`;
    before each sequence of a row, where the model `packs` several into one. Embeddings that the caller gives are longer
    then, and the call has no ids. Raises PatchError for what cannot be made longer."""
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    for name in FIXED:
        if given.get(name) is not None:
            raise PatchError(
                f"{name}: it has places for the tokens alone, and is not made longer for a prompt; leave it out"
            )
    room = _room(given, len(prompt), (ids if ids is not None else embeds).shape[:2], packs, foremost)
    if (mask := given.get("attention_mask")) is not None:
        fits = mask.shape[1] == room.tokens  # else it is of a whole static cache
        given["attention_mask"] = widened(mask, room, 1) if fits else _of_cache(mask, len(prompt), foremost)
    if (kinds := given.get("token_type_ids")) is not None:
        given["token_type_ids"] = widened(kinds, room, 0, "token_type_ids")
    if (positions := given.get("position_ids")) is not None:
        given["position_ids"] = _positions(positions, room)
    if ids is None:
        if room.kept is None:
            given["inputs_embeds"] = prepend_prompt(embeds, prompt, start=room.start)
        else:
            given["inputs_embeds"] = _spread(embeds, prompt, room)
        return Call(None, prompt, room)
    given["input_ids"] = widened(ids, room, torch.arange(FIRST, FIRST + len(prompt), device=ids.device))
    return Call(ids, prompt, room, given["input_ids"], decodes)


def _spread(embeds: Tensor, prompt: Tensor, room: Room) -> Tensor:
    """(B, T, H): embeddings (B, S, H) and the prompts of several sequences in a row."""
    rows = embeds.gather(1, room.source[..., None].expand(-1, -1, embeds.shape[-1]))
    found = F.embedding(room.virtual.clamp(min=0), prompt).to(rows.dtype)
    return found.where((room.virtual >= 0)[..., None], rows)


def _positions(positions: Tensor, room: Room) -> Tensor:
    """Those of the tokens are moved behind the prompt's, which are the first; padding in front keeps its own. (B, S),
    or several such, as of text and the two sides of pictures."""
    if positions.ndim == 3:
        return torch.stack([_positions(each, room) for each in positions])
    check_each(positions, room, "position_ids")
    moved = positions + room.count
    if room.start is not None:
        padding = torch.arange(room.tokens, device=positions.device) < room.start[:, None]
        moved = positions.where(padding, moved)
    return widened(moved, room, torch.arange(room.count, device=positions.device))


def _room(given: dict[str, Any], count: int, shape: Sequence[int], packs: bool, foremost: bool) -> Room:
    batch, tokens = shape
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    check_mask(mask, begins=True)
    if mask is not None and tuple(mask.shape) != (batch, tokens):
        if len(mask) == batch and mask.shape[1] == places(given.get("past_key_values")):
            return room_for(count, tokens, None if foremost else mask)
        raise PatchError(
            f"attention_mask: shape {tuple(mask.shape)} beside tokens of shape {(batch, tokens)}; these shapes must be "
            "equal, and the prompt's places are added here"
        )
    if foremost:
        return Room(count, tokens)
    if packs and mask is None and _may_be_packed(positions, given):
        packed = packed_room_for(count, positions.expand(batch, -1))
        if packed is not None:
            given.setdefault("use_cache", False)  # with which a model does not see that sequences are packed
            _move_bounds(given, count)
            return packed
    if packs and mask is None and positions is not None and positions.ndim == 3 and len(positions) == 4:
        _check_unpacked(positions[0])  # of these the first are those of text
    return room_for(count, tokens, mask)


def _may_be_packed(positions: Tensor | None, given: dict[str, Any]) -> bool:
    if positions is None or positions.ndim != 2 or given.get("past_key_values") is not None:
        return False
    if torch.compiler.is_dynamo_compiling():  # where what is done cannot depend on their values
        _check_unpacked(positions)
        return False
    return True


def _check_unpacked(positions: Tensor) -> None:
    """Raises RuntimeError, in compiled code too, if several sequences share a row."""
    torch._assert_async(
        (positions.diff() == 1).all(),
        "position_ids that begin anew: here a prompt stands in front of the first sequence of a row only; give each "
        "sequence a row of its own",
    )


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
        whole = mask.shape[1] == places(given.get("past_key_values"))
        given["attention_mask"] = (_of_cache if whole else longer_mask)(mask, count, foremost)
    if (positions := given.get("position_ids")) is not None:
        given["position_ids"] = positions + count


def places(cache: Any) -> int | None:
    """How many tokens a static cache has room for; None of any other."""
    if not getattr(cache, "is_compileable", False):
        return None
    return (getattr(cache, "get_max_length", None) or cache.get_max_cache_shape)()  # the older name


def _of_cache(mask: Tensor, count: int, foremost: bool) -> Tensor:
    """The same for a mask of all places of a static cache, the last of which are not filled: it stays as long."""
    return longer_mask(mask, count, foremost)[:, : mask.shape[1]]


def longer_mask(mask: Tensor, count: int, foremost: bool) -> Tensor:
    """A mask (B, T) with ones for P virtual tokens, (B, P + T)."""
    return widened(mask, room_for(count, mask.shape[1], None if foremost else mask), 1)


def spare_logits(given: dict[str, Any], room: Room) -> bool:
    """Whether the logits of all tokens are asked for, so that those of virtual ones can be left out. Where only some
    are, `logits_to_keep` is moved behind the prompt, in place. Raises PatchError where sequences share a row."""
    keep = given.get("logits_to_keep")
    if keep is None or isinstance(keep, int) and (keep == 0 or keep >= room.tokens):
        given.pop("logits_to_keep", None)
        return room.kept is None
    if room.kept is not None:
        raise PatchError(
            "logits_to_keep: several sequences share a row, and each has a prompt of its own there; leave it out, and "
            "choose from the logits"
        )
    if isinstance(keep, Tensor):
        given["logits_to_keep"] = torch.where(keep < 0, keep, keep + room.count)
    elif keep < 0:  # all but the first
        given["logits_to_keep"] = keep - room.count
    return False


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
