"""The norms of DoRA (arXiv 2402.09353, equation 5): ‖W_n + s·B_n A‖ of each row n, a constant to the gradient.

They are taken of V = W + s·B A itself, in tiles that are never stored. The expansion ‖W_n‖² + 2s·B_n·(W Aᵀ)_n +
s²·B_n (A Aᵀ) B_nᵀ has as many operations (the product W Aᵀ) and loses all digits where V is much smaller than W: 10 %
at ‖V‖ = 0.01·‖W‖ in fp32.

Nothing is remembered from call to call: nothing that can be asked cheaply tells whether W, A and B are what they were.
`tensor.data.add_(...)` moves neither the version counter nor the address, and neither do optimizers that write through
pointers; values that are gathered or fetched for a call come and go at one address.
"""

import torch
from torch import Tensor

from fastpeft.dispatch import choose_backend
from fastpeft.fallback import is_demanded, kernels_or_torch
from fastpeft.ops._autocast import without_autocast

BLOCK_ELEMENTS = 1 << 18  # of W at a time on the torch path, which a CPU's cache holds between the product and the sum

# Letters of the shape suffixes: N outputs, K inputs, R rank.


def row_norms_reference(weight_NK: Tensor, a_RK: Tensor, b_NR: Tensor, scaling: float) -> Tensor:
    """The definition."""
    return torch.linalg.vector_norm(weight_NK + scaling * (b_NR @ a_RK), dim=1)


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """What the norms are computed in: fp32, or fp64 if one of them is."""
    return torch.float64 if any(each.dtype == torch.float64 for each in tensors) else torch.float32


def _blocks(rows: int, columns: int) -> list[slice]:
    step = max(1, min(BLOCK_ELEMENTS // max(1, columns), -(-rows // 8)))
    return [slice(start, start + step) for start in range(0, rows, step)]


@torch.no_grad()
def row_norms_torch(weight_NK: Tensor, a_RK: Tensor, b_NR: Tensor, scaling: float) -> Tensor:
    """`row_norms` on the torch path, by blocks of rows: nothing of N×K elements is built, and autocast does not round
    the products."""
    wide = wide_dtype(weight_NK, a_RK, b_NR)
    a, b = a_RK.to(wide), b_NR.to(wide)
    norms = torch.empty(len(weight_NK), dtype=wide, device=weight_NK.device)
    with without_autocast(weight_NK):
        for rows in _blocks(*weight_NK.shape):
            updated = torch.addmm(weight_NK[rows].to(wide), b[rows], a, alpha=scaling)
            norms[rows] = torch.linalg.vector_norm(updated, dim=1)
    return norms


def _served(weight: Tensor, a: Tensor, b: Tensor, scaling: float, patched: str | None) -> Tensor:
    """On the backend that dispatch says. A kernel has no grid over nothing."""
    dtype = wide_dtype(weight, a, b)
    if not weight.numel() or choose_backend(weight, dtype, patched=patched).backend == "torch":
        return row_norms_torch(weight, a, b, scaling)

    def by_kernel():
        from fastpeft.kernels.row_norms import row_norms

        return row_norms(weight, a, b, scaling)

    return kernels_or_torch(
        lambda: ("row_norms", "forward", weight.device, weight.dtype, f"adapter {a.dtype}", f"rank {len(a)}"),
        is_demanded(patched),
        by_kernel,
        lambda: row_norms_torch(weight, a, b, scaling),
    )[0]


@torch.no_grad()
def row_norms(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, patched: str | None = None) -> Tensor:
    """‖W_n + scaling·B_n A‖ for each row n, without a gradient.

    Args:
        weight: (N, K), any strides and any floating dtype.
        lora_A: (r, K), any rank.
        lora_B: (N, r).
        scaling: a finite number.
        patched: the backend that the model was patched with.

    Returns:
        (N,) in fp32, or fp64 if one of them is.

    Raises:
        BackendError: the triton backend was demanded and cannot serve the call.
    """
    if torch.compiler.is_compiling():
        return torch.ops.fastpeft.row_norms(weight, lora_A, lora_B, float(scaling), patched or "")
    return _served(weight, lora_A, lora_B, float(scaling), patched)


@torch.library.custom_op("fastpeft::row_norms", mutates_args=())
def _compiled(weight: Tensor, a: Tensor, b: Tensor, scaling: float, patched: str) -> Tensor:
    """So that torch.compile sees one node, and the backend is chosen when the graph runs."""
    return _served(weight, a, b, scaling, patched or None)


@_compiled.register_fake
def _(weight, a, b, scaling, patched):
    return weight.new_empty(weight.shape[0], dtype=wide_dtype(weight, a, b))
