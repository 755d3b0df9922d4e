"""The mask that transformers' models make once a forward pass, as a few numbers and vectors in place of a matrix.

A model asks its attention implementation's mask function for a mask and hands the result to every layer. Ours gives a
`Mask`, from which the op knows what a query sees, and from which the (B, 1, S, T) matrix of an ordinary implementation
can still be made, for modules that have no prefix. Only what cannot be said so is a matrix.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

BEFORE = "_fastpeft_before"  # of a configuration that names our attention: the implementation that it named


@dataclass(frozen=True)
class Mask:
    """Key j of the layer's keys is at position kv_offset + j, query i at q_offset + i. padding: (B, T) bool, True to
    attend. segments: (B, T), the packed sequence of each token. start: (B,), at which position a sample's tokens begin,
    where padding stands in front of any. `arguments` make the matrix."""

    causal: bool
    window: int | None
    q_offset: int
    kv_offset: int
    padding: Tensor | None
    segments: Tensor | None
    arguments: dict
    behind: bool = False  # whether all padding stands behind the tokens of a causal model, none of which sees it
    start: Tensor | None = None

    ndim: ClassVar[int] = 2  # Falcon asks, and adds its ALiBi onto what has 4

    def to(self, *_) -> "Mask":
        """Itself: MPT wants its mask as booleans."""
        return self

    def matrix(self, implementation: str) -> Tensor | None:
        """The mask as that implementation of attention has it."""
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

        make = ALL_MASK_ATTENTION_FUNCTIONS._global_mapping.get(implementation)
        return None if make is None else make(**self.arguments)


@dataclass(frozen=True)
class _Pattern:
    causal: bool
    window: int | None = None
    segments: Tensor | None = None


def mask_function(**arguments):
    """What is registered with transformers' AttentionMaskInterface; its arguments are those of `sdpa_mask`."""
    offsets = arguments.get("q_offset", 0), arguments.get("kv_offset", 0)
    pattern = pattern_of(arguments["mask_function"])
    if pattern is None or not all(isinstance(offset, int) for offset in offsets):
        from transformers.masking_utils import eager_mask, sdpa_mask

        # A static cache's offsets are tensors, and generation may hand its mask to the model as an input, where only a
        # matrix is known: of numbers, where the model's own code expects those.
        make = eager_mask if getattr(arguments.get("config"), BEFORE, None) == "eager" else sdpa_mask
        return make(**{**arguments, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
    q_offset, kv_offset = offsets
    padding, keys = arguments.get("attention_mask"), arguments["kv_length"]
    start, behind = None, False
    if padding is not None:
        start = padding.to(torch.int32).argmax(1)
        padding = torch.nn.functional.pad(padding, (0, max(0, keys + kv_offset - padding.shape[-1])))
        padding = padding[:, kv_offset : kv_offset + keys]
        # The values are read once a forward, which waits for a GPU; never for one query a sample, in decoding.
        if not torch.compiler.is_compiling() and arguments.get("q_length") != 1:
            facts = padding.all(), (padding[:, 1:] <= padding[:, :-1]).all(), start.any()
            none, behind, in_front = torch.stack(facts).tolist()
            padding, start = None if none else padding, start if in_front else None
            behind = behind and pattern.causal and not none
    parts = (pattern.causal, pattern.window, q_offset, kv_offset, padding, pattern.segments)
    return Mask(*parts, arguments, behind, start)


def pattern_of(function: Callable) -> _Pattern | None:
    """What a mask function of transformers says, read from how it was put together; None if it is not one that the op
    knows. They are closures, so their parts are in their cells."""
    from transformers import masking_utils as theirs

    if function is theirs.causal_mask_function:
        return _Pattern(causal=True)
    if function is theirs.bidirectional_mask_function:
        return _Pattern(causal=False)
    if _made_by(function, "and_masks"):
        parts = _cells(function)["mask_functions"]
        if len(parts) == 2:
            return _pattern_of_two(*parts)
    return None


def _pattern_of_two(first: Callable, second: Callable) -> _Pattern | None:
    if _made_by(first, "packed_sequence_mask_function") and _made_by(second, "remap_positions_for_packed_sequence"):
        inner = pattern_of(_cells(second)["mask_function"])
        if inner is None or inner.segments is not None:
            return None
        return _Pattern(inner.causal, inner.window, _cells(first)["packed_sequence_mask"])
    if _made_by(second, "packed_sequence_mask_function"):  # of releases that count positions over the whole row
        inner = pattern_of(first)
        if inner is None or inner.segments is not None:
            return None
        return _Pattern(inner.causal, inner.window, _cells(second)["packed_sequence_mask"])
    inner = pattern_of(second)
    if inner is None or inner != _Pattern(inner.causal):
        return None
    if _made_by(first, "sliding_window_overlay") and inner.causal:
        return _Pattern(causal=True, window=_cells(first)["sliding_window"])
    if _made_by(first, "sliding_window_bidirectional_overlay") and not inner.causal:
        return _Pattern(causal=False, window=_cells(first)["sliding_window"] + 1)  # theirs is the greatest distance
    return None


def _made_by(function: Callable, maker: str) -> bool:
    return getattr(function, "__qualname__", "").startswith(f"{maker}.<locals>.")


def _cells(function: Callable) -> dict:
    cells = [cell.cell_contents for cell in function.__closure__]
    return dict(zip(function.__code__.co_freevars, cells, strict=True))
