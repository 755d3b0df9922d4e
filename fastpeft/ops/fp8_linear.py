"""A frozen linear layer whose weight is kept in 8 bits, float8 e4m3 with one scale for each row (Micikevicius et al.,
arXiv 2209.05433, for the format), and whose input is rounded to the same format row by row, call by call:

    y = (X W̃ᵀ)⊙(s_x s_wᵀ) + bias      X = e4m3(x / s_x),  s_x = max |x| / 448 of each row
                                      W̃ = e4m3(W / s_w),  s_w = max |W| / 448 of each row, which is done once

    dX = dY (s_w⊙W̃)                   dbias = Σ dY

X stands in forward alone: its rounding counts as the identity in backward, and dY is not rounded, so that a gradient
has the error of a product in its own dtype with the weight that forward has used. For that product the weight is made
dense anew. Nothing of x is saved for backward.

On a GPU with such products the vendor computes y from the 8 bits (`served`). Everywhere else both are widened, which
is exact in fp32, and multiplied: the same numbers up to the rounding of sums.
"""

import torch

from fastpeft.errors import OpError
from fastpeft.ops._autocast import autocast_dtype, without_autocast
from fastpeft.ops._first_order import applied, first_order
from fastpeft.ops.lora_linear import DTYPES, as_rows, cast, of_rows

FP8 = torch.float8_e4m3fn
GREATEST = torch.finfo(FP8).max
SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # a row of zeros has this one, and is zeros again
BLOCK = 2**24  # of so many elements an fp32 copy may be made on the way to 8 bits
CAPABILITIES = ((8, 9), (9, 0), (10, 0), (10, 3))  # of GPUs for which torch has products with a scale for each row
MULTIPLE = 16  # of which K and N are, there

# Letters of the shape suffixes in this file: M rows (all leading dimensions of x), K inputs, N outputs.


def row_scales(t_MK: torch.Tensor) -> torch.Tensor:
    """max |t| / 448 of each row, fp32 (M, 1); NaN or infinite where a row has such a number."""
    low, high = t_MK.aminmax(dim=-1, keepdim=True)
    return (torch.maximum(high, -low).float() / GREATEST).clamp_min(SMALLEST_SCALE)


