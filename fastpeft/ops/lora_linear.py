"""A frozen linear layer with a low-rank update (LoRA, Hu et al., arXiv 2106.09685, equation 3):

    y = x Wᵀ + bias + s·drop(x) Aᵀ Bᵀ

With S = drop(x) Aᵀ and T = s·dY B, drop(x) = mask⊙x/(1 - p):

    dX = dY W + mask⊙(T A)/(1 - p)      dA = Tᵀ drop(x)      dB = s·dYᵀ S      dbias = Σ dY      dW = dYᵀ x

Saved for backward: x where A wants a gradient, S where B does, and a seed in place of the mask (on the torch path up
to M·K/8 bytes, where they spare it a second drawing). The adapter's matrices are never rounded: in fp32 on a
half-precision x (HF peft's default) the kernels multiply them in fp32 precision.
"""

import functools
import math
from typing import NamedTuple

import torch

from fastpeft.dispatch import Plan, choose_backend, lora_linear_plan
from fastpeft.errors import OpError
from fastpeft.fallback import is_demanded, kernels_or_torch, mask_of_kernels
from fastpeft.ops import _lora_linear_torch as torch_path
from fastpeft.ops._autocast import autocast_dtype
from fastpeft.ops._first_order import applied, first_order
from fastpeft.ops._lora_linear_torch import as_rows
from fastpeft.ops._programs import LEARNED, Programs, backward_of, forward_of, known, learn

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# Letters of the shape suffixes in this file: M rows (all leading dimensions of x), K inputs, N outputs, R rank.


class Projection(NamedTuple):
    """One linear layer with or without an adapter: weight (N, K), bias (N,) or None, lora_A (r, K) and lora_B (N, r) or
    both None, alpha / r, and the probability of dropout."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    lora_A: torch.Tensor | None = None
    lora_B: torch.Tensor | None = None
    scaling: float = 1.0
    dropout: float = 0.0


class Call(NamedTuple):
    """What a call computes besides its tensors; `plan` is None on the torch path.

    `dtype` is that of the base product, `dx_dtype` that of the sum dX: x's, where autocast narrowed x. `demanded`:
    whether Triton must serve it; `fell_back`: whether its kernels failed in forward (`fastpeft.fallback`); `programs`:
    what calls like it have come to, once there are several.
    """

    scaling: float
    dropout: float
    dtype: torch.dtype
    dx_dtype: torch.dtype
    plan: Plan | None
    demanded: bool = False
    fell_back: bool = False
    programs: Programs | None = None

    @property
    def by_kernels(self) -> bool:
        return self.plan is not None

    @property
    def is_straight(self) -> bool:
        return self.plan is not None or not self.dropout or torch_path.keeps(self.dropout)


def lora_linear_reference(x, weight, bias, lora_A, lora_B, scaling, keep=None, p=0.0):
    """The definition, for autograd: x (..., K), keep a (M, K) mask or None. The order of HF peft's own forward:
    the adapter in its own dtype, the sum in the wider one, one cast to the base's dtype at the end."""
    return based_reference(torch.nn.functional.linear(x, weight, bias), x, lora_A, lora_B, scaling, keep, p)


def based_reference(y, x, lora_A, lora_B, scaling, keep=None, p=0.0):
    """The same, y (..., N) being the base product."""
    z = x.to(lora_A.dtype)
    if keep is not None:
        z = z * keep.view(z.shape) / (1 - p)
    return (y + (z @ lora_A.t()) @ lora_B.t() * scaling).to(y.dtype)


def dropout_mask(seed: torch.Tensor, p: float, rows: int, columns: int, device, backend: str) -> torch.Tensor:
    """(rows, columns) booleans on `device`, True where `lora_linear` keeps an element of x (M, K) = (rows, columns).

    Args:
        seed: (1,) int64, as a call has drawn it from torch's generator.
        p: the probability that an element is left out.
        backend: "torch" or "triton", whose masks differ.
    """
    return _path(backend == "triton").keep_mask(seed, p, rows, columns, torch.device(device))


@functools.cache
def _path(triton: bool):
    if not triton:
        return torch_path
    from fastpeft.ops import _lora_linear_triton as triton_path

    return triton_path


