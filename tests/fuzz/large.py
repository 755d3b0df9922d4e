"""What the torch path does with large tensors alone, done with small ones: rows taken in several blocks, and products
that are asked of oneDNN, whatever the processor."""

import contextlib

import pytest
import torch

from fastpeft.ops import _cpu_products as cpu
from fastpeft.ops import _lora_linear_torch as path
from fastpeft.ops import _programs

BLOCK, MASKED = 512, 1024  # elements of a block of rows, without dropout and with it


@contextlib.contextmanager
def as_if_large(wanted: bool):
    """If it is wanted."""
    with pytest.MonkeyPatch.context() as patch:
        if wanted:
            patch.setattr(path, "BLOCK_ELEMENTS", BLOCK)
            patch.setattr(path, "MASKED_ELEMENTS", MASKED)
            patch.setattr(cpu, "ELEMENTS", 1)
            patch.setattr(cpu, "ROWS", 1)
            patch.setattr(cpu, "prefers_onednn", lambda: torch.backends.mkldnn.is_available())
            _programs.forget()
        yield
        if wanted:
            _programs.forget()
