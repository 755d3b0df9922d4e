"""Frozen linear layers that share their input, each with a low-rank update of its own (LoRA, Hu et al., arXiv
2106.09685, equation 3): q, k and v of attention, gate and up of an MLP.

    y_p = x W_pᵀ + bias_p + s_p·drop_p(x) A_pᵀ B_pᵀ

With S_p = drop_p(x) A_pᵀ and T_p = s_p·dY_p B_p, drop_p(x) = mask_p⊙x/(1 - d_p):

    dX = Σ dY_p W_p + mask_p⊙(T_p A_p)/(1 - d_p)      dA_p = T_pᵀ drop_p(x)      dB_p = s_p·dY_pᵀ S_p

x is read once for every S and once for every dA, and dX is one sum, written in place, where single layers leave one dX
each to be added up. Masks are independent. All else is as in `lora_linear`. Where somebody else computes the base
products (of quantised weights), y_p is that product plus the low-rank term, and dX the sum of the low-rank terms alone.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastpeft.dispatch import Plan, choose_backend, lora_linear_plans
from fastpeft.errors import OpError
from fastpeft.fallback import is_demanded, kernels_or_torch, mask_of_kernels
from fastpeft.ops import _lora_projections_torch as torch_path
from fastpeft.ops._autocast import autocast_dtype
from fastpeft.ops._first_order import applied, first_order
from fastpeft.ops._lora_linear_torch import keeping, kept
from fastpeft.ops._programs import LEARNED, Programs, backward_of, forward_of, known, learn
from fastpeft.ops.lora_linear import (
    Projection,
    as_rows,
    based_reference,
    cast,
    cast_all,
    lora_linear_reference,
    of_rows,
    own_of_each,
    own_of_rows,
    widest,
)
from fastpeft.ops.lora_linear import _check as check_lora

# Letters of the shape suffixes: M rows (all leading dimensions of x), K inputs, N outputs, R rank.


class Call(NamedTuple):
    """What a call computes besides its tensors; `plans` are None on the torch path, the rest is as in `lora_linear`.
    based: the first quarter of its tensors are not weights, but the base products."""

    scalings: tuple[float, ...]
    dropouts: tuple[float, ...]
    dtype: torch.dtype
    dx_dtype: torch.dtype
    plans: tuple[Plan, ...] | None
    demanded: bool = False
    fell_back: bool = False
    based: bool = False
    programs: Programs | None = None

    @property
    def by_kernels(self) -> bool:
        return self.plans is not None

    @property
    def is_straight(self) -> bool:
        return self.plans is not None or not any(self.dropouts)

    def only(self, which: Sequence[int]) -> "Call":
        """The call of these projections."""
        plans = self.plans and tuple(self.plans[p] for p in which)
        scalings, dropouts = (tuple(each[p] for p in which) for each in (self.scalings, self.dropouts))
        return self._replace(scalings=scalings, dropouts=dropouts, plans=plans)


class Needs(NamedTuple):
    """Which gradients are wanted: of x, and of each projection's weight (or base product), bias, A and B."""

    x: bool
    weight: tuple[bool, ...]
    bias: tuple[bool, ...]
    a: tuple[bool, ...]
    b: tuple[bool, ...]


def lora_projections_reference(x, projections: Sequence[Projection], keeps=None, based: bool = False) -> list[Tensor]:
    """The definition, for autograd: x (..., K), keeps a (M, K) mask or None for each projection; `based` as below."""
    return [
        based_reference(p.weight, x, p.lora_A, p.lora_B, p.scaling, keep, p.dropout)
        if based
        else lora_linear_reference(x, p.weight, p.bias, p.lora_A, p.lora_B, p.scaling, keep, p.dropout)
        for p, keep in zip(projections, keeps or [None] * len(projections), strict=True)
    ]


@functools.cache
def _path(triton: bool):
    if not triton:
        return torch_path
    from fastpeft.ops import _lora_projections_triton as triton_path

    return triton_path