class LoraLinearFunction(torch.autograd.Function):
    """Casting to a common adapter dtype and choosing is before `apply`; x and residual are flattened inside, where
    autograd does not record it.

    weight None: y = residual + the low-rank term, for a base layer whose product somebody else computes.
    """

    @staticmethod
    def forward(ctx, x, weight_NK, bias_N, residual, a_RK, b_NR, call: Call):
        needs, seed, drawn = ctx.needs_input_grad, None, ()
        if call.dropout:
            seed = _path(call.plan is not None).draw_seed(x)
            if call.plan is None:
                seed, drawn = torch_path.ahead(seed, call.dropout, x, needs[0] or needs[4], call.programs is not None)
                call = call if drawn else call._replace(programs=None)
        tensors = x, weight_NK, bias_N, residual, a_RK, b_NR, seed
        if call.programs is None:
            y, saved, fell_back = _forward(*tensors, call, needs)
        else:
            y, saved, fell_back = forward_of(call, needs, _forward, tensors, drawn)
        if True in needs:
            ctx.save_for_backward(*saved)
            ctx.call = call._replace(fell_back=True, programs=None) if fell_back else call
            ctx.dtypes = x.dtype, None if bias_N is None else bias_N.dtype
        return y

    @staticmethod
    @first_order
    def backward(ctx, dy):
        call, tensors, drawn = ctx.call, (dy, *ctx.saved_tensors), ()
        if call.plan is None and call.programs is not None and tensors[-1] is not None:
            drawn = torch_path.places_of(tensors[-1])
            tensors = (*tensors[:-1], None)
        return backward_of(call, ctx.needs_input_grad, _backward, tensors, ctx.dtypes, drawn=drawn)


def _forward(x, weight_NK, bias_N, residual, a_RK, b_NR, seed, *others):
    """(y, what backward reads, whether the kernels failed); others: what was drawn `ahead` if anything was, the call,
    and whether each of `apply`'s arguments wants a gradient."""
    *drawn, call, needs = others
    keep, *places = drawn or (seed,)
    seed = torch_path.Given(places, call.dropout) if drawn else seed
    y, s_MR, call = run_forward(x, weight_NK, bias_N, residual, a_RK, b_NR, seed, call)
    need_x, need_w, _, _, need_a, need_b, _ = needs
    saved = (
        x if need_a or need_w else None,
        weight_NK if need_x else None,
        a_RK if need_x or need_a else None,
        b_NR if need_x or need_a else None,
        s_MR if need_b else None,
        keep if keep is None else torch_path.kept(keep),
    )
    return y, saved, call.fell_back


def _backward(dy, x, weight_NK, a_RK, b_NR, s_MR, seed, *others):
    """A gradient for each of `apply`'s arguments; others: the places that are dropped if they are known, the call, what
    is wanted, and the dtypes of x and the bias."""
    *places, call, needs, dtypes = others
    seed = torch_path.Given(places, call.dropout) if places else seed
    need_x, need_w, need_bias, need_residual, need_a, need_b, _ = needs
    of_tensors = need_x, need_w, need_bias, need_a, need_b
    s_MR = None if s_MR is None else s_MR.contiguous()  # as it was: a hook may have given it other strides
    dx, dw, dbias, da, db = run_backward(dy, x, weight_NK, a_RK, b_NR, s_MR, seed, call, of_tensors)
    dx = None if dx is None else own_of_rows(cast(dx, dtypes[0]), dy)
    return dx, dw, cast(dbias, dtypes[1]), dy if need_residual else None, da, db, None


def run_forward(x, weight_NK, bias_N, residual, a_RK, b_NR, seed, call: Call):
    """(y (..., N), no view, S [M, R], the call as it was served) on the backend that `call.plan` stands for."""
    x, weight, bias = cast_all((x, weight_NK, bias_N), call.dtype)
    tensors = (x, weight, bias, residual, a_RK, b_NR, call.scaling)
    if call.plan is None:
        y, s = torch_path.forward(*tensors, seed, call.dropout)
        return own_of_rows(y, x), s, call
    (y, s), by_kernels = kernels_or_torch(
        lambda: _kind("forward", call, x, a_RK, b_NR),
        call.demanded,
        lambda: _path(True).forward(*tensors, seed, call.dropout, call.plan),
        lambda: torch_path.forward(*tensors, _mask(seed, call, as_rows(x).shape, x.device, False), call.dropout),
    )
    return own_of_rows(y, x), s, call if by_kernels else call._replace(fell_back=True)


