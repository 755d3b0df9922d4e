"""What a call of a patched model hands from its root to its token embeddings: the virtual tokens that it begins with.

Virtual tokens (prompt tuning, P-tuning) are tokens of a vocabulary of their own, whose ids are far behind the model's.
The root writes them into the rows of a batch, and everything that a model makes of ids (positions, padding, the place
of a class, the decoder's shifted input) is made as for any other token. Only embeddings look them up elsewhere.
"""

import contextvars
import types
from dataclasses import dataclass

import torch
from torch import Tensor

from fastpeft.errors import PatchError
from fastpeft.scoped import scoped

# The id of the first virtual token: behind every vocabulary, so that a wrong id of the caller's is none of these.
FIRST = 2**30


@dataclass(frozen=True)
class Room:
    """Where P virtual tokens go in rows of S tokens: in front of the tokens, behind padding that stands before them.

    start: (B,) how much padding that is; None where there is none. source, virtual: (B, T) of the new rows, the place
    of a token in the old ones and the number of a virtual token, or -1; None without a start. kept: (B, S) where a
    token is now, where several sequences share a row and each has virtual tokens of its own; else None.
    """

    count: int
    tokens: int
    start: Tensor | None = None
    source: Tensor | None = None
    virtual: Tensor | None = None
    kept: Tensor | None = None


@dataclass(frozen=True)
class Call:
    """The tokens (B, S) of a call and its prompt (P, H). written: (B, T) the ids that the model is called with; ids and
    written are None where it is called with embeddings. decodes: whether a decoder too is given virtual tokens."""

    ids: Tensor | None
    prompt: Tensor
    room: Room
    written: Tensor | None = None
    decodes: bool = False


# Per patched model, the call in progress: {id of its PatchState: Call}.
_current: contextvars.ContextVar[dict[int, Call] | None] = contextvars.ContextVar("fastpeft_call", default=None)

# The same as attributes of a module, None where there is none: torch.compile reads them as in `fastpeft.selection`,
# where it compiles a part of a model whose root is not compiled. Whether it traces is asked by `is_dynamo_compiling`:
# `is_compiling` is true in all threads while one compiles.
_here = types.ModuleType("fastpeft.calls.here")
_here.__getattr__ = lambda key: (_current.get() or {}).get(int(key.removeprefix("of_")))


def current_call(state) -> Call | None:
    """What the model's root has handed over, in this thread."""
    if torch.compiler.is_dynamo_compiling():
        return getattr(_here, f"of_{id(state)}") if state.traced_call is None else state.traced_call
    return (_current.get() or {}).get(id(state))


def calling(state, call: Call, function, /, *args, **kwargs):
    """`function(*args, **kwargs)`, inside which `current_call` is `call`."""
    if torch.compiler.is_dynamo_compiling():  # which traces one call at a time, and knows no context variables
        state.traced_call = call
        try:  # and where the graph breaks within, this is run as it is instead
            return function(*args, **kwargs)
        finally:
            state.traced_call = None
    with scoped(_current, {**(_current.get() or {}), id(state): call}):
        return function(*args, **kwargs)


def room_for(count: int, tokens: int, mask: Tensor | None) -> Room:
    """The room for P virtual tokens in rows whose mask (B, S) is not zero at real tokens."""
    if mask is None:
        return Room(count, tokens)
    start = (mask != 0).to(torch.int8).argmax(-1)  # (B,), 0 in a row without tokens
    place = torch.arange(count + tokens, device=mask.device) - start[:, None]  # (B, T), behind the padding
    behind = place >= count
    virtual = place.where((place >= 0) & ~behind, -1)
    source = (place - count).where(behind, place) + start[:, None]
    return Room(count, tokens, start, source.where(virtual < 0, 0), virtual)


def packed_room_for(count: int, positions: Tensor) -> Room | None:
    """The room in rows of several sequences each, whose positions (B, S) begin anew; None if none does. A row with
    fewer sequences than another ends in virtual tokens of sequences without tokens."""
    batch, tokens = positions.shape
    begins = positions != torch.cat((positions[:, :1], positions[:, :-1] + 1), 1)  # (B, S), never the first
    sequence = begins.long().cumsum(1)
    most = int(sequence.max()) + 1
    if most == 1:
        return None
    kept = torch.arange(tokens, device=positions.device) + count * (sequence + 1)
    total = tokens + most * count
    source = kept.new_full((batch, total), -1)
    source.scatter_(1, kept, torch.arange(tokens, device=positions.device).expand(batch, -1))
    empty = source < 0
    virtual = (empty.long().cumsum(1) - 1) % count
    return Room(count, tokens, None, source.clamp(min=0), virtual.where(empty, -1), kept)


def check_each(values: Tensor, room: Room, name: str) -> None:
    """Raises PatchError unless there is one value for each token."""
    if values.ndim != 2 or values.shape[1] != room.tokens:
        raise PatchError(
            f"{name}: shape {tuple(values.shape)}; with a prompt one value for each of the {room.tokens} tokens is "
            "needed"
        )


def widened(values: Tensor, room: Room, fill: Tensor | int, name: str = "an argument") -> Tensor:
    """values (B, S), or one row for all, with `fill`, a number or (P,), at the virtual tokens: (B, T). Raises
    PatchError, which calls them `name`, for values of another shape."""
    check_each(values, room, name)
    fill = torch.as_tensor(fill, dtype=values.dtype, device=values.device)
    if room.source is None:
        return torch.cat((fill.expand(len(values), room.count), values), 1)
    source, virtual = room.source, room.virtual
    values = values.expand(len(source), -1)  # there may be one row of positions for all samples
    found = fill if fill.ndim == 0 else fill[virtual.clamp(min=0)]
    return torch.where(virtual >= 0, found, values.gather(1, source))


def trimmed(values: Tensor, room: Room) -> Tensor:
    """What of (B, L, ...) belongs to the tokens (B, S, ...), of the L last places; where padding stands in front, what
    is there has no meaning before and after."""
    if room.kept is None:
        return values[:, values.shape[1] - room.tokens :]
    return values[torch.arange(len(values), device=values.device)[:, None], room.kept]
