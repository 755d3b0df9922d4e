"""How far sets of vectors are from orthonormal: AdaLoRA's regulariser (Zhang et al., arXiv 2303.10512, equation 4) as
HF peft has it, with the norm and not its square, and the mean over all matrices."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor


def mean_distance(rows: Iterable[Tensor], columns: Iterable[Tensor], device: torch.device) -> Tensor:
    """The mean over all matrices of ‖X Xᵀ - I‖_F for X (r, K) in `rows`, ‖Xᵀ X - I‖_F for X (N, r) in `columns`.

    Matrices of one shape are one batch, so the number of kernels does not grow with that of layers, and nothing waits
    for the device. Computed in at least fp32, whatever autocast says; the gradient of a norm of 0 is 0.

    Returns:
        a scalar on `device`; 0 if there are no matrices.
    """
    groups: dict[tuple, list[Tensor]] = defaultdict(list)
    for by_rows, matrices in ((True, rows), (False, columns)):
        for matrix in matrices:
            groups[by_rows, matrix.shape, matrix.dtype, matrix.device].append(matrix)
    count = sum(map(len, groups.values()))
    sums = [_distances(group, key[0]).sum().to(device) for key, group in groups.items()]
    return torch.stack(sums).sum() / count if sums else torch.zeros((), device=device)


def _distances(matrices: list[Tensor], by_rows: bool) -> Tensor:
    """(n,) of n matrices of one shape, dtype and device."""
    with torch.autocast(matrices[0].device.type, enabled=False):
        stack = torch.stack(matrices)
        stack = stack.to(torch.promote_types(stack.dtype, torch.float32))
        left, right = (stack, stack.mT) if by_rows else (stack.mT, stack)
        gram = torch.bmm(left, right)
        unit = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
        return torch.linalg.vector_norm((gram - unit).flatten(1), dim=1)