def _kind(phase: str, call: Call, rows, a_RK, b_NR) -> tuple:
    """What kernels are compiled for, in words; A and B are None where nothing of theirs is wanted."""
    sizes = [] if a_RK is None else [f"K {a_RK.shape[1]}, N {len(b_NR)}, rank {len(a_RK)}", f"adapter {a_RK.dtype}"]
    return "lora_linear", phase, rows.device, call.dtype, *sizes, f"dropout {call.dropout > 0}"


def _mask(seed, call: Call, shape: tuple[int, int], device, needed: bool):
    """What the torch path drops in the place of the kernels: as they do, if they can say, which may be `needed`."""
    if seed is None:
        return None
    path, kind = _path(True), ("lora_linear", "dropout", device)
    mask = mask_of_kernels(kind, needed, lambda: path.keep_mask(seed, call.dropout, *shape, device))
    return seed if mask is None else torch_path.given_mask(mask, path.honoured(call.dropout))


def run_backward(dy, x, weight_NK, a_RK, b_NR, s_MR, seed, call: Call, needs: tuple[bool, ...]):
    """(dX [M, K], dW, dbias, dA, dB) of dY (..., N), each None where `needs` (in this order) does not ask for it."""
    dy, x, weight = cast(dy, call.dtype), cast(x, call.dtype), cast(weight_NK, call.dtype)
    given = dy, x, weight, a_RK, b_NR, s_MR
    if call.plan is None:
        dx, dbias, da, db = _grads_by_torch(*given, seed, call, needs)
    elif call.fell_back:
        dx, dbias, da, db = _grads_by_torch_as_kernels(*given, seed, call, needs)
    else:
        (dx, dbias, da, db), _ = kernels_or_torch(
            lambda: _kind("backward", call, dy, a_RK, b_NR),
            call.demanded,
            lambda: _grads_by_kernels(*given, seed, call, needs),
            lambda: _grads_by_torch_as_kernels(*given, seed, call, needs),
        )
    return dx, as_rows(dy).t() @ as_rows(x) if needs[1] else None, dbias, da, db


def _grads_by_torch(dy, x, weight, a_RK, b_NR, s_MR, seed, call: Call, needs):
    """(dX, dbias, dA, dB)"""
    need_x, _, need_bias, need_a, need_b = needs
    dy, x = as_rows(dy), None if x is None else as_rows(x)
    db, t_MR = torch_path.grad_b_and_t(dy, s_MR, b_NR, call.scaling, need_b, need_x or need_a)
    da, dx = torch_path.grad_a_and_x(dy, x, t_MR, weight, a_RK, seed, call.dropout, call.dx_dtype, need_a, need_x)
    return dx, dy.sum(0) if need_bias else None, da, db


def _grads_by_torch_as_kernels(dy, x, weight, a_RK, b_NR, s_MR, seed, call: Call, needs):
    """The same under the kernels' mask, where that plays a part."""
    masked = needs[0] or needs[3]
    mask = _mask(seed, call, (len(as_rows(dy)), a_RK.shape[1]), dy.device, not call.fell_back) if masked else None
    return _grads_by_torch(dy, x, weight, a_RK, b_NR, s_MR, mask, call, needs)


def _grads_by_kernels(dy, x, weight, a_RK, b_NR, s_MR, seed, call: Call, needs):
    """(dX, dbias, dA, dB)"""
    need_x, _, need_bias, need_a, need_b = needs
    path, plan = _path(True), call.plan
    dy, x = path.for_launches(dy), path.for_launches(x)
    db, t_MR, dbias = path.grad_b_and_t(
        dy, s_MR, b_NR, call.scaling, need_b, need_x or need_a, need_bias, plan.reads
    )  # fmt: skip
    da, dx = path.grad_a_and_x(
        dy, x, t_MR, weight, a_RK, seed, call.dropout, plan, call.dx_dtype, need_a, need_x
    )  # fmt: skip
    return dx, dbias, da, db


