"""DoRA (Liu et al., arXiv 2402.09353, equation 5): a low-rank update of the weight's direction, and its magnitude m.

    V = W + s·B A        y = m/‖V‖ ⊙ (V x) + bias        ‖V‖: of each output row, a constant to the gradient

The row norms are `fastpeft.ops.row_norms`'s, and of a plain layer with one adapter the rest is `dora_linear`'s.
"""

import torch
from torch import nn
from torch.nn import functional as F

from fastpeft.ops.dora_linear import apply_dora, takes
from fastpeft.ops.lora_linear import apply_lora
from fastpeft.ops.row_norms import row_norms, row_norms_torch


class Magnitude(nn.Module):
    """The magnitudes m, one for each output; its `weight` is HF peft's `lora_magnitude_vector`."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)


@torch.no_grad()
def initial_magnitude(weight_NK: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float):
    """‖W + s·B A‖ of each row, in the weight's dtype and HF peft's own order of operations, bit for bit."""
    if not lora_B.any():
        return torch.linalg.norm(weight_NK, dim=1)
    # Not in blocks of rows: a product of fewer rows may be summed in another order.
    return torch.linalg.norm(weight_NK + scaling * (lora_B @ lora_A).to(weight_NK.dtype), dim=1)


def factor(weight_NK, lora_A, lora_B, scaling: float, magnitude: torch.Tensor) -> torch.Tensor:
    """m/‖W + s·B A‖ (N,) in fp32 at least, differentiable in m alone; of a layer that no op computes."""
    return magnitude / row_norms_torch(weight_NK, lora_A, lora_B, scaling)


def add(layer, name: str, x: torch.Tensor, result: torch.Tensor | None, p: float, backend) -> torch.Tensor:
    """y = m/‖V‖ ⊙ (W + s·B A) x + bias of a layer with `LinearArithmetic`; `result`, the base's, may be None. Under
    dropout the base's share is that of the dropped x, as in HF peft:
    y = x Wᵀ + bias + (m/‖V‖ - 1) ⊙ W drop(x) + m/‖V‖ ⊙ s·B A drop(x)."""
    settings = layer.settings(name)
    a, b = layer.factors(name)
    weight = layer.matrix()
    scale = layer.magnitude(name) / row_norms(weight, a, b, settings.scaling, backend)
    if result is None and takes(x, weight):
        return apply_dora(x, weight, layer.base_bias(), a, b, scale, settings.scaling, p, backend)
    dropped = F.dropout(x, p) if p else x
    bias = 0 if layer.base_bias() is None else layer.base_bias()
    base = layer.product(dropped, weight) if p or result is None else result - bias
    dtype = base.dtype if result is None else result.dtype
    # The sum is in the factor's dtype, as HF peft's: on a half-precision base rounding W x + s·B A x before it is
    # multiplied made the error 1.2 to 1.4 times as large.
    start = (layer.base_forward(x) if result is None else result) + (scale - 1) * base if p else scale * base + bias
    return apply_lora(dropped, None, None, start, a, b * scale[:, None], settings.scaling, 0.0, backend).to(dtype)
