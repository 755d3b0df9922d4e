"""Tensors as callers have them: with any strides, in the middle of larger storages, whose bytes are watched."""

import itertools
from collections.abc import Iterable
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

AFTER = 5  # elements of a storage behind what a view can reach


class Layout(NamedTuple):
    """Where the elements of a tensor lie. turn: which permutation of its dimensions is the order in memory, 0 the usual
    one. step: a dimension of which storage has every element twice as far apart. expand: a dimension of stride 0.
    offset: elements of the storage before the first. All are taken modulo what the tensor has."""

    turn: int = 0
    step: int | None = None
    expand: int | None = None
    offset: int = 0

    def __repr__(self) -> str:
        return changed(self)


def changed(case: NamedTuple) -> str:
    """The expression that makes it, without what is as by default: short enough to be read, and to be pasted."""
    given = (name for name, default in case._field_defaults.items() if getattr(case, name) != default)
    return f"{type(case).__name__}({', '.join(f'{name}={getattr(case, name)!r}' for name in given)})"


CONTIGUOUS = Layout()
_DIM, _ALL = st.integers(0, 3), st.integers(0, 23)
LAYOUTS = st.one_of(
    st.just(CONTIGUOUS),
    st.builds(Layout, _ALL, st.none(), st.none(), _DIM),
    st.builds(Layout, _ALL, _DIM, st.none(), _DIM),
    st.builds(Layout, _ALL, st.none(), _DIM, _DIM),
    st.builds(Layout, _ALL, _DIM, _DIM, _DIM),
)


def layouts_of(names: Iterable[str]) -> st.SearchStrategy[dict[str, Layout]]:
    """Layouts of some of them; the others are contiguous."""
    return st.fixed_dictionaries({}, optional={name: LAYOUTS for name in names})


def _strides(shape: torch.Size, layout: Layout) -> tuple[list[int], int | None]:
    """(strides, the expanded dimension), as `layout` has them for a tensor of this shape."""
    if not shape:
        return [], None
    orders = list(itertools.permutations(range(len(shape))))
    step, expand = (None if each is None else each % len(shape) for each in (layout.step, layout.expand))
    strides, reach = [0] * len(shape), 1
    for dim in reversed(orders[layout.turn % len(orders)]):
        if dim != expand:
            strides[dim] = reach * (2 if dim == step else 1)
            reach = strides[dim] * max(1, shape[dim])
    return strides, expand


def _poison(dtype: torch.dtype) -> float | int | bool:
    """What no op can read without showing it."""
    return float("nan") if dtype.is_floating_point else True if dtype == torch.bool else -(1 << 30)


def laid_out(values: Tensor, layout: Layout) -> Tensor:
    """A view of these values (of an expanded dimension those at 0) in a larger storage, filled with poison."""
    strides, expand = _strides(values.shape, layout)
    span = sum((size - 1) * stride for size, stride in zip(values.shape, strides, strict=True)) + 1
    elements = layout.offset + max(0, span if values.numel() else 0) + AFTER
    storage = torch.full((elements,), _poison(values.dtype), dtype=values.dtype)
    view = storage.as_strided(values.shape, strides, layout.offset)
    if values.numel():
        distinct = slice(0, 1)
        place = tuple(distinct if dim == expand else slice(None) for dim in range(values.ndim))
        view[place].copy_(values[place])
    return view.detach()


def _bytes(t: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage())


class Watch:
    """Remembers whole storages, with what lies around the tensors in them."""

    def __init__(self, tensors: Iterable[Tensor]):
        self.before = [(t, _bytes(t).clone(), t._version) for t in tensors]

    def assert_untouched(self) -> None:
        for t, before, version in self.before:
            assert t._version == version, f"a tensor of shape {tuple(t.shape)} was written in place"
            assert torch.equal(_bytes(t), before), f"bytes in the storage of a tensor of {tuple(t.shape)} have changed"
