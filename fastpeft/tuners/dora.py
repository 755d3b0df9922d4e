"""DoRA (Liu et al., arXiv 2402.09353, equation 5): a low-rank update of the weight's direction, and its magnitude m.

    V = W + s·B A        y = m/‖V‖ ⊙ (V x) + bias        ‖V‖: of each output row, a constant to the gradient

The row norms are taken from blocks of rows of V. The expansion ‖W_n‖² + 2s·B_n·(W Aᵀ)_n + s²·B_n (A Aᵀ) B_nᵀ has as
many operations (the product W Aᵀ) and loses all digits where V is much smaller than W: 10 % at ‖V‖ = 0.01·‖W‖ in fp32.
"""

import torch
from torch import nn
from torch.nn import functional as F

from fastpeft.ops.lora_linear import apply_lora

BLOCK_ELEMENTS = 1 << 22  # of W at a time, so that widening a half-precision weight never copies all of it


class Magnitude(nn.Module):
    """The magnitudes m, one for each output; its `weight` is HF peft's `lora_magnitude_vector`."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)


def _blocks(weight_NK: torch.Tensor) -> list[slice]:
    rows, columns = weight_NK.shape
    step = max(1, min(BLOCK_ELEMENTS // max(1, columns), -(-rows // 8)))
    return [slice(start, start + step) for start in range(0, len(weight_NK), step)]


@torch.no_grad()
def row_norms(weight_NK: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float) -> torch.Tensor:
    """‖W_n + s·B_n A‖ for each row n: weight (N, K), lora_A (r, K), lora_B (N, r) -> (N,) in fp32 (fp64 in fp64).

    Nothing of N×K elements is built, and autocast does not round the products.
    """
    wide = torch.promote_types(torch.promote_types(weight_NK.dtype, lora_A.dtype), torch.float32)
    a, b = lora_A.to(wide), lora_B.to(wide)
    norms = torch.empty(len(weight_NK), dtype=wide, device=weight_NK.device)
    with torch.autocast(weight_NK.device.type, enabled=False):
        for rows in _blocks(weight_NK):
            updated = torch.addmm(weight_NK[rows].to(wide), b[rows], a, alpha=scaling)
            norms[rows] = torch.linalg.vector_norm(updated, dim=1)
    return norms


@torch.no_grad()
def initial_magnitude(weight_NK: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float):
    """‖W + s·B A‖ of each row, in the weight's dtype and HF peft's own order of operations, bit for bit."""
    if not lora_B.any():
        return torch.linalg.norm(weight_NK, dim=1)
    # Not in blocks of rows: a product of fewer rows may be summed in another order.
    return torch.linalg.norm(weight_NK + scaling * (lora_B @ lora_A).to(weight_NK.dtype), dim=1)


def factor(weight_NK, lora_A, lora_B, scaling: float, magnitude: torch.Tensor) -> torch.Tensor:
    """m/‖W + s·B A‖ (N,) in fp32 at least, differentiable in m alone."""
    return magnitude / row_norms(weight_NK, lora_A, lora_B, scaling)


def add(layer, name: str, x: torch.Tensor, result: torch.Tensor | None, p: float, backend) -> torch.Tensor:
    """y = m/‖V‖ ⊙ (W + s·B A) x + bias of a layer with `LinearArithmetic`; `result`, the base's, may be None. Under
    dropout the base's share is that of the dropped x, as in HF peft:
    y = x Wᵀ + bias + (m/‖V‖ - 1) ⊙ W drop(x) + m/‖V‖ ⊙ s·B A drop(x)."""
    settings = layer.settings(name)
    a, b = layer.factors(name)
    weight = layer.matrix()
    scale = factor(weight, a, b, settings.scaling, layer.magnitude(name))
    dropped = F.dropout(x, p) if p else x
    bias = 0 if layer.base_bias() is None else layer.base_bias()
    base = layer.product(dropped, weight) if p or result is None else result - bias
    dtype = base.dtype if result is None else result.dtype
    # The sum is in the factor's dtype, as HF peft's: on a half-precision base rounding W x + s·B A x before it is
    # multiplied made the error 1.2 to 1.4 times as large.
    start = (layer.base_forward(x) if result is None else result) + (scale - 1) * base if p else scale * base + bias
    return apply_lora(dropped, None, None, start, a, b * scale[:, None], settings.scaling, 0.0, backend).to(dtype)
