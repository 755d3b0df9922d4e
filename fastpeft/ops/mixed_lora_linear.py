"""A frozen linear layer whose batch has for each sample a low-rank update of its own, or none (LoRA, Hu et al., arXiv
2106.09685, in mixed batches as of Punica, arXiv 2310.18547, and S-LoRA, arXiv 2311.03285; trained as well):

    y_b = x_b Wᵀ + bias + s_g·drop_g(x_b) A_gᵀ B_gᵀ      g = rows[b], or without the last term where that is -1

With S = drop(x) Aᵀ and T = s·dY B of each sample's adapter, drop(x) = mask⊙x/(1 - p), and X_g the samples of g:

    dX = dY W + mask⊙(T A)/(1 - p)      dA_g = Σ_{X_g} Tᵀ drop(x)      dB_g = Σ_{X_g} s·dYᵀ S      dbias = Σ dY

Ranks, scalings and probabilities differ from adapter to adapter. Saved for backward are x, S and a seed in place of the
masks; the matrices are never rounded, and an adapter that no sample has gets no gradient. Which sample has which is
known on the host, so that nothing waits for the device.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastpeft.dispatch import choose_backend
from fastpeft.errors import OpError
from fastpeft.fallback import is_demanded, kernels_or_torch, mask_of_kernels
from fastpeft.ops import _mixed_lora_linear_torch as torch_path
from fastpeft.ops._autocast import autocast_dtype, without_autocast
from fastpeft.ops._first_order import applied, first_order
from fastpeft.ops.lora_linear import _check as check_lora
from fastpeft.ops.lora_linear import as_rows, cast, of_rows, own_of_rows, widest

# Letters of the shape suffixes: B samples, M rows (B times all dimensions between), K inputs, N outputs, R rank.


class Adapter(NamedTuple):
    """A (r, K), B (N, r), alpha / r and the probability of dropout in force."""

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    dropout: float


class Call(NamedTuple):
    """What a call computes besides its tensors. samples: of each adapter those that it serves, in order. tokens: rows
    of a sample. `dtype` is that of the base product, `dx_dtype` that of the sum dX: x's, where autocast narrowed x. The
    last two as in `lora_linear`."""

    samples: tuple[tuple[int, ...], ...]
    tokens: int
    ranks: tuple[int, ...]
    scalings: tuple[float, ...]
    dropouts: tuple[float, ...]
    dtype: torch.dtype
    dx_dtype: torch.dtype
    triton: bool
    demanded: bool = False
    fell_back: bool = False

    @property
    def drops(self) -> bool:
        return any(self.dropouts)


def mixed_lora_linear_reference(x, weight, bias, lora_A, lora_B, scalings, rows, keep=None, dropouts=None):
    """The definition, for autograd, adapter by adapter: keep a (M, K) mask or None, dropouts the probabilities that it
    was drawn with. Each adapter's samples in HF peft's order: the adapter in its own dtype, one cast at the end; but
    the sum in the wider one, as for an adapter that all samples share, where peft rounds the term before."""
    y = torch.nn.functional.linear(x, weight, bias)
    for g, samples in enumerate(samples_of(tuple(rows), len(lora_A))):
        if not samples:
            continue
        place = torch.tensor(samples, device=x.device)
        z = x[place].to(lora_A[g].dtype)
        if keep is not None:
            z = z * keep.view(x.shape)[place] / (1 - dropouts[g])
        term = (z @ lora_A[g].t()) @ lora_B[g].t() * scalings[g]
        y = y.index_copy(0, place, (y[place] + term).to(y.dtype))
    return y


@functools.cache
def _path(triton: bool):
    if not triton:
        return torch_path
    from fastpeft.ops import _mixed_lora_linear_triton as triton_path

    return triton_path


def mixed_dropout_mask(seeds: Tensor, rows: Sequence[int], dropouts, shape, device, backend: str) -> Tensor:
    """[M, K] booleans, True where `mixed_lora_linear` keeps x under these seeds on this backend; every adapter of
    `dropouts` has a sample."""
    samples, tokens = samples_of(tuple(rows), len(dropouts)), shape[0] // len(rows)
    return _path(backend == "triton").keep_mask(seeds, samples, tokens, tuple(dropouts), shape, torch.device(device))


@functools.lru_cache(maxsize=64)  # a batch keeps its adapters for as many steps as it has tokens
def samples_of(rows: tuple[int, ...], adapters: int) -> tuple[tuple[int, ...], ...]:
    """Of each adapter the samples that it serves."""
    samples = [[] for _ in range(adapters)]
    for b, g in enumerate(rows):
        if g >= 0:
            samples[g].append(b)
    return tuple(map(tuple, samples))


class MixedLoraLinearFunction(torch.autograd.Function):
    """Casting and choosing is before `apply`; x and residual are flattened inside, where autograd does not record it.
    matrices: every A, then every B.

    weight None: y = residual + the low-rank terms, for a base layer whose product somebody else computes.
    """

    @staticmethod
    def forward(ctx, x, weight_NK, bias_N, residual, call: Call, *matrices):
        seeds = _path(call.triton).draw_seeds(x, len(call.ranks)) if call.drops else None
        a, b = matrices[: len(call.ranks)], matrices[len(call.ranks) :]
        residual_MN = None if residual is None else as_rows(residual)
        y_MN, s, call = run_forward(as_rows(x), weight_NK, bias_N, residual_MN, a, b, seeds, call)
        need_x, need_w, *_ = ctx.needs_input_grad
        need_a, need_b = _needs(ctx, call)
        ctx.save_for_backward(
            x if need_a or need_w else None,
            weight_NK if need_x else None,
            s if need_b else None,
            seeds,
            *matrices,
        )
        ctx.call = call
        ctx.input_dtype, ctx.bias_dtype = x.dtype, None if bias_N is None else bias_N.dtype
        return own_of_rows(y_MN, x)

    @staticmethod
    @first_order
    def backward(ctx, dy):
        need_x, need_w, need_bias, need_residual, *_ = ctx.needs_input_grad
        x, weight, s, seeds, *matrices = ctx.saved_tensors
        call = ctx.call
        a, b = matrices[: len(call.ranks)], matrices[len(call.ranks) :]
        need_a, need_b = _needs(ctx, call)
        needs = (need_x, need_w, need_bias, need_a, need_b)
        with without_autocast(dy):
            x_MK = None if x is None else as_rows(x)
            dx, dw, dbias, da, db = run_backward(as_rows(dy), x_MK, weight, a, b, s, seeds, call, needs)
        dx = None if dx is None else of_rows(cast(dx, ctx.input_dtype), dy)
        gradients = [*(da or [None] * len(a)), *(db or [None] * len(b))]
        return dx, dw, cast(dbias, ctx.bias_dtype), dy if need_residual else None, None, *gradients


def _needs(ctx, call: Call) -> tuple[bool, bool]:
    """Whether the gradient of any A, and of any B, is wanted."""
    wanted = ctx.needs_input_grad[5:]
    return True in wanted[: len(call.ranks)], True in wanted[len(call.ranks) :]


def run_forward(x_MK, weight_NK, bias_N, residual_MN, a, b, seeds, call: Call):
    """(y [M, N], S [elements], the call as it was served) on the call's backend."""
    x, weight, bias = cast(x_MK, call.dtype), cast(weight_NK, call.dtype), cast(bias_N, call.dtype)
    tensors = (x, weight, bias, residual_MN, a, b)
    if not call.triton:
        return *torch_path.forward(*tensors, seeds, call), call
    (y, s), by_kernels = kernels_or_torch(
        lambda: _kind("forward", call, x_MK, a, b),
        call.demanded,
        lambda: _path(True).forward(*tensors, seeds, call),
        lambda: torch_path.forward(*tensors, _masks(seeds, call, x_MK.shape, x_MK.device, False), call),
    )
    return y, s, call if by_kernels else call._replace(fell_back=True)