def of_rows(y_MN: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(..., N) of (M, N), the rows of x (..., K)."""
    return y_MN if x.ndim == 2 else y_MN.view(*x.shape[:-1], y_MN.shape[-1])


def own_of_rows(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(..., N) of y, (M, N) or so already, for a Function to return, where nobody else has y: no view, as one that is
    returned may not be changed in place. y itself gets the shape, which costs half of what gives matmul's products
    theirs."""
    return y if y.ndim == x.ndim and not y._is_view() else _shaped(y, x.shape[:-1])


def own_of_each(ys, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Each as `own_of_rows` gives it."""
    ndim, lead = x.ndim, x.shape[:-1]
    return tuple([y if y.ndim == ndim and not y._is_view() else _shaped(y, lead) for y in ys])


def _shaped(y: torch.Tensor, lead: torch.Size) -> torch.Tensor:
    """(*lead, N) of y, itself if it may be. Sizes one by one: a tuple of them takes torch as long again."""
    if not y._is_view() and y.is_contiguous():
        return y.resize_(*lead, y.shape[-1])
    return torch.ops.aten._unsafe_view.default(y, (*lead, y.shape[-1]))


def cast(tensor: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """The tensor in `dtype`, or None; one that is so already is not touched, which costs a tenth of asking torch."""
    return tensor if tensor is None or tensor.dtype is dtype else tensor.to(dtype)


def cast_all(tensors, dtype: torch.dtype):
    """Each as `cast` gives it; the sequence itself where none is touched."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype is not dtype:
            return [cast(each, dtype) for each in tensors]
    return tensors


def widest(dtype: torch.dtype, *tensors: torch.Tensor) -> torch.dtype:
    """That of `dtype` and the tensors' in which none is rounded."""
    for tensor in tensors:
        if tensor.dtype is not dtype:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def decide(x: torch.Tensor, dtype: torch.dtype, a_RK, b_NR, scaling: float, dropout: float, patched) -> Call:
    """The call's numbers, and its backend by `dispatch`. A kernel has no grid over nothing, while torch's products of
    no rows are zeros: without elements, or a rank, it is the torch path. On the meta device nothing is drawn."""
    elements = x.numel() * b_NR.numel()
    dx_dtype = dtype if x.dtype is dtype else widest(dtype, x)
    if not elements or choose_backend(x, dtype, patched=patched).backend != "triton":
        return Call(scaling, 0.0 if x.is_meta else dropout, dtype, dx_dtype, None)
    plan = lora_linear_plan(x, dtype, a_RK, b_NR, dropout)
    return Call(scaling, dropout, dtype, dx_dtype, plan, is_demanded(patched))


def apply_lora(x, weight, bias, residual, lora_A, lora_B, scaling, dropout, patched_backend=None):
    """`lora_linear` for callers that have checked their tensors: autocast, dtypes, backend, shapes, `apply`.

    Exactly one of `weight` (N, K) and `residual` (..., N) is given; `dropout` is the probability in force.
    """
    scaling, dropout = float(scaling), float(dropout)
    given, asked = (x, lora_B, lora_A, residual if weight is None else weight), (scaling, dropout, weight is None)
    if bias is not None:
        given, asked = (*given, bias), (*asked, True)
    compiling = torch.compiler.is_compiling()
    found = None if compiling or not LEARNED else known(LoraLinearFunction, given, patched_backend, asked)
    if found is not None:
        tensors = (x, weight, bias, residual, lora_A, lora_B)
        return applied(LoraLinearFunction, *tensors, found.call, narrow=found.narrow)
    narrow = autocast_dtype(x)
    dtype = x.dtype if narrow is None or weight is None else narrow
    if weight is not None and narrow is None and weight.dtype is not dtype:
        raise OpError(f"lora_linear: x is {dtype} but weight is {weight.dtype}; cast one, or use torch.autocast")
    a_RK, b_NR = lora_A, lora_B
    if a_RK.dtype is not dtype or b_NR.dtype is not dtype:
        wide = widest(dtype, a_RK, b_NR)
        a_RK, b_NR = cast(a_RK, wide), cast(b_NR, wide)
    if compiling:
        from fastpeft.ops._lora_linear_compiled import compiled_lora_linear

        tensors = (as_rows(x), weight, bias, None if residual is None else as_rows(residual), a_RK, b_NR)
        return of_rows(compiled_lora_linear(*tensors, scaling, dropout, dtype, patched_backend), x)
    call = decide(x, dtype, a_RK, b_NR, scaling, dropout, patched_backend)
    if a_RK is lora_A and b_NR is lora_B:  # what is cast here, autograd records
        learn(LoraLinearFunction, given, patched_backend, asked, call, narrow)
    return applied(LoraLinearFunction, x, weight, bias, residual, a_RK, b_NR, call, narrow=narrow)


def _check(x, weight, bias, lora_A, lora_B, scaling, dropout):
    """Raises OpError unless `lora_linear` can take these."""
    given = {"x": x, "weight": weight, "bias": bias, "lora_A": lora_A, "lora_B": lora_B}
    if bias is None:
        del given["bias"]
    for name, tensor in given.items():
        _check_tensor(name, tensor, x)
    if x.ndim == 0:
        raise OpError("lora_linear: x of shape () is a scalar; its last dimension must be the inputs")
    columns = x.shape[-1]
    shapes = {"weight": ("N", columns), "lora_A": ("r", columns), "lora_B": ("N", "r"), "bias": ("N",)}
    sizes: dict[str, int] = {}
    for name, shape in shapes.items():
        if name not in given:
            continue
        tensor = given[name]
        expected = [sizes.get(want, want) for want in shape]
        fits = tensor.ndim == len(shape) and all(
            isinstance(want, str) or have == want for have, want in zip(tensor.shape, expected, strict=True)
        )
        if not fits:
            raise OpError(
                f"lora_linear: {name} has shape {tuple(tensor.shape)}, expected ({', '.join(map(str, expected))}) "
                f"for x of shape {tuple(x.shape)}"
            )
        sizes.update({want: have for want, have in zip(shape, tensor.shape, strict=True) if isinstance(want, str)})
    if sizes["r"] == 0:
        raise OpError("lora_linear: lora_A and lora_B have rank 0; a rank of at least 1 is needed")
    if not _is_number(scaling) or not -math.inf < scaling < math.inf:
        raise OpError(f"lora_linear: scaling is {scaling!r}; a finite number is needed")
    if not _is_number(dropout) or not 0.0 <= dropout < 1.0:
        raise OpError(f"lora_linear: dropout is {dropout!r}; a probability in [0, 1) is needed")


def _check_tensor(name: str, tensor, x) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise OpError(f"lora_linear: {name} is of {type(tensor).__name__}; a tensor is needed")
    if tensor.is_meta and x.is_meta:
        raise OpError(f"lora_linear: {name} is on the meta device and has no values; give it some")
    if tensor.device != x.device:
        raise OpError(f"lora_linear: {name} is on {tensor.device}, x on {x.device}; move one of them")
    if tensor.dtype not in DTYPES:
        kind = "float32, float16, bfloat16 or float64" if tensor.is_floating_point() else "floating point"
        raise OpError(f"lora_linear: {name} is {tensor.dtype}; {kind} is needed")


def _is_number(value) -> bool:
    """A number of Python's or NumPy's, or a tensor of one element."""
    if isinstance(value, torch.Tensor):
        return value.numel() == 1 and not value.is_complex()
    return hasattr(type(value), "__float__")


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    *,
    dropout: float = 0.0,
    training: bool = False,
) -> torch.Tensor:
    """x Wᵀ + bias + scaling·drop(x) Aᵀ Bᵀ, with the gradients of every argument that wants one.

    Args:
        x: (..., K), any strides; fp32, fp16 or bf16 (fp64 on the torch backend).
        weight: (N, K) in x's dtype (any, under autocast); its gradient, if wanted, is the vendor's product.
        bias: (N,) or None.
        lora_A: (r, K), any rank from 1; x's dtype or a wider one, which is not rounded. Beyond 256 the kernels take
            ranks in slices of 128, and read x and dY once for each.
        lora_B: (N, r), likewise.
        scaling: alpha / r, or alpha / sqrt(r).
        dropout: probability that an element of x is left out of the low-rank term, honoured to within 2**-16; the
            mask is drawn from torch's generator in forward and drawn again in backward, never stored.
        training: dropout acts only if True.

    Returns:
        (..., N) in x's dtype, or autocast's.

    Raises:
        OpError (a ValueError): a shape, device, dtype or type does not fit, scaling is not finite, or dropout is
            outside [0, 1).
        BackendError: the triton backend was demanded and cannot serve the call.
    """
    _check(x, weight, bias, lora_A, lora_B, scaling, dropout)
    return apply_lora(x, weight, bias, None, lora_A, lora_B, scaling, dropout if training else 0.0)
