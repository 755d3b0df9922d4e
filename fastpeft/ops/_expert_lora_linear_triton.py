"""`expert_lora_linear` on the Triton kernels of `mixed_lora_linear`, where an expert's rows are a segment whose adapter
is the expert's. The base products are torch's; every rank-r term and every gradient of an adapter is one launch for all
experts, and what is added to a base product is added in place.
"""

from torch import Tensor

from fastpeft.kernels import mixed_lora_linear as kernels
from fastpeft.kernels._segments import Layout
from fastpeft.ops._expert_lora_linear_torch import Rows, base_gradients, base_product


def layout_of(experts: int, rank: int, scaling: float, rows: Rows) -> Layout:
    """The experts as the adapters of a mixed batch whose samples are rows, in order."""
    served = {expert: range(each.start, each.stop) for expert, each in rows}
    samples = tuple(served.get(expert, range(0)) for expert in range(experts))
    return Layout(samples, (), 1, (rank,) * experts, (scaling,) * experts, (0.0,) * experts)


def _flat(matrices: Tensor) -> Tensor:
    """Every expert's, one behind the other, of any strides."""
    return matrices.contiguous().view(-1)


def forward(x, weight, bias, a, b, scalings, ends, rows) -> tuple[Tensor, list[Tensor]]:
    """(y [M, N], S [M, r] of each adapter): as the torch path's."""
    y, s = base_product(x, weight, bias, ends, rows), []
    for a_g, b_g, scaling in zip(a, b, scalings, strict=True):
        layout = layout_of(len(weight), a_g.shape[1], scaling, rows)
        shrunk = kernels.shrink(x, _flat(a_g), layout)
        kernels.expand(shrunk, _flat(b_g), layout, y, y.dtype, residual=y, of_b=True)
        s.append(shrunk.view(len(x), -1))
    return y, s


def backward(dy, x, weight, a, b, s, scalings, ends, rows, needs):
    """(dX, dW, dbias, [dA, ...], [dB, ...]): as the torch path's."""
    need_x, _, _, need_a, need_b = needs
    dx, dw, dbias = base_gradients(dy, x, weight, ends, rows, needs[:3])
    da, db = [], []
    for g, scaling in enumerate(scalings):
        layout = layout_of(len(weight), a[g].shape[1], scaling, rows)
        grad = kernels.grad_columns(s[g].reshape(-1), dy, layout, of_b=True) if need_b[g] else None
        db.append(None if grad is None else grad.view(b[g].shape))
        t = kernels.shrink(dy, _flat(b[g]), layout, of_b=True) if need_a[g] or need_x else None
        da.append(kernels.grad_columns(t, x, layout).view(a[g].shape) if need_a[g] else None)
        if need_x:
            kernels.expand(t, _flat(a[g]), layout, dx, dy.dtype, residual=dx)
    return dx, dw, dbias, da, db