def _kind(phase: str, call: Call, rows, a, b) -> tuple:
    """What kernels are compiled for, in words."""
    sizes = f"K {a[0].shape[1]}, N {len(b[0])}, ranks up to {max(call.ranks)}"
    adapters, drops = f"adapters {a[0].dtype}", f"dropout {call.drops}"
    return "mixed_lora_linear", phase, rows.device, call.dtype, sizes, adapters, drops


def _masks(seeds, call: Call, shape: tuple[int, int], device, needed: bool):
    """What the torch path drops in the place of the kernels: as they do, if they can say, which may be `needed`."""
    if seeds is None:
        return None
    path, kind = _path(True), ("mixed_lora_linear", "dropout", device)
    drawn = (seeds, call.samples, call.tokens, call.dropouts, tuple(shape), device)
    mask = mask_of_kernels(kind, needed, lambda: path.keep_mask(*drawn))
    if mask is None:  # the kernels may have one seed for all
        more = torch.arange(len(call.ranks), device=seeds.device)
        return seeds if len(seeds) == len(more) else seeds + more
    return torch_path.given_masks(mask, call.samples, call.tokens, [path.honoured(p) for p in call.dropouts])


def run_backward(dy_MN, x_MK, weight_NK, a, b, s, seeds, call: Call, needs: tuple[bool, ...]):
    """(dX, dW, dbias, [dA, ...], [dB, ...]), each None where `needs` (in this order) does not ask for it."""
    need_x, need_w, need_bias, need_a, need_b = needs
    dy, x, weight = cast(dy_MN, call.dtype), cast(x_MK, call.dtype), cast(weight_NK, call.dtype)

    def by(path, seeds):
        db, t = path.grad_b_and_t(dy, s, b, call, need_b, need_x or need_a)
        if not (need_x or need_a):
            return None, db, None
        da, dx = path.grad_a_and_x(dy, x, t, weight, a, seeds, call, need_a, need_x)
        return da, db, dx

    def by_torch_as_kernels():
        return by(torch_path, _masks(seeds, call, (len(dy), a[0].shape[1]), dy.device, not call.fell_back))

    if not (need_x or need_a or need_b):
        da = db = dx = None
    elif not call.triton:
        da, db, dx = by(torch_path, seeds)
    elif call.fell_back:
        da, db, dx = by_torch_as_kernels()
    else:
        (da, db, dx), _ = kernels_or_torch(
            lambda: _kind("backward", call, dy, a, b),
            call.demanded,
            lambda: by(_path(True), seeds),
            by_torch_as_kernels,
        )
    return dx, dy.t() @ x if need_w else None, dy.sum(0) if need_bias else None, da, db


