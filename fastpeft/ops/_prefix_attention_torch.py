"""`prefix_attention` in plain torch."""

import torch
from torch import Tensor


def draw_seed(q: Tensor) -> Tensor:
    """One int64 from the CPU generator, which checkpointing restores for a recomputation."""
    return torch.empty(1, dtype=torch.int64).random_()


def forward(tensors, call, seed):
    """(out (B, H, S, D) over (B, S, H, D) storage, L (B, H, S) in fp32)."""
    from fastpeft.ops.prefix_attention import prefix_attention_reference

    out = prefix_attention_reference(tensors, call.scores)
    return out.transpose(1, 2).contiguous().transpose(1, 2), out.new_zeros(out.shape[:3], dtype=torch.float32)


def backward(dout, tensors, out, lse, call, seed, needs):
    """The gradients of `Tensors`, None where not needed."""
    from fastpeft.ops.prefix_attention import prefix_attention_reference

    with torch.enable_grad():
        leaves = [
            None if t is None else t.detach().requires_grad_(bool(n)) for t, n in zip(tensors, needs, strict=True)
        ]
        y = prefix_attention_reference(type(tensors)(*leaves), call.scores)
        wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
        grads = iter(torch.autograd.grad(y, wanted, dout))
    return tuple(next(grads) if leaf is not None and leaf.requires_grad else None for leaf in leaves)
