"""The frozen linear layers of a mixture's experts, each on the tokens that are routed to it, with low-rank updates of
the experts (LoRA, Hu et al., arXiv 2106.09685, equation 3, expert by expert). For the rows x_e of expert e:

    y_e = x_e W_eᵀ + bias_e + s·x_e A_eᵀ B_eᵀ

With S = x_e A_eᵀ and T = s·dY_e B_e:

    dX_e = dY_e W_e + T A_e      dA_e = Tᵀ x_e      dB_e = s·dY_eᵀ S      dbias_e = Σ dY_e      dW_e = dY_eᵀ x_e

No expert's update is ever multiplied out, so that nothing of the size of the experts' weights is made. The adapter's
matrices are never rounded. Saved for backward: x where a matrix wants a gradient, S where B does.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastpeft.dispatch import choose_backend, requested_backend
from fastpeft.errors import OpError
from fastpeft.fallback import kernels_or_torch
from fastpeft.ops import _expert_lora_linear_torch as torch_path
from fastpeft.ops._autocast import without_autocast
from fastpeft.ops._first_order import applied, first_order
from fastpeft.ops.lora_linear import DTYPES, cast, widest

# Letters of the shape suffixes: M rows, sorted by expert; E experts, K inputs, N outputs, R rank.


class Call(NamedTuple):
    """What a call computes besides its tensors: each adapter's scaling, of every expert that has rows which, and
    whether on Triton."""

    scalings: tuple[float, ...]
    rows: torch_path.Rows
    triton: bool


def expert_lora_linear_reference(x, weight, bias, lora_A, lora_B, scaling, ends):
    """The definition, for autograd, expert by expert; the adapter in its own dtype, one cast at the end."""
    count, parts, bounds = len(weight), [], [0, *ends.tolist()]
    rank = len(lora_A) // count
    for expert in range(count):
        rows = slice(bounds[expert], bounds[expert + 1])
        a, b = lora_A[expert * rank : (expert + 1) * rank], lora_B[:, expert::count]
        y = torch.nn.functional.linear(x[rows], weight[expert], None if bias is None else bias[expert])
        term = (x[rows].to(a.dtype) @ a.t()) @ b.t() * scaling
        parts.append((y + term).to(y.dtype))
    return torch.cat(parts)


def decide(x_MK: Tensor, a: Sequence[Tensor], rows: torch_path.Rows, scalings, patched: str | None) -> Call:
    """The call's numbers, and its backend: Triton where it is demanded, as no GPU has measured it. Raises BackendError
    where it is demanded in vain."""
    ranks = [each.shape[1] for each in a]
    triton = bool(rows and ranks) and requested_backend(patched) == "triton"
    if triton:
        choose_backend(x_MK, x_MK.dtype, max(ranks), patched)
    return Call(tuple(scalings), rows, triton)


def run_forward(x_MK, weight_ENK, bias_EN, a, b, ends_E, call: Call):
    """(y [M, N], S [M, r] of each adapter) on the call's backend."""
    args = (x_MK, weight_ENK, bias_EN, a, b, call.scalings, ends_E, call.rows)
    return _on_backend("forward", call, a, lambda path: path.forward(*args))


def run_backward(dy_MN, x_MK, weight_ENK, a, b, s, ends_E, call: Call, needs):
    """(dX, dW, dbias, [dA, ...], [dB, ...]), each None where `needs` does not ask for it."""
    args = (dy_MN, x_MK, weight_ENK, a, b, s, call.scalings, ends_E, call.rows, needs)
    return _on_backend("backward", call, a, lambda path: path.backward(*args))


@functools.cache
def _triton_path():
    from fastpeft.ops import _expert_lora_linear_triton as triton_path

    return triton_path


def _on_backend(phase: str, call: Call, a: Sequence[Tensor], run):
    if not call.triton:
        return run(torch_path)

    def kind() -> tuple:
        adapters = f"adapters {a[0].dtype} {[tuple(each.shape) for each in a]}"
        return "expert_lora_linear", phase, a[0].device, adapters

    return kernels_or_torch(kind, True, lambda: run(_triton_path()), lambda: run(torch_path))[0]