def decide(x: Tensor, dtype: torch.dtype, rows, b, scalings, dropouts, patched: str | None) -> Call:
    """The call's numbers, and its backend by `dispatch`; without elements, or a rank, the torch path, as a kernel has
    no grid over nothing."""
    ranks = [each.shape[1] for each in b]
    width = max(ranks)
    something = x.numel() * min([each.numel() for each in b]) > 0
    triton = something and choose_backend(x, dtype, width, patched).backend == "triton"
    dx_dtype = dtype if x.dtype is dtype else widest(dtype, x)
    samples, tokens = samples_of(tuple(rows), len(ranks)), x.shape[:-1].numel() // len(rows)
    numbers = tuple(ranks), tuple(scalings), tuple(dropouts)
    return Call(samples, tokens, *numbers, dtype, dx_dtype, triton, triton and is_demanded(patched))


@functools.lru_cache(maxsize=64)
def _used(rows: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """(The places that rows name, in order, and for each row the place among these, or -1.) Not to be changed."""
    used = sorted({*rows} - {-1})
    return used, [used.index(g) if g >= 0 else -1 for g in rows]


def apply_mixed_lora(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, adapters: Sequence[Adapter | tuple],
    rows: Sequence[int], patched_backend: str | None = None,
) -> Tensor:  # fmt: skip
    """`mixed_lora_linear` for callers that have checked their tensors: autocast, dtypes, backend, shapes, `apply`.

    x is (B, ..., K) and `rows` has B integers, each the place of that sample's adapter in `adapters`, or -1. Exactly
    one of `weight` (N, K) and `residual` (B, ..., N) is given; `dropout` of an adapter is the probability in force.
    """
    compiling = torch.compiler.is_compiling()
    used, rows = (_used.__wrapped__ if compiling else _used)(tuple(rows))  # torch.compile warns of caches
    narrow = autocast_dtype(x)
    dtype = x.dtype if narrow is None or weight is None else narrow
    if weight is not None and narrow is None and weight.dtype != dtype:
        raise OpError(f"mixed_lora_linear: x is {dtype} but weight is {weight.dtype}; cast one, or use torch.autocast")
    if not used:
        return residual if weight is None else torch.nn.functional.linear(x, weight, bias)
    adapters = [Adapter(*adapters[g]) for g in used]
    wide = widest(dtype, *[matrix for each in adapters for matrix in (each.lora_A, each.lora_B)])
    matrices = [cast(each.lora_A, wide) for each in adapters], [cast(each.lora_B, wide) for each in adapters]
    numbers = [float(each.scaling) for each in adapters], [float(each.dropout) for each in adapters]
    if compiling:
        from fastpeft.ops._mixed_lora_linear_compiled import compiled_mixed_lora_linear

        tensors = (as_rows(x), weight, bias, None if residual is None else as_rows(residual))
        return of_rows(compiled_mixed_lora_linear(*tensors, *matrices, rows, *numbers, dtype, patched_backend), x)
    call = decide(x, dtype, rows, matrices[1], *numbers, patched_backend)
    with without_autocast(x):
        return applied(MixedLoraLinearFunction, x, weight, bias, residual, call, *matrices[0], *matrices[1])


def _check(x, weight, bias, lora_A, lora_B, scalings, rows, dropouts) -> None:
    """Raises OpError unless `mixed_lora_linear` can take these."""
    op = "mixed_lora_linear"
    counts = {"lora_A": lora_A, "lora_B": lora_B, "scalings": scalings, "dropouts": dropouts, "rows": rows}
    for name, given in counts.items():
        if not isinstance(given, list | tuple):
            raise OpError(f"{op}: {name} is of {type(given).__name__}; a list is needed")
        if name != "rows" and len(given) != len(lora_A):
            raise OpError(f"{op}: {name} has {len(given)} entries, lora_A has {len(lora_A)}; as many are needed")
    for each in zip(lora_A, lora_B, scalings, dropouts, strict=True):
        try:
            check_lora(x, weight, bias, *each)
        except OpError as error:
            raise OpError(str(error).replace("lora_linear", op, 1)) from error
    if not lora_A and not (isinstance(x, Tensor) and isinstance(weight, Tensor)):
        raise OpError(f"{op}: x and weight are no tensors, which are needed")
    if x.ndim < 2 or len(rows) != len(x):
        raise OpError(f"{op}: rows has {len(rows)} entries, x has shape {tuple(x.shape)}; one for each x[b] is needed")
    for g in rows:
        if not isinstance(g, int) or isinstance(g, bool) or not -1 <= g < len(lora_A):
            raise OpError(f"{op}: rows has {g!r}; -1, or the place of one of {len(lora_A)} adapters is needed")


def mixed_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scalings: Sequence[float],
    rows: Sequence[int],
    *,
    dropouts: Sequence[float] | None = None,
    training: bool = False,
) -> Tensor:
    """x Wᵀ + bias, and for a sample b with an adapter g = rows[b] also scaling·drop(x_b) Aᵀ Bᵀ, with the gradients of
    every argument that wants one.

    Args:
        x: (B, ..., K), any strides; fp32, fp16 or bf16 (fp64 on the torch backend).
        weight: (N, K) in x's dtype (any, under autocast); its gradient, if wanted, is the vendor's product.
        bias: (N,) or None.
        lora_A: of each adapter (r, K), r from 1 to 256 (beyond: the torch backend), each adapter's its own; x's dtype
            or a wider one, which is not rounded.
        lora_B: of each adapter (N, r), likewise.
        scalings: of each adapter alpha / r, or alpha / sqrt(r).
        rows: B integers: the place of each sample's adapter in these lists, or -1 for none.
        dropouts: of each adapter the probability that an element of x is left out of its term (none is 0 for all); see
            `lora_linear`.
        training: dropout acts only if True.

    Returns:
        (B, ..., N) in x's dtype, or autocast's.

    Raises:
        OpError (a ValueError): a shape, device, dtype or type does not fit, a number of entries, or a number in them.
        BackendError: the triton backend was demanded and cannot serve the call.
    """
    dropouts = [0.0] * len(lora_A) if dropouts is None else dropouts
    _check(x, weight, bias, lora_A, lora_B, scalings, rows, dropouts)
    in_force = dropouts if training else [0.0] * len(lora_A)
    return apply_mixed_lora(
        x, weight, bias, None, list(zip(lora_A, lora_B, scalings, in_force, strict=True)), rows
    )  # fmt: skip
