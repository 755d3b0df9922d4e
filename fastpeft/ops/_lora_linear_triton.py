"""`lora_linear` on the Triton kernels: which launcher runs when, by the plan of `dispatch.lora_linear_plan`.

Only the base products x Wᵀ and dY W may belong to the vendor's library; every rank-r term and every adapter gradient
is a kernel's. Nothing here is written into but what was allocated here.
"""

import torch

from fastpeft.dispatch import Plan
from fastpeft.kernels import lora_gemm
from fastpeft.kernels import lora_linear as kernels
from fastpeft.kernels._common import DROPOUT_LEVELS, Dropout, dropout_threshold
from fastpeft.ops import _rooms
from fastpeft.ops._lora_linear_torch import add_product, as_rows
from fastpeft.ops._selective import own

# Above this rank a rectangle of dB no longer stays in registers beside T: dY is then read twice.
ONE_READ_RANK = 64


def draw_seed(x: torch.Tensor) -> torch.Tensor:
    """One int64 drawn on x's device from torch's generator: no synchronisation, safe under CUDA graphs."""
    return torch.empty(1, dtype=torch.int64, device=x.device).random_()


def _dropout(seed, p) -> Dropout | None:
    return None if seed is None else Dropout(seed, p)


def honoured(p: float) -> float:
    """The probability that the kernels drop with."""
    return dropout_threshold(p) / DROPOUT_LEVELS


