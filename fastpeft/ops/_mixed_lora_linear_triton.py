"""`mixed_lora_linear` on the Triton kernels: the base products are the vendor's, every rank-r term and every adapter
gradient is one launch for all adapters, and what is added to a base product is added in place.

Each call copies the matrices of the adapters in use one behind the other, Σr·(K + N) numbers read and written.
"""

import torch

from fastpeft.kernels import mixed_lora_linear as kernels
from fastpeft.kernels._segments import Layout
from fastpeft.ops._lora_linear_triton import honoured as honoured
from fastpeft.ops._selective import own


def draw_seeds(x: torch.Tensor, adapters: int) -> torch.Tensor:
    """One int64 drawn on x's device from torch's generator: no synchronisation, safe under CUDA graphs."""
    return torch.empty(1, dtype=torch.int64, device=x.device).random_()


def layout_of(call, rows: int) -> Layout:
    """The layout of a call on M rows."""
    served = {sample for samples in call.samples for sample in samples}
    rest = tuple(sample for sample in range(rows // call.tokens) if sample not in served)
    return Layout(call.samples, rest, call.tokens, call.ranks, call.scalings, call.dropouts)


def keep_mask(
    seeds: torch.Tensor, samples: tuple[tuple[int, ...], ...], tokens: int, dropouts: tuple[float, ...],
    shape: tuple[int, int], device: torch.device,
) -> torch.Tensor:  # fmt: skip
    """[M, K] booleans, the mask that the kernels generate, element by element; True in rows of no adapter."""
    served = {sample for each in samples for sample in each}
    rest = [sample for sample in range(shape[0] // tokens) if sample not in served]
    ones = (1,) * len(samples)
    layout = Layout(samples, tuple(rest), tokens, ones, tuple(map(float, ones)), dropouts)
    factors = torch.ones(max(layout.elements, len(ones) * shape[1]), device=device)
    out = torch.zeros(shape, device=device)
    kernels.expand(factors, factors, layout, out, torch.float32, residual=out, seed=seeds)
    out.view(-1, tokens, shape[1])[rest] = 1
    return out > 0


def _behind(matrices: list[torch.Tensor]) -> torch.Tensor:
    """The matrices one behind the other."""
    return torch.cat([matrix.reshape(-1) for matrix in matrices])


def forward(x, weight, bias, residual, a, b, seeds, call):
    """(y [M, N], S [elements]): as the torch path's."""
    layout, b_all = layout_of(call, len(x)), _behind(b)
    s = kernels.shrink(x, _behind(a), layout, seeds)
    if weight is None:
        y = torch.empty_like(residual, memory_format=torch.contiguous_format)
        return kernels.expand(s, b_all, layout, y, y.dtype, residual=residual, of_b=True), s
    y = own(torch.nn.functional.linear(x, weight, bias))
    return kernels.expand(s, b_all, layout, y, y.dtype, residual=y, of_b=True), s


def grad_b_and_t(dy, s, b, call, need_b: bool, need_t: bool):
    """([dB, ...], T), each None where not wanted."""
    layout, db = layout_of(call, len(dy)), None
    if need_b:
        db = kernels.grad_columns(s, dy, layout, of_b=True)
        db = [part.view(-1, rank) for part, rank in _split(db, call.ranks)]
    return db, kernels.shrink(dy, _behind(b), layout, of_b=True) if need_t else None


def _split(matrices: torch.Tensor, ranks: tuple[int, ...]):
    width = len(matrices) // sum(ranks)
    return zip(matrices.split([rank * width for rank in ranks]), ranks, strict=True)


def grad_a_and_x(dy, x, t, weight, a, seeds, call, need_a: bool, need_x: bool):
    """([dA, ...], dX [M, K] in `call.dx_dtype`), each None where not wanted."""
    layout, da = layout_of(call, len(dy)), None
    if need_a:
        da = kernels.grad_columns(t, x, layout, seeds)
        da = [part.view(rank, -1) for part, rank in _split(da, call.ranks)]
    if not need_x:
        return da, None
    if weight is None:
        dx = torch.empty(len(dy), a[0].shape[1], dtype=call.dx_dtype, device=dy.device)
        return da, kernels.expand(t, _behind(a), layout, dx, dy.dtype, seed=seeds)
    dx = (dy @ weight).to(call.dx_dtype)
    return da, kernels.expand(t, _behind(a), layout, dx, dy.dtype, residual=dx, seed=seeds)
