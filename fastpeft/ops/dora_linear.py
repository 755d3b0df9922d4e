"""A frozen linear layer with DoRA (Liu et al., arXiv 2402.09353, equation 5), its norms in hand:

    y = f⊙(x Wᵀ + s·x Aᵀ Bᵀ) + bias                                     f = m/‖V‖: one number for each output

and under dropout, as HF peft has it, with the base's product twice, of x and of what is left of it:

    y = x Wᵀ + bias + (f - 1)⊙(z Wᵀ) + f⊙(s·z Aᵀ Bᵀ)                   z = drop(x) = mask⊙x/(1 - p)

With H = z Wᵀ, S = z Aᵀ, B' = f⊙B, T = s·dY B', E = s·dYᵀ S, and G = f⊙dY, under dropout (f - 1)⊙dY:

    dX = G W + T A, under dropout dY W + mask⊙(G W + T A)/(1 - p)      dA = Tᵀ z      dB = f⊙E
    df = Σ_m dY⊙H + Σ_r B⊙E                                            dbias = Σ dY

Saved for backward: x where A wants a gradient, S where B or f does, H where f does, and a seed in place of the mask;
never z. The sums over what is as large as y are rounded once.
"""

import functools

import torch
from torch import Tensor

from fastpeft.fallback import kernels_or_torch
from fastpeft.ops import _dora_linear_torch as torch_path
from fastpeft.ops._autocast import autocast_dtype
from fastpeft.ops._first_order import applied, first_order
from fastpeft.ops._programs import LEARNED, backward_of, forward_of, known, learn
from fastpeft.ops.lora_linear import Call, _mask, as_rows, cast, decide, own_of_rows, widest
from fastpeft.ops.lora_linear import _kind as kind_of_lora
from fastpeft.ops.lora_linear import _path as path_of_lora

# Letters of the shape suffixes: M rows (all leading dimensions of x), K inputs, N outputs, R rank.


def dora_linear_reference(x, weight, bias, lora_A, lora_B, factor, scaling, keep=None, p=0.0):
    """The definition, for autograd: x (..., K), factor (N,), keep a (M, K) mask or None. The order of HF peft's own
    forward: the base's result in its own dtype, the sum in the wider one, one cast at the end."""
    y = torch.nn.functional.linear(x, weight)
    z = x if keep is None else x * keep.view(x.shape) / (1 - p)
    base = y if keep is None else torch.nn.functional.linear(z, weight)
    low_rank = (z.to(lora_A.dtype) @ lora_A.t()) @ lora_B.t() * scaling
    total = y + (0 if bias is None else bias) + (factor - 1) * base + factor * low_rank
    return total.to(y.dtype)


@functools.cache
def _path(triton: bool):
    if not triton:
        return torch_path
    from fastpeft.ops import _dora_linear_triton as triton_path

    return triton_path


class DoraLinearFunction(torch.autograd.Function):
    """Casting to a common adapter dtype and choosing is before `apply`; x is flattened inside, where autograd does not
    record it."""

    @staticmethod
    def forward(ctx, x, weight_NK, bias_N, a_RK, b_NR, f_N, call: Call):
        seed = path_of_lora(call.plan is not None).draw_seed(x) if call.dropout else None
        if seed is not None and call.plan is None:
            call = call._replace(programs=None)  # what is dropped is drawn on the way
        needs, tensors = ctx.needs_input_grad, (x, weight_NK, bias_N, a_RK, b_NR, f_N, seed)
        y, saved, fell_back = forward_of(call, needs, _forward, tensors)
        if True in needs:
            ctx.save_for_backward(*saved)
            ctx.call = call._replace(fell_back=True, programs=None) if fell_back else call
            ctx.dtypes = x.dtype, None if bias_N is None else bias_N.dtype
        return y

    @staticmethod
    @first_order
    def backward(ctx, dy):
        return backward_of(ctx.call, ctx.needs_input_grad, _backward, (dy, *ctx.saved_tensors), ctx.dtypes)


def _forward(x, weight_NK, bias_N, a_RK, b_NR, f_N, seed, call: Call, needs):
    """(y, what backward reads, whether the kernels failed); needs: whether each of `apply`'s arguments wants a
    gradient."""
    y_MN, s_MR, base_MN, call = run_forward(as_rows(x), weight_NK, bias_N, a_RK, b_NR, f_N, seed, call)
    need_x, _, _, need_a, need_b, need_f, _ = needs
    saved = (
        x if need_a else None,
        weight_NK if need_x else None,
        a_RK,
        b_NR,
        f_N,
        s_MR if need_b or need_f else None,
        base_MN if need_f else None,
        seed,
    )
    return own_of_rows(y_MN, x), saved, call.fell_back


