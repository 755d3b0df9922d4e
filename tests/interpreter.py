"""What Triton's interpreter can be made to show that a GPU cannot: integer overflow, writes beside an output, and
whether a result depends on the order of the programs; and what a GPU does of itself: symmetric products.

All of it hooks into `triton.runtime.interpreter`, which is private; `test_instruments.py` proves that each hook bites.
"""

import contextlib
import dataclasses

import numpy as np
import torch

from fastpeft.ops import _programs


@contextlib.contextmanager
def overflow_checks():
    """A sum, difference or product of 32-bit integers that overflows raises, as does a device_assert."""
    from triton.runtime.interpreter import interpreter_builder as builder

    before = builder.options
    builder.options = dataclasses.replace(before, debug=True, sanitize_overflow=True)
    try:
        yield
    finally:
        builder.options = before


@contextlib.contextmanager
def backwards():
    """The programs of every grid run from the last to the first."""
    from triton.runtime.interpreter import interpreter_builder as builder

    forwards = builder.set_grid_idx

    def set_grid_idx(x, y, z):
        return forwards(*(size - 1 - index for size, index in zip(builder.grid_dim, (x, y, z), strict=True)))

    builder.set_grid_idx = set_grid_idx
    try:
        yield
    finally:
        del builder.set_grid_idx


@contextlib.contextmanager
def symmetric_products():
    """fp32 products a b and (bᵀ aᵀ)ᵀ are equal bit for bit, as on a GPU, where both add up in the order of the inner
    dimension. A BLAS takes rows and columns differently; then a score made again in the other orientation differs from
    the one that the softmax was normalised with, an error of the interpreter's and not of a kernel's."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    blas = InterpreterBuilder.create_dot

    def create_dot(self, a, b, acc, *options):
        if a.data.dtype != np.float32:
            return blas(self, a, b, acc, *options)
        rows, columns = np.ascontiguousarray(a.data), np.ascontiguousarray(b.data.T)
        return TensorHandle(np.einsum("mk,nk->mn", rows, columns) + acc.data, acc.dtype.scalar)

    InterpreterBuilder.create_dot = create_dot
    try:
        yield
    finally:
        InterpreterBuilder.create_dot = blas


class GuardedTorch:
    """Stands in for `torch` in a module of kernels: `empty` hands out the middle of a larger, filled storage. Programs
    that were recorded before are forgotten: they have torch's own."""

    ZONE = 1024  # elements on either side, and a fill that no product of the tests comes to
    FILL = 77

    def __init__(self):
        _programs.forget()
        self.allocations = []

    def __getattr__(self, name):
        return getattr(torch, name)

    def empty(self, *size, **options):
        shape = torch.empty(*size, device="meta").shape
        whole = torch.full((shape.numel() + 2 * self.ZONE,), self.FILL, **options)
        middle = whole[self.ZONE : self.ZONE + shape.numel()]
        if middle.is_floating_point():
            middle.fill_(float("nan"))
        self.allocations.append(whole)
        return middle.view(shape)

    def trespassed(self) -> int:
        """How many elements of the guard zones were written."""
        zones = [zone for whole in self.allocations for zone in (whole[: self.ZONE], whole[-self.ZONE :])]
        return sum(int((zone != self.FILL).sum()) for zone in zones)