class LoraProjectionsFunction(torch.autograd.Function):
    """Casting and choosing is before `apply`; x and base products are flattened inside, where autograd does not record
    it. tensors: every weight (or base product), every bias, every A, every B. An output that nothing uses costs its
    backward nothing."""

    @staticmethod
    def forward(ctx, x, call: Call, *tensors):
        count = len(tensors) // 4
        biases = tensors[count : 2 * count]
        seeds = _path(call.plans is not None).draw_seeds(x, call.dropouts) if any(call.dropouts) else None
        if call.plans is None and seeds is not None:
            seeds = list(map(keeping, seeds, call.dropouts, [x.device] * count))
        wanted = ctx.needs_input_grad
        given = (x, *tensors) if seeds is None else (x, *tensors, *seeds)
        ys, saved, fell_back = forward_of(call, wanted, _forward, given)
        if True in wanted:
            ctx.save_for_backward(*saved)
            ctx.set_materialize_grads(False)
            ctx.call = call._replace(fell_back=True, programs=None) if fell_back else call
            ctx.dtypes = x.dtype, [None if bias is None else bias.dtype for bias in biases]
        return ys

    @staticmethod
    @first_order
    def backward(ctx, *dys):
        call, have = ctx.call, [p for p, dy in enumerate(dys) if dy is not None]
        if not have:
            return None, None, *(None for _ in range(4 * len(dys)))
        if len(have) < len(dys):
            call = call._replace(programs=None)
        return backward_of(call, ctx.needs_input_grad, _backward, (*dys, *ctx.saved_tensors), ctx.dtypes)


@functools.cache
def _needs(wanted: tuple[bool, ...]) -> Needs:
    """Of whether each of `apply`'s arguments wants a gradient."""
    return Needs(wanted[0], *_quarters(wanted[2:]))


def _forward(x, *others):
    """((y, ...), what backward reads, whether the kernels failed); others: what `apply` was given, seeds where anything
    drops, the call, and what is wanted."""
    *tensors, call, wanted = others
    count = len(call.scalings)
    bases, biases, a, b = _quarters(tensors[: 4 * count])
    seeds = tensors[4 * count :] or None
    ys, ss, call = run_forward(x, bases, biases, a, b, seeds, call)
    needs, nothing = _needs(wanted), (None,) * count
    for_x_or_a, for_w = needs.x or True in needs.a, not call.based and True in needs.weight
    saved = (
        x if for_w or True in needs.a else None,
        *(nothing if seeds is None else map(kept, seeds)),
        *(bases if needs.x and not call.based else nothing),
        *(a if for_x_or_a else nothing),
        *(b if for_x_or_a else nothing),
        *(s if need else None for s, need in zip(ss, needs.b, strict=True)),
    )
    return ys, saved, call.fell_back


def _backward(*given):
    """A gradient for each of `apply`'s arguments, of the dY of each projection and what was saved; dtypes: those of x
    and of the biases."""
    *tensors, call, wanted, dtypes = given
    count, needs = len(call.scalings), _needs(wanted)
    dys, x, *saved = tensors[:count], *tensors[count:]
    seeds, weights, a, b, ss = (saved[start : start + count] for start in range(0, 5 * count, count))
    ss = [s if s is None else s.contiguous() for s in ss]  # as they were: a hook may have given them other strides
    dx, dbases, dbiases, da, db = run_backward(dys, x, weights, a, b, ss, seeds, call, needs)
    like = next(dy for dy in dys if dy is not None)
    dx = None if dx is None else own_of_rows(cast(dx, dtypes[0]), like)
    return dx, None, *dbases, *map(cast, dbiases, dtypes[1]), *da, *db


def _quarters(tensors) -> tuple:
    count = len(tensors) // 4
    return tensors[:count], tensors[count : 2 * count], tensors[2 * count : 3 * count], tensors[3 * count :]


def run_forward(x, bases, biases, a, b, seeds, call: Call):
    """((y (..., N), ...), which are no views, (S [M, R], ...), the call as it was served) on the backend that
    `call.plans` stand for."""
    x, biases = cast(x, call.dtype), cast_all(biases, call.dtype)
    if not call.based:
        bases = cast_all(bases, call.dtype)
    if call.plans is None:
        ys, ss = torch_path.forward(x, bases, biases, a, b, seeds, call)
        return own_of_each(ys, x), ss, call
    tensors = (x, bases, biases, a, b)
    (ys, ss), by_kernels = kernels_or_torch(
        lambda: _kind("forward", call, x, a, b),
        call.demanded,
        lambda: _path(True).forward(*tensors, seeds, call),
        lambda: torch_path.forward(*tensors, _masks(seeds, call, as_rows(x).shape, x.device, False), call),
    )
    return own_of_each(ys, x), ss, call if by_kernels else call._replace(fell_back=True)


def _kind(phase: str, call: Call, rows, a, b) -> tuple:
    """What kernels are compiled for, in words."""
    sizes = [] if a[0] is None else [f"K {a[0].shape[1]}, N {[len(t) for t in b]}, ranks {[len(t) for t in a]}"]
    adapter = [] if a[0] is None else [f"adapters {a[0].dtype}"]
    return "lora_projections", phase, rows.device, call.dtype, *sizes, *adapter, f"dropout {any(call.dropouts)}"