def quantise_rows(t_MK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(e4m3(t / s) (M, K), s (M, 1) fp32): the quotient in fp32, then to nearest, ties to even. A row with NaN or an
    infinity is NaN."""
    t_MK = t_MK.float() if t_MK.dtype == torch.float64 else t_MK
    scale = row_scales(t_MK)
    rows = max(BLOCK // t_MK.shape[-1], 1)
    if torch.compiler.is_compiling() or t_MK.shape[0] <= rows:
        return (t_MK / scale).to(FP8), scale
    codes = torch.empty(t_MK.shape, dtype=FP8, device=t_MK.device)
    for out, part, by in zip(codes.split(rows), t_MK.split(rows), scale.split(rows), strict=True):
        out.copy_(part / by)
    return codes, scale


def dequantise_rows(codes_MK: torch.Tensor, scale_M1: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """s⊙codes (M, K) in `dtype`, rounded once, and not at all in fp32."""
    return codes_MK.to(dtype).mul_(scale_M1)


def fp8_linear_reference(x, weight, weight_scale, bias=None):
    """The definition, for autograd, in x's dtype: x (..., K), weight (N, K) float8, weight_scale (N, 1)."""
    codes, scale = quantise_rows(as_rows(x.detach()))
    rounded = dequantise_rows(codes, scale, x.dtype).view(x.shape)
    weight = dequantise_rows(weight, weight_scale, x.dtype)
    return torch.nn.functional.linear(x + (rounded - x.detach()), weight, bias)


def served(x_MK: torch.Tensor, weight_NK: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether the vendor's product of 8 bits computes this call: by the device, sizes in multiples of 16, and a result
    in bf16, the one dtype that every release of torch from 2.11 gives it in."""
    if not x_MK.is_cuda or torch.version.hip or dtype != torch.bfloat16 or x_MK.shape[0] == 0:
        return False
    outputs, inputs = weight_NK.shape
    if outputs % MULTIPLE or inputs % MULTIPLE or not weight_NK.is_contiguous():
        return False
    device = torch.cuda.get_device_properties(x_MK.device)  # which torch.compile knows, unlike the capability itself
    return (device.major, device.minor) in CAPABILITIES


def product(x_MK, weight_NK, scale_N1, bias_N, dtype: torch.dtype) -> torch.Tensor:
    """y (M, N) in `dtype`."""
    codes, scale = quantise_rows(x_MK)
    if served(x_MK, weight_NK, dtype):
        # Hopper's fast accumulation keeps some 14 bits of a sum on the way, hence none.
        x, weight, bias = codes.contiguous(), weight_NK.t(), cast(bias_N, dtype)
        return torch._scaled_mm(x, weight, scale, scale_N1.t(), bias=bias, out_dtype=dtype, use_fast_accum=False)
    half = dtype.itemsize == 2
    wide = torch.float32 if half and not x_MK.is_cuda else dtype
    x, weight = dequantise_rows(codes, scale, wide), dequantise_rows(weight_NK, scale_N1, wide)
    return torch.nn.functional.linear(x, weight, cast(bias_N, wide)).to(dtype)


class Fp8LinearFunction(torch.autograd.Function):
    """Flat tensors in; the weight, its scales and the numbers of dtypes are all that backward needs. A result that
    nothing uses costs it nothing."""

    @staticmethod
    def forward(ctx, x_MK, weight_NK, scale_N1, bias_N, dtype: torch.dtype):
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(weight_NK, scale_N1)
        ctx.set_materialize_grads(False)
        ctx.input_dtype, ctx.bias_dtype = x_MK.dtype, None if bias_N is None else bias_N.dtype
        return product(x_MK, weight_NK, scale_N1, bias_N, dtype)

    @staticmethod
    @first_order
    def backward(ctx, dy_MN):
        need_x, _, _, need_bias, _ = ctx.needs_input_grad
        dx = dbias = None
        if dy_MN is None:
            return (None,) * 5
        with without_autocast(dy_MN):
            if need_x:
                dx = (dy_MN @ dequantise_rows(*ctx.saved_tensors, dy_MN.dtype)).to(ctx.input_dtype)
            if need_bias:
                dbias = dy_MN.sum(0, dtype=ctx.bias_dtype)
        return dx, None, None, dbias, None


def apply_fp8(x, weight, weight_scale, bias):
    """`fp8_linear` for a layer, whose own tensors fit each other."""
    if x.dtype not in DTYPES:
        raise OpError(f"fp8_linear: x is {x.dtype}; float32, float16, bfloat16 or float64 is needed")
    if x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise OpError(f"fp8_linear: x has shape {tuple(x.shape)}, expected (..., {weight.shape[1]})")
    if x.device != weight.device:
        raise OpError(f"fp8_linear: x is on {x.device}, weight on {weight.device}; move one of them")
    if weight.dtype != FP8:
        raise OpError(f"fp8_linear: weight is {weight.dtype}; {FP8} is needed, which mixed precision may not cast")
    if weight.requires_grad and torch.is_grad_enabled():
        raise OpError("fp8_linear: weight wants a gradient, which float8 cannot have; weight.requires_grad_(False)")
    dtype = autocast_dtype(x) or x.dtype
    with without_autocast(x):
        y_MN = applied(Fp8LinearFunction, as_rows(x), weight, weight_scale, bias, dtype)
    return of_rows(y_MN, x)


def fp8_linear(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x Wᵀ + bias of a weight in float8 with a scale for each row, x rounded likewise; with gradients of x and bias.

    Args:
        x: (..., K), any strides; fp32, fp16, bf16 or fp64. A row with NaN or an infinity gives NaN.
        weight: (N, K) torch.float8_e4m3fn, frozen.
        weight_scale: (N, 1) fp32; the weight is weight_scale⊙weight.
        bias: (N,) or None.

    Returns:
        (..., N) in x's dtype, or autocast's.

    Raises:
        OpError: a shape, device or dtype does not fit, or weight wants a gradient.
    """
    given = {"weight": (weight, FP8, 2), "weight_scale": (weight_scale, torch.float32, 2)}
    for name, (tensor, dtype, dimensions) in given.items():
        if tensor.dtype != dtype or tensor.ndim != dimensions:
            raise OpError(
                f"fp8_linear: {name} is {tensor.dtype} of shape {tuple(tensor.shape)}; {dtype} in {dimensions} "
                "dimensions is needed"
            )
    shapes = {"weight_scale": (weight_scale, (len(weight), 1)), "bias": (bias, (len(weight),))}
    for name, (tensor, shape) in shapes.items():
        if tensor is not None and (tuple(tensor.shape) != shape or tensor.device != weight.device):
            raise OpError(
                f"fp8_linear: {name} has shape {tuple(tensor.shape)} on {tensor.device}, expected {shape} on "
                f"{weight.device}, as weight of shape {tuple(weight.shape)}"
            )
    return apply_fp8(x, weight, weight_scale, bias)