def keep_mask(seed: torch.Tensor, p: float, rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """[rows, columns] booleans: the mask that the kernels generate, element by element."""
    one = torch.ones(max(rows, columns), 1, device=device)
    return kernels.tail(one[:rows], one[:columns], torch.float32, dropout=Dropout(seed, p)) > 0


def forward(x, weight, bias, residual, a, b, scale, seed, p, plan: Plan):
    """(y (..., N) or [M, N], S [M, R]): as the torch path's."""
    x = for_launches(x)
    s = kernels.shrink(x, a, 1.0, a.dtype, _dropout(seed, p))
    if weight is None:
        return onto(residual, s, b, scale), s
    return expand(s, x, weight, bias, b, scale, plan, {}), s


def for_launches(x: torch.Tensor | None) -> torch.Tensor | None:
    """x (..., K) as launchers take it: itself if it is contiguous, or its rows [M, K]."""
    return x if x is None or x.ndim == 2 or x.is_contiguous() else as_rows(x)


def onto(residual, s, b, scale):
    """residual (..., N) + s·S Bᵀ"""
    return kernels.tail(s, b, residual.dtype, residual=as_rows(residual), scale=scale, lead=residual.shape[:-1])


def expand(s, x, weight, bias, b, scale, plan: Plan, shared: dict):
    """x Wᵀ + bias + s·S Bᵀ, S in hand: (..., N), or [M, N] where that costs less. x is as `for_launches` gives it;
    `shared`, at first empty, is what calls with the same x make of it: its rows, and by rank copies with room."""
    strategy = plan.forward
    if whole := whole_product(strategy):
        return whole(s, b, x.dtype, base=(_rows(x, shared), weight), bias=bias, scale=scale, lead=x.shape[:-1])
    wide = s.dtype is not x.dtype
    if strategy == "prewrite":
        strategy = _in_its_room(strategy, weight, b.shape[1], x.shape[-1] < b.shape[0])
    if strategy == "augment" and not wide and (abs(scale) <= 1 or s.dtype != torch.float16):  # s·S is in its range
        both = _in_turns(_rows(x, shared), s * scale, shared)
        return own(torch.nn.functional.linear(both, _beside(weight, b, 1), bias))
    if strategy == "addmm" or wide:  # an fp32 term that was rounded before the product would be HF peft's no more
        given = x if bias is None else _rows(x, shared)  # of a bias and more than rows torch makes a view
        y = torch.nn.functional.linear(given, weight, bias)
        if wide:
            return onto(y, s, b, scale)
        y = own(y)
        add_product(as_rows(y), s, b.t(), scale)
        return y
    y = kernels.tail(s, b, x.dtype, bias=bias, scale=scale, lead=x.shape[:-1])
    y.view(-1, b.shape[0]).addmm_(_rows(x, shared), weight.t())
    return y


def _rows(x: torch.Tensor, shared: dict) -> torch.Tensor:
    """[M, K] of x (..., K)."""
    if x.ndim == 2:
        return x
    if "rows" not in shared:
        shared["rows"] = as_rows(x)
    return shared["rows"]


def whole_product(strategy: str):
    """The kernel that computes the base product and the rank-r term in one, if that is the strategy."""
    if strategy == "fused":
        return kernels.tail
    return lora_gemm.tail if strategy == "persistent" else None


def _in_its_room(strategy: str, weight: torch.Tensor, rank: int, fewer: bool) -> str:
    """The strategy of a base product. Of a weight with room (`_rooms`) it is augment in place of prewrite where that
    moves `fewer` bytes: what the product reads is copied once, where the other's result is written and read once
    more. Predicted: no GPU has measured it."""
    return "augment" if strategy == "prewrite" and fewer and _rooms.fits(weight, rank) else strategy


def _beside(wide: torch.Tensor, narrow: torch.Tensor, dim: int) -> torch.Tensor:
    """The two in one buffer along `dim`, padded with zeros to a multiple of 8, below which a vendor's product falls
    back to kernels without wide loads. A weight with room has its buffer already."""
    if (joined := _rooms.joined(wide, narrow, dim)) is not None:
        return joined
    shape = list(narrow.shape)
    shape[dim] = -(wide.shape[dim] + narrow.shape[dim]) % 8
    return torch.cat((wide, narrow, narrow.new_zeros(shape)), dim)


def _in_turns(x: torch.Tensor, s: torch.Tensor, shared: dict) -> torch.Tensor:
    """[x|S], where S may take the place of another of its rank."""
    rank, inputs = s.shape[1], x.shape[1]
    if rank in shared:
        shared[rank].narrow(1, inputs, rank).copy_(s)
    else:
        shared[rank] = _beside(x, s, 1)
    return shared[rank]


def grad_b_and_t(dy, s, b, scale, need_b: bool, need_t: bool, need_bias: bool, reads: int | None = None, sums=None):
    """(dB [N, R], T [M, R], dbias [N] in fp32), each None where not wanted; one read of dY up to rank 64, unless
    `reads` says two. With `sums` they are there when these are added up (`_partials`)."""
    if need_b and need_t and b.shape[1] <= ONE_READ_RANK and reads != 2:
        return kernels.grad_b_and_t(dy, s, b, scale, need_bias, sums=sums)
    t = kernels.shrink(dy, b.t(), scale, b.dtype) if need_t else None
    if not (need_b or need_bias):
        return None, t, None
    db, _, dbias = kernels.grad_columns(
        s if need_b else None, dy, s.dtype if need_b else dy.dtype, with_sum=need_bias, transposed=True, scale=scale
    )
    return db, t, dbias


def grad_a_and_x(dy, x, t, weight, a, seed, p, plan: Plan, dx_dtype: torch.dtype, need_a: bool, need_x: bool):
    """(dA [R, K], dX [M, K] in `dx_dtype`), each None where not wanted; dy and x are as `for_launches` gives
    them. The pass over x that makes dA also seeds dX, unless dX is wanted in a wider type than the base product has:
    then the two are added in that type."""
    if not (need_a or need_x):
        return None, None
    dropout = _dropout(seed, p)
    wide = dx_dtype != dy.dtype
    exact = dropout is None and t.dtype == dy.dtype  # what the vendor's product can add without rounding it first
    strategy = plan.backward
    if weight is not None and exact and not wide:
        strategy = _in_its_room(strategy, weight, a.shape[0], dy.shape[-1] < a.shape[1])
    prewrite = need_x and need_a and not wide and (weight is None or strategy == "prewrite")
    da = seeded = None
    if need_a:
        da, seeded, _ = kernels.grad_columns(t, x, t.dtype, tail_of=a if prewrite else None, dropout=dropout)
    if not need_x:
        return da, None
    dy = dy if weight is None else as_rows(dy)
    if weight is not None and (whole := whole_product(strategy)):
        return da, whole(t, a.t(), dy.dtype, base=(dy, weight.t()), dropout=dropout, out_dtype=dx_dtype)
    if wide:
        return da, kernels.tail(t, a.t(), dy.dtype, residual=dy @ weight, dropout=dropout, out_dtype=dx_dtype)
    if weight is not None and strategy == "addmm" and exact:
        return da, (dy @ weight).addmm_(t, a)
    if weight is not None and strategy == "augment" and exact:
        return da, _beside(dy, t, 1) @ _beside(weight, a, 0)
    dx = seeded if seeded is not None else kernels.tail(t, a.t(), dy.dtype, dropout=dropout)
    return da, dx if weight is None else dx.addmm_(dy, weight)