def _backward(dy, x, weight_NK, a_RK, b_NR, f_N, s_MR, base_MN, seed, call: Call, needs, dtypes):
    """A gradient for each of `apply`'s arguments; dtypes: those of x and the bias."""
    need_x, _, need_bias, need_a, need_b, need_f, _ = needs
    x_MK = None if x is None else as_rows(x)
    # As they were: a hook may have given them other strides.
    s_MR, base_MN = (each if each is None else each.contiguous() for each in (s_MR, base_MN))
    tensors = (as_rows(dy), x_MK, weight_NK, a_RK, b_NR, f_N, s_MR, base_MN, seed)
    dx, dbias, da, db, df = run_backward(*tensors, call, (need_x, need_bias, need_a, need_b, need_f))
    dx = None if dx is None else own_of_rows(cast(dx, dtypes[0]), dy)
    return dx, None, cast(dbias, dtypes[1]), da, db, df, None


def run_forward(x_MK, weight_NK, bias_N, a_RK, b_NR, f_N, seed, call: Call):
    """(y [M, N], S [M, R], H [M, N], the call as it was served) on the backend that `call.plan` stands for."""
    x, weight, bias = cast(x_MK, call.dtype), cast(weight_NK, call.dtype), cast(bias_N, call.dtype)
    tensors = (x, weight, bias, a_RK, b_NR, f_N, call.scaling)
    if call.plan is None:
        return *torch_path.forward(*tensors, seed, call.dropout), call
    outputs, by_kernels = kernels_or_torch(
        lambda: _kind("forward", call, x, a_RK, b_NR),
        call.demanded,
        lambda: _path(True).forward(*tensors, seed, call.dropout),
        lambda: torch_path.forward(*tensors, _mask(seed, call, x.shape, x.device, False), call.dropout),
    )
    return *outputs, call if by_kernels else call._replace(fell_back=True)


def _kind(phase: str, call: Call, rows, a_RK, b_NR) -> tuple:
    return ("dora_linear", *kind_of_lora(phase, call, rows, a_RK, b_NR)[1:])


def run_backward(dy_MN, x_MK, weight_NK, a_RK, b_NR, f_N, s_MR, base_MN, seed, call: Call, needs: tuple[bool, ...]):
    """(dX, dbias, dA, dB, df), each None where `needs` (in this order) does not ask for it."""
    dy, x, weight = cast(dy_MN, call.dtype), cast(x_MK, call.dtype), cast(weight_NK, call.dtype)
    tensors = (dy, x, weight, a_RK, b_NR, f_N, s_MR, base_MN)

    def by_torch_as_kernels():
        drawn = seed if needs[0] or needs[2] else None
        mask = _mask(drawn, call, (len(dy), a_RK.shape[1]), dy.device, not call.fell_back)
        return torch_path.backward(*tensors, mask, seed is not None, call, needs)

    if call.plan is None:
        return torch_path.backward(*tensors, seed, seed is not None, call, needs)
    if call.fell_back:
        return by_torch_as_kernels()
    return kernels_or_torch(
        lambda: _kind("backward", call, dy, a_RK, b_NR),
        call.demanded,
        lambda: _path(True).backward(*tensors, seed, call, needs),
        by_torch_as_kernels,
    )[0]


def apply_dora(x: Tensor, weight: Tensor, bias, lora_A, lora_B, factor, scaling, dropout, patched=None) -> Tensor:
    """y (..., N) in x's dtype, or autocast's, with the gradients of all but `weight`, which must want none.

    x (..., K); weight (N, K) in x's dtype, any under autocast; bias (N,) or None; lora_A (r, K), lora_B (N, r); factor
    (N,); `dropout` is the probability in force. Raises BackendError if Triton was demanded and cannot serve the call.
    """
    given = (x, lora_B, lora_A, factor, weight) if bias is None else (x, lora_B, lora_A, factor, weight, bias)
    scaling, dropout = float(scaling), float(dropout)
    asked = scaling, dropout, bias is None
    if (found := known(DoraLinearFunction, given, patched, asked) if LEARNED else None) is not None:
        tensors = (x, weight, bias, lora_A, lora_B, factor)
        return applied(DoraLinearFunction, *tensors, found.call, narrow=found.narrow)
    narrow = autocast_dtype(x)
    dtype = narrow or x.dtype
    wide = widest(dtype, lora_A, lora_B, factor)
    a, b, f = cast(lora_A, wide), cast(lora_B, wide), cast(factor, wide)
    call = decide(x, dtype, a, b, scaling, dropout, patched)
    if a is lora_A and b is lora_B and f is factor:  # what is cast here, autograd records
        learn(DoraLinearFunction, given, patched, asked, call, narrow)
    return applied(DoraLinearFunction, x, weight, bias, a, b, f, call, narrow=narrow)


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether `apply_dora` computes a layer's call. torch.compile traces the definition instead, and fuses that."""
    same = weight.dtype == x.dtype or autocast_dtype(x) is not None
    return same and x.ndim > 0 and not weight.requires_grad and not torch.compiler.is_compiling()
