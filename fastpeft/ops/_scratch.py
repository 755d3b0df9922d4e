"""Memory of each thread that is written again and again: fresh pages cost a CPU more than what is written to them."""

import threading

import torch

ELEMENTS = 1 << 20  # of a dtype, which are there once something was written to them

_own = threading.local()


def scratch_like(block: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A contiguous tensor of the block's shape, uninitialised, until the next one of this thread. One of its own where
    the block is not on the CPU, larger than ELEMENTS, or a subclass of a tensor."""
    size = block.numel()
    if size > ELEMENTS or not block.is_cpu or type(block) is not torch.Tensor:
        return torch.empty_like(block, dtype=dtype, memory_format=torch.contiguous_format)
    buffers = _own.__dict__
    if dtype not in buffers:
        with torch.inference_mode(False):  # within which a tensor can later be written inside and outside of it
            buffers[dtype] = torch.empty(ELEMENTS, dtype=dtype, device="cpu")
    return buffers[dtype][:size].view(block.shape)
