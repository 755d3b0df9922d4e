"""Selective checkpointing (torch's `create_selective_checkpoint_contexts`), which keeps what some operators gave, and
gives it again while the rest is recomputed: what it may have kept, nobody may change in place."""

import functools

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


@functools.cache
def _keepers() -> tuple[type, ...]:
    """torch's modes for it, which are not public: none where they have other names."""
    from torch.utils import checkpoint

    names = "_CachingTorchDispatchMode", "_CachedTorchDispatchMode"
    return tuple([getattr(checkpoint, name) for name in names if hasattr(checkpoint, name)])


def own(product: torch.Tensor) -> torch.Tensor:
    """A product that can be changed in place: itself, or a copy where it may have been kept."""
    if torch._C._len_torch_dispatch_stack() and any(
        isinstance(mode, _keepers()) for mode in _get_current_dispatch_mode_stack()
    ):
        return product.clone()
    return product
