"""Attention modules that carry a prefix: what they add to their own class, and where the prefix comes from."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastpeft.tuners.layer import AdapterLayer
from fastpeft.tuners.prefix_encoder import PrefixEncoder


@dataclass(frozen=True)
class Slice:
    """One adapter's prefix in one layer: two of the encoder's blocks, of `heads` heads each. `window`: "slide" or
    "pin"."""

    encoder: PrefixEncoder
    key_block: int
    value_block: int
    heads: int
    window: str

    @property
    def length(self) -> int:
        return self.encoder.length

    def keys_and_values(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Two tensors (heads, P, D)."""
        key, value = self.encoder.blocks(self.key_block, self.value_block)
        return tuple(t.to(dtype).unflatten(1, (self.heads, -1)).transpose(0, 1) for t in (key, value))


class AdaptedAttention(AdapterLayer):
    """An attention module with prefixes. As it is, it serves every class that asks transformers' interface for its
    attention function; the function finds the prefix here."""

    prefix = "Prefixed"

    def active_prefix(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """((Hkv, P, D), (Hkv, P, D)), one after the other of the active adapters; None without any."""
        adapters = self._fastpeft.adapters
        found = [adapters[name].keys_and_values(dtype) for name in self.active_adapters()]
        if len(found) < 2:
            return found[0] if found else None
        return tuple(torch.cat(parts, 1) for parts in zip(*found, strict=True))

    def active_length(self) -> int:
        """How many virtual tokens a call now has."""
        return sum(self._fastpeft.adapters[name].length for name in self.active_adapters())

    def prefix_window(self) -> str:
        """What a sliding window does to the prefix."""
        return self._fastpeft.adapters[self.active_adapters()[0]].window

    def forward(self, *args, **kwargs):
        return self.base_forward(*args, **kwargs)

    def parameters_of(self, name: str) -> dict:
        """None of its own: the encoder has them."""
        return {}

    def delete_adapter(self, name: str) -> None:
        self._fastpeft.adapters.pop(name, None)

    def prepare_merge(self, names) -> None:
        """A prefix cannot be merged into weights; `merge` asks the encoders, which refuse."""

    def unmerge(self) -> None:
        """Nothing to do."""
