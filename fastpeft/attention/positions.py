"""Real tokens stand behind the prefix: where a model makes something of positions, they are moved by its length.

Rotary embeddings take positions as an argument, tables of learned positions look them up, and T5 makes a bias of
differences of positions. ALiBi needs nothing: its virtual keys stand at negative positions.
"""

import inspect

from torch import nn

from fastpeft.tuners.attention_layer import AdaptedAttention
from fastpeft.tuners.layer import AdapterLayer, Companion

# What tables of learned positions are called, which stand beside the embedding of tokens.
TABLES = ("wpe", "embed_positions", "position_embeddings", "position_embedding")


class Shift(Companion):
    """A module that makes something of positions; an adapter's entry is its number of virtual tokens."""

    prefix = "Shifted"

    def shift(self) -> int:
        """How far this call's positions are moved."""
        return sum(self._fastpeft.adapters[name] for name in self.active_adapters())


class ShiftedRotary(Shift):
    """forward(x, position_ids, ...), as all of transformers' rotary embeddings have it."""

    def forward(self, x, position_ids=None, *args, **kwargs):
        shift = self.shift()
        return self.base_forward(x, position_ids + shift if shift else position_ids, *args, **kwargs)


class ShiftedTable(Shift):
    """nn.Embedding over positions. What stands for padding (RoBERTa's) stays."""

    def forward(self, input):
        return self.base_forward(_moved(self, input))


class _Lookup(nn.Embedding):
    """Stands behind a subclass of nn.Embedding, whose forward computes positions and calls nn.Embedding's."""

    def forward(self, input):
        return nn.Embedding.forward(self, _moved(self, input))


class ShiftedSubclass(Shift):
    """A subclass of nn.Embedding (OPT's, BART's)."""

    behind = (_Lookup,)

    def forward(self, *args, **kwargs):
        return self.base_forward(*args, **kwargs)


class ShiftedCount(Shift):
    """A module that counts positions on from `past_key_values_length`, or is given them (M2M-100's, Whisper's)."""

    def forward(self, *args, **kwargs):
        given = inspect.signature(self._fastpeft.original_class.forward).bind(self, *args, **kwargs)
        given.apply_defaults()
        values, shift = given.arguments, self.shift()
        values["past_key_values_length"] = values["past_key_values_length"] + shift
        if values.get("position_ids") is not None:
            values["position_ids"] = values["position_ids"] + shift
        return self.base_forward(*given.args[1:], **given.kwargs)


def _moved(table, positions):
    shift = table.shift()
    if not shift:
        return positions
    padding = table.padding_idx
    if padding is None:  # OPT's padding is at -1, and its rows begin at an offset
        padding = getattr(table, "offset", 0) - 1
    return (positions + shift).where(positions != padding, positions)


class RelativeBias(AdaptedAttention):
    """T5's attention: the bias gets columns for the prefix, in front; the first layer makes it for all."""

    def compute_bias(self, query_length, key_length, device=None, past_seen_tokens=0):
        length = self.active_length()
        return super().compute_bias(
            query_length, key_length + length, device=device, past_seen_tokens=past_seen_tokens + length
        )


def _takes(kind: type, name: str) -> bool:
    return name in inspect.signature(kind.forward).parameters


def _mixin_of_table(kind: type) -> type[Shift] | None:
    """By what the forward of something that is called like a table of positions does."""
    if kind.forward is nn.Embedding.forward:
        return ShiftedTable
    if issubclass(kind, nn.Embedding) and "__class__" in inspect.unwrap(kind.forward).__code__.co_freevars:  # `super()`
        return ShiftedSubclass
    return ShiftedCount if _takes(kind, "past_key_values_length") else None


def _reads_all_of(owner: nn.Module) -> bool:
    """Whether every call of a table's owner takes the whole table, whose rows are places in a sound (Whisper's encoder)
    and leave none to move to."""
    forward = inspect.unwrap(type(owner).forward)
    return "num_embeddings" in getattr(getattr(forward, "__code__", None), "co_names", ())


def shifted_modules(backbone: nn.Module, path: str) -> list[tuple[str, nn.Module, type[Shift]]]:
    """(path, module, mixin) of all that makes something of positions inside the backbone."""
    found = []
    for name, module in backbone.named_modules(prefix=path):
        kind = module._fastpeft.original_class if isinstance(module, AdapterLayer) else type(module)
        owner, _, called = name.rpartition(".")
        table = called in TABLES and not _reads_all_of(backbone.get_submodule(owner[len(path) :].lstrip(".")))
        mixin = _mixin_of_table(kind) if table else None
        if any(buffer.endswith("inv_freq") for buffer in module._buffers) and _takes(kind, "position_ids"):
            mixin = ShiftedRotary
        if mixin is not None:
            found.append((name, module, mixin))
    return found
