"""Tensors with more than 2**31 elements between their rows, and grids with as many behind them, in a few kilobytes.

`far` moves a tensor into a storage of 6 GiB of which nobody touches more than the tensor's own elements; in Triton's
interpreter an offset that wraps then raises (`tests.interpreter.overflow_checks`), or reads what is not there.
`last_programs` runs the end of a grid alone: the programs whose rows of a large output lie beyond 2**31 elements.
"""

import contextlib
from unittest import mock

import torch

APART = 1 << 30  # elements: index 2 is at 2**31
LENGTH = 3  # of a dimension whose elements lie so far apart


class Far:
    """A storage for tensors of up to `room` elements beside the dimension that is stretched."""

    def __init__(self, dtype: torch.dtype, room: int = 1 << 12):
        self.room, self.used = room, 0
        with filled(False):
            self.storage = torch.empty((LENGTH - 1) * APART + (1 << 20), dtype=dtype)

    def far(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """The same values, elements `APART` apart along `dim` and next to each other otherwise."""
        assert tensor.shape[dim] == LENGTH and tensor.dtype == self.storage.dtype
        strides, step = [0] * tensor.ndim, 1
        for d in reversed(range(tensor.ndim)):
            strides[d] = APART if d == dim else step
            step *= 1 if d == dim else tensor.shape[d]
        assert step <= self.room
        view = self.storage.as_strided(tensor.shape, strides, self.used)
        self.used += self.room
        return view.copy_(tensor)


@contextlib.contextmanager
def filled(wanted: bool):
    """Whether deterministic mode fills what is allocated, and so touches it."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = wanted
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = before


@contextlib.contextmanager
def last_programs():
    """Of every grid only the last program runs."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.interpreter import interpreter_builder as builder

    run, shipped = InterpretedFunction.run, type(builder)

    def of_the_end(self, *arguments, grid, warmup, **options):
        whole = (*grid, 1, 1)[:3]
        last = tuple(size - 1 for size in whole)
        with (
            mock.patch.object(builder, "set_grid_dim", lambda *_: shipped.set_grid_dim(builder, *whole)),
            mock.patch.object(builder, "set_grid_idx", lambda *_: shipped.set_grid_idx(builder, *last)),
        ):
            return run(self, *arguments, grid=(1,), warmup=warmup, **options)

    with mock.patch.object(InterpretedFunction, "run", of_the_end):
        yield
