"""`prefix_attention` in plain torch: CPU flash attention where it can serve the call, else products in blocks of rows.

Both take the prefix and the sequence one after the other, never side by side, and make masks for a block of rows at a
time. Either may be absent: no virtual keys (P = 0), or no real ones (T = 0), for `gated_prompt_attention`.
"""

import torch
from torch import Tensor

from fastpeft.ops import _prefix_attention_blocks as blocks
from fastpeft.ops import _prefix_attention_flash as flash
from fastpeft.ops._prefix_attention_scores import Tensors

keep_mask, given_mask = blocks.keep_mask, blocks.given_mask


def draw_seed(q: Tensor) -> Tensor:
    """One int64 from the CPU generator, which checkpointing restores for a recomputation."""
    return torch.empty(1, dtype=torch.int64, device="cpu").random_()


def forward(tensors: Tensors, call, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    """(out (B, H, S, D) over (B, S, H, D) storage, L (B, H, S) in fp32, or fp64 for fp64)."""
    if flash.serves_forward(tensors, call):
        return flash.forward(tensors, call.scores)
    return blocks.forward(tensors, call.scores, call.dropout, seed)


def backward(dout: Tensor, tensors: Tensors, out, lse, call, seed, needs: Tensors) -> tuple[Tensor | None, ...]:
    """The gradients of `Tensors`, None where not needed."""
    if flash.serves_forward(tensors, call) and not (needs.bias_BHST or needs.pbias_BHSP):
        return flash.backward(dout, tensors, out, lse, call.scores, needs)
    return blocks.backward(dout, tensors, call.scores, call.dropout, seed, needs)