def _masks(seeds, call: Call, shape: tuple[int, int], device, needed: bool):
    """What the torch path drops in the place of the kernels: as they do, if they can say, which may be `needed`."""
    if seeds is None:
        return None
    path, kind = _path(True), ("lora_projections", "dropout", device)
    masks = mask_of_kernels(kind, needed, lambda: path.keep_masks(seeds, call.dropouts, shape, device))
    return seeds if masks is None else torch_path.given_masks(masks, [path.honoured(p) for p in call.dropouts])


def run_backward(dys, x, weights, a, b, ss, seeds, call: Call, needs: Needs):
    """(dX [M, K], [dW, ...], [dbias, ...], [dA, ...], [dB, ...]) of dY (..., N), None where `needs` does not ask for
    it, or where dY is None, which not all may be. dW of a base product is as its dY."""
    count = len(dys)
    have = [p for p, dy in enumerate(dys) if dy is not None]
    if len(have) < count:
        dy, *tensors = ([each[p] for p in have] for each in (dys, weights, a, b, ss, seeds))
        some = Needs(needs.x, *(tuple(each[p] for p in have) for each in needs[1:]))
        dx, *found = run_backward(dy, x, *tensors, call.only(have), some)
        return dx, *(_put([None] * count, have, each) for each in found)
    dy, weight = cast_all(dys, call.dtype), cast_all(weights, call.dtype)
    x = cast(x, call.dtype)
    dx, dbias, da, db = _rank_grads(dy, x, weight, a, b, ss, seeds, call, needs)
    dw = [None] * count
    if True in needs.weight:
        of_each = zip(dys, dy, needs.weight, strict=True)
        dw = [_grad_of_base(given, each, x, call) if need else None for given, each, need in of_each]
    return dx, dw, dbias, da, db


def _grad_of_base(given, dy, x, call: Call) -> Tensor:
    """dW of a weight, of a base product dY as it was `given`."""
    return given if call.based else as_rows(dy).t() @ as_rows(x)


def _put(into: list, places: Sequence[int], values: Sequence) -> list:
    for place, value in zip(places, values, strict=True):
        into[place] = value
    return into


def _rank_grads(dy, x, weight, a, b, s, seeds, call: Call, needs: Needs):
    """(dX [M, K], [dbias, ...], [dA, ...], [dB, ...]) on the call's backend."""
    seeds = seeds if any(call.dropouts) else None
    for_x_or_a = needs.x or True in needs.a

    def by_torch(seeds):
        rows, x_MK = list(map(as_rows, dy)), None if x is None else as_rows(x)
        dbias = [each.sum(0) if need else None for each, need in zip(rows, needs.bias, strict=True)]
        return dbias, *torch_path.grads(rows, x_MK, weight, a, b, s, seeds, call, needs)

    def by_torch_as_kernels():
        shape = (len(as_rows(dy[0])), a[0].shape[1]) if for_x_or_a else None
        return by_torch(_masks(seeds, call, shape, dy[0].device, not call.fell_back) if for_x_or_a else None)

    if call.plans is None:
        dbias, dx, da, db = by_torch(seeds)
    elif call.fell_back:
        dbias, dx, da, db = by_torch_as_kernels()
    else:
        (dbias, dx, da, db), _ = kernels_or_torch(
            lambda: _kind("backward", call, dy[0], a, b),
            call.demanded,
            lambda: _path(True).grads(dy, x, weight, a, b, s, seeds, call, needs),
            by_torch_as_kernels,
        )
    return dx, dbias, da, db


def decide(x: Tensor, dtype: torch.dtype, a, b, scalings, dropouts, patched: str | None, based: bool) -> Call:
    """The call's numbers, and its backend by `dispatch`, as in `lora_linear`."""
    something = x.numel() and 0 not in [each.numel() for each in b]
    dx_dtype = dtype if x.dtype is dtype else widest(dtype, x)
    if not something or choose_backend(x, dtype, patched=patched).backend != "triton":
        drawn = (0.0,) * len(b) if x.is_meta else dropouts
        return Call(scalings, drawn, dtype, dx_dtype, None, False, False, based)
    plans = lora_linear_plans(x, dtype, a, b, dropouts)
    return Call(scalings, dropouts, dtype, dx_dtype, plans, is_demanded(patched), False, based)


