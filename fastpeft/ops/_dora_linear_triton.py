"""`dora_linear` on the Triton kernels. The base products are the vendor's; what is left of x under dropout is written
for one of them, and freed."""

import torch

from fastpeft.kernels import dora_linear as kernels
from fastpeft.kernels import lora_linear
from fastpeft.kernels._common import Dropout
from fastpeft.ops._lora_linear_triton import grad_a_and_x, grad_b_and_t


def forward(x, weight, bias, a, b, f, scale, seed, p):
    """(y [M, N], S [M, R], H [M, N]): as the torch path's."""
    if seed is None:
        plain, z, gain = None, x, f
    else:
        plain, bias = torch.nn.functional.linear(x, weight, bias), None
        z, gain = kernels.drop(x, Dropout(seed, p)), f - 1
    base, s = torch.nn.functional.linear(z, weight), lora_linear.shrink(z, a, 1.0, a.dtype)
    return kernels.combine(plain, bias, base, gain, s, b * f[:, None], scale), s, base


def backward(dy, x, weight, a, b, f, s, base, seed, call, needs: tuple[bool, ...]):
    """(dX, dbias, dA, dB, df), each None where `needs` does not ask for it."""
    need_x, need_bias, need_a, need_b, need_f = needs
    wanted = need_b or need_f, need_x or need_a, need_bias
    e, t, dbias = grad_b_and_t(dy, s, b * f[:, None], call.scaling, *wanted, call.plan.reads)
    g, sums = None, None
    if need_x or need_f:
        g, sums = kernels.scaled_grad(dy, base, f if seed is None else f - 1, need_x, need_f)
    if seed is None:
        da, dx = grad_a_and_x(g if need_x else dy, x, t, weight, a, None, 0.0, call.plan, call.dx_dtype, need_a, need_x)
    else:
        arguments = (t, weight, a, seed, call.dropout, call.plan, call.dx_dtype)
        da, dx = grad_a_and_x(dy, x, *arguments, need_a, need_x)
        if need_x:
            dx = kernels.drop(g @ weight, Dropout(seed, call.dropout), onto=dx)
    df = (e * b).sum(1) + sums if need_f else None
    return dx, dbias, da, e * f[:, None] if need_b else None, df