def by_expert(lora_A: Tensor, lora_B: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """(A [E, r, K], B [E, N, r]), views, of A [E·r, K], whose rows lie expert by expert, and B [N, r·E], of whose
    columns an expert has every E-th: HF peft's layout."""
    outputs, inputs = lora_B.shape[0], lora_A.shape[1]
    return lora_A.view(experts, -1, inputs), lora_B.view(outputs, -1, experts).permute(2, 0, 1)


class ExpertLoraLinearFunction(torch.autograd.Function):
    """Checked tensors in. matrices: every A [E, r, K], then every B [E, N, r], all of one dtype."""

    @staticmethod
    def forward(ctx, x_MK, weight_ENK, bias_EN, ends_E, call: Call, *matrices):
        count = len(call.scalings)
        a, b = matrices[:count], [each.contiguous() for each in matrices[count:]]
        y_MN, s = run_forward(x_MK, weight_ENK, bias_EN, a, b, ends_E, call)
        need_x, need_w, _, _, _, *need = ctx.needs_input_grad
        need_a, need_b = need[:count], need[count:]
        if False in need_b:
            s = [each if need_s else None for each, need_s in zip(s, need_b, strict=True)]
        ctx.save_for_backward(x_MK if need_w or True in need_a else None, weight_ENK, ends_E, *a, *b, *s)
        ctx.call = call
        return y_MN

    @staticmethod
    @first_order
    def backward(ctx, dy_MN):
        call, (x, weight, ends, *held) = ctx.call, ctx.saved_tensors
        count = len(call.scalings)
        a, b, s = held[:count], held[count : 2 * count], held[2 * count :]
        need_x, need_w, need_bias, _, _, *need = ctx.needs_input_grad
        needs = (need_x, need_w, need_bias, need[:count], need[count:])
        with without_autocast(dy_MN):
            dx, dw, dbias, da, db = run_backward(dy_MN, x, weight, a, b, s, ends, call, needs)
        return dx, dw, dbias, None, None, *da, *db


def apply_expert_lora(
    x_MK: Tensor, weight_ENK: Tensor, bias_EN: Tensor | None, adapters: Sequence[tuple[Tensor, Tensor, float]],
    ends_E: Tensor, patched_backend: str | None = None, rows: torch_path.Rows | None = None,
) -> Tensor:  # fmt: skip
    """`expert_lora_linear` with any number of adapters (A, B, scaling), for callers that have checked their tensors.
    autocast is of no effect: everything is computed in the weight's dtype, which is x's, as by transformers.

    rows: `segments(ends_E, M)`, where the caller has it, as to make it waits for the device.
    """
    wide = x_MK.dtype
    for a, b, _ in adapters:
        wide = widest(wide, a, b)
    pairs = [by_expert(cast(a, wide), cast(b, wide), weight_ENK.shape[0]) for a, b, _ in adapters]
    a, b = [a for a, _ in pairs], [b for _, b in pairs]
    scalings = [float(scaling) for _, _, scaling in adapters]
    if torch.compiler.is_compiling():
        tensors = (x_MK, weight_ENK, bias_EN, ends_E, a, b)
        return torch.ops.fastpeft.expert_lora_linear(*tensors, scalings, patched_backend or "")[0]
    rows = torch_path.segments(ends_E, len(x_MK)) if rows is None else rows
    call = decide(x_MK, a, rows, scalings, patched_backend)
    with without_autocast(x_MK):
        return applied(ExpertLoraLinearFunction, x_MK, weight_ENK, bias_EN, ends_E, call, *a, *b)


def _check(x, weight, bias, lora_A, lora_B, scaling, ends) -> None:
    """Raises OpError unless `expert_lora_linear` can take these."""
    op = "expert_lora_linear"
    tensors = {"x": (x, 2), "weight": (weight, 3), "lora_A": (lora_A, 2), "lora_B": (lora_B, 2), "ends": (ends, 1)}
    if bias is not None:
        tensors["bias"] = (bias, 2)
    for name, (tensor, dimensions) in tensors.items():
        if not isinstance(tensor, Tensor):
            raise OpError(f"{op}: {name} is of {type(tensor).__name__}; a tensor is needed")
        if tensor.ndim != dimensions:
            raise OpError(f"{op}: {name} has shape {tuple(tensor.shape)}; {dimensions} dimensions are needed")
        if tensor.device != x.device:
            raise OpError(f"{op}: {name} is on {tensor.device}, x on {x.device}; move one")
        if name != "ends" and tensor.dtype not in DTYPES:
            raise OpError(f"{op}: {name} is {tensor.dtype}; a floating-point dtype is needed")
    experts, outputs, inputs = weight.shape
    rank = len(lora_A) // max(1, experts)
    shapes = {
        "x": (x, (len(x), inputs)),
        "bias": (bias, (experts, outputs)),
        "lora_A": (lora_A, (experts * rank, inputs)),
        "lora_B": (lora_B, (outputs, rank * experts)),
        "ends": (ends, (experts,)),
    }
    for name, (tensor, shape) in shapes.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise OpError(f"{op}: {name} has shape {tuple(tensor.shape)}, and {shape} goes with weight; correct one")
    if min(experts, outputs, inputs, rank) < 1:
        raise OpError(f"{op}: weight has shape {tuple(weight.shape)} and the rank is {rank}; neither may be empty")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise OpError(f"{op}: x is {x.dtype} but {name} is {tensor.dtype}; cast one")
    if isinstance(scaling, bool) or not isinstance(scaling, int | float):
        raise OpError(f"{op}: scaling is {scaling!r}; a number is needed")
    if ends.dtype not in (torch.int32, torch.int64):
        raise OpError(f"{op}: ends is {ends.dtype}; int32 or int64 is needed")


def expert_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    ends: Tensor,
) -> Tensor:
    """Of each expert e, whose rows of x lie together: x_e W_eᵀ + bias_e + scaling·x_e A_eᵀ B_eᵀ, with the gradients of
    every argument that wants one.

    Args:
        x: (M, K), sorted by expert, any strides; fp32, fp16, bf16 or fp64.
        weight: (E, N, K) in x's dtype, any strides, so that a stored (E, K, N) is given as its transpose(1, 2).
        bias: (E, N) in x's dtype, or None.
        lora_A: (E·r, K), expert by expert; x's dtype or a wider one, which is not rounded.
        lora_B: (N, r·E), of which expert e has the columns e, E + e, 2·E + e, ...; likewise.
        scaling: alpha / r, or alpha / sqrt(r).
        ends: (E,) int32 or int64: where each expert's rows end, the last of them M; as torch's grouped_mm has it.

    Returns:
        (M, N) in x's dtype, autocast or not.

    Raises:
        OpError (a ValueError): a shape, device, dtype or type does not fit, or ends does not rise to M.
        BackendError: the triton backend was demanded and cannot serve the call. Where it is not demanded, torch does.
    """
    _check(x, weight, bias, lora_A, lora_B, scaling, ends)
    return apply_expert_lora(x, weight, bias, [(lora_A, lora_B, scaling)], ends)