def apply_lora_projections(
    x: Tensor, projections: Sequence[Projection], patched_backend=None, based: bool = False
) -> list[Tensor]:
    """`lora_projections` for callers that have checked their tensors: autocast, dtypes, backend, shapes, `apply`.

    based: `weight` is none, but the base product (..., N), which somebody else has computed; without a bias.
    """
    bases, biases, a, b, scalings, dropouts = zip(*projections, strict=True)
    given, missing = [x, *b, *a, *bases], [bias is None for bias in biases]
    if False in missing:
        given += [bias for bias in biases if bias is not None]
    compiling = torch.compiler.is_compiling()
    if LEARNED and not compiling:
        asked = scalings, dropouts, based, missing
        if (found := known(LoraProjectionsFunction, given, patched_backend, asked)) is not None:
            tensors = (*bases, *biases, *a, *b)
            return list(applied(LoraProjectionsFunction, x, found.call, *tensors, narrow=found.narrow))
    scalings, dropouts = tuple(map(float, scalings)), tuple(map(float, dropouts))
    narrow, matrices = autocast_dtype(x), (a, b)
    dtype = x.dtype if narrow is None or based else narrow
    for weight in bases if narrow is None and not based else ():
        if weight.dtype is not dtype:
            raise OpError(f"lora_projections: x is {dtype} but a weight is {weight.dtype}; cast one, or use autocast")
    for matrix in a + b:
        if matrix.dtype is not dtype:
            wide = widest(dtype, *a, *b)
            a, b = cast_all(a, wide), cast_all(b, wide)
            break
    if compiling:
        from fastpeft.ops._lora_projections_compiled import compiled_lora_projections

        flat = as_rows(x), tuple(map(as_rows, bases)) if based else bases
        ys = compiled_lora_projections(
            *flat, biases, a, b, list(scalings), list(dropouts), dtype, patched_backend, based
        )
        return [of_rows(y, x) for y in ys]
    call = decide(x, dtype, a, b, scalings, dropouts, patched_backend, based)
    if a is matrices[0] and b is matrices[1]:  # what is cast here, autograd records
        asked = scalings, dropouts, based, missing
        learn(LoraProjectionsFunction, given, patched_backend, asked, call, narrow)
    return list(applied(LoraProjectionsFunction, x, call, *bases, *biases, *a, *b, narrow=narrow))


def lora_projections(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None,
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    scalings: Sequence[float],
    *,
    dropouts: Sequence[float] | None = None,
    training: bool = False,
) -> list[Tensor]:
    """x W_pᵀ + bias_p + scaling_p·drop_p(x) A_pᵀ B_pᵀ for each projection p, with every gradient that is wanted.

    Args:
        x: (..., K), any strides; fp32, fp16 or bf16 (fp64 on the torch backend).
        weights: of each projection (N_p, K) in x's dtype (any, under autocast).
        biases: (N_p,) or None for each; None for no biases.
        lora_As, lora_Bs: (r_p, K) and (N_p, r_p), in x's dtype or a wider one, which is not rounded.
        scalings: alpha / r, or alpha / sqrt(r), for each.
        dropouts: for each the probability that an element of x is left out of its low-rank term; None for none. The
            masks are independent, and drawn again in backward.
        training: dropout acts only if True.

    Returns:
        For each projection (..., N_p) in x's dtype, or autocast's.

    Raises:
        OpError (a ValueError): the lists have different lengths or are empty, or `lora_linear` would refuse one.
        BackendError: the triton backend was demanded and cannot serve the call.
    """
    count = len(weights)
    biases = [None] * count if biases is None else biases
    dropouts = [0.0] * count if dropouts is None else dropouts
    given = {"biases": biases, "lora_As": lora_As, "lora_Bs": lora_Bs, "scalings": scalings, "dropouts": dropouts}
    for name, each in given.items():
        if len(each) != count:
            raise OpError(f"lora_projections: {len(each)} {name} for {count} weights; one for each is needed")
    if not count:
        raise OpError("lora_projections: no weights; at least one projection is needed")
    projections = list(map(Projection, weights, biases, lora_As, lora_Bs, scalings, dropouts))
    for number, each in enumerate(projections):
        try:
            check_lora(x, *each)
        except OpError as error:
            raise OpError(f"lora_projections: projection {number}: {error}") from None
    numbers = [(float(each.scaling), each.dropout if training else 0.0) for each in projections]
    return apply_lora_projections(
        x, [Projection(*each[:4], *own) for each, own in zip(projections, numbers, strict=True)]
    )
