"""The gated MLP of Llama and its like (GLU variants, Shazeer, arXiv 2002.05202), each of whose three frozen projections
may have a low-rank update (LoRA, arXiv 2106.09685, equation 3), as one op:

    g = x Wgᵀ + bg + sg·drop(x) Agᵀ Bgᵀ     u = x Wuᵀ + bu + su·drop(x) Auᵀ Buᵀ     h = act(g)⊙u
    y = h Wdᵀ + bd + sd·drop(h) Adᵀ Bdᵀ

With S = drop(z) Aᵀ and T = s·dY B of each projection, whose input is z and whose output has the gradient dY:

    dh = dy Wd + mask⊙(Td Ad)/(1 - p)      dg = dh⊙u⊙act'(g)      du = dh⊙act(g)
    dX = dg Wg + du Wu + mask⊙(Tg Ag)/(1 - p) + mask⊙(Tu Au)/(1 - p)      dA = Tᵀ drop(z)      dB = s·dYᵀ S

Saved for backward: x, g, u, the three S and seeds in place of the masks; with `recompute` x and S alone. h is made
again while dg and du are. Each projection has a mask of its own, as three separate layers have.
"""

import functools
import math
import operator
from typing import NamedTuple

import torch
from torch import Tensor

from fastpeft.dispatch import choose_backend
from fastpeft.errors import OpError
from fastpeft.fallback import is_demanded, kernels_or_torch, mask_of_kernels
from fastpeft.ops import _lora_mlp_torch as torch_path
from fastpeft.ops._autocast import autocast_dtype
from fastpeft.ops._first_order import applied, first_order
from fastpeft.ops._lora_linear_torch import given_mask
from fastpeft.ops._programs import LEARNED, Programs, backward_of, forward_of, known, learn
from fastpeft.ops.lora_linear import (
    DTYPES,
    Projection,
    _is_number,
    as_rows,
    cast,
    lora_linear_reference,
    of_rows,
    own_of_rows,
    widest,
)

# Letters of the shape suffixes: M rows (all leading dimensions of x), K inputs, H hidden features, N outputs, R rank.

ACTIVATIONS = tuple(torch_path.ACTIVATIONS)
SIDES = ("gate", "up", "down")


class Tensors(NamedTuple):
    """Of a projection, A and B in the dtype that all have in common."""

    weight: Tensor
    bias: Tensor | None
    a: Tensor | None
    b: Tensor | None


class Call(NamedTuple):
    """What a call computes besides its tensors. dropouts: the probabilities in force, 0 without LoRA. `dtype` is that
    of the products, `dx_dtype` that of the sum dX: x's, where autocast narrowed x. The last three as in
    `lora_linear`."""

    activation: str
    scalings: tuple[float, float, float]
    dropouts: tuple[float, float, float]
    dtype: torch.dtype
    dx_dtype: torch.dtype
    recompute: bool
    triton: bool
    demanded: bool = False
    fell_back: bool = False
    programs: Programs | None = None

    @property
    def by_kernels(self) -> bool:
        return self.triton

    @property
    def is_straight(self) -> bool:
        return self.triton or not any(self.dropouts)


class Needs(NamedTuple):
    """Which gradients are wanted: of x, and of each projection's bias, A and B. hidden: whether dg and du are; inner:
    whether g and u are, in backward."""

    x: bool
    bias: tuple[bool, bool, bool]
    a: tuple[bool, bool, bool]
    b: tuple[bool, bool, bool]
    hidden: bool
    inner: bool


def needs_of(x: bool, flat) -> Needs:
    """Of x, and of the flat sequence (of each projection weight, bias, A, B)."""
    bias, a, b = flat[1::4], flat[2::4], flat[3::4]
    hidden = x or True in (*bias[:2], *a[:2], *b[:2])
    return Needs(x, bias, a, b, hidden, hidden or a[2])


def activation_reference(name: str, gate: Tensor) -> Tensor:
    """act(gate), for autograd."""
    if name == "relu2":
        return torch.relu(gate).square()
    if name == "silu":
        return torch.nn.functional.silu(gate)
    return torch.nn.functional.gelu(gate, approximate="tanh" if name == "gelu_tanh" else "none")


def lora_mlp_reference(x, gate, up, down, activation="silu", keeps=None):
    """The definition, for autograd, as three separate layers compute it: projections as of `lora_mlp`, `keeps` a mask
    (M, inputs) or None of each, drawn with its probability of dropout."""
    keeps = keeps or (None, None, None)

    def layer(z, each, keep):
        if each.lora_A is None:
            return torch.nn.functional.linear(z, each.weight, each.bias)
        p = 0.0 if keep is None else each.dropout
        return lora_linear_reference(z, *each[:5], keep, p)

    hidden = activation_reference(activation, layer(x, gate, keeps[0])) * layer(x, up, keeps[1])
    return layer(hidden, down, keeps[2])


@functools.cache
def _path(triton: bool):
    if not triton:
        return torch_path
    from fastpeft.ops import _lora_mlp_triton as triton_path

    return triton_path


_NO_SEEDS = (None, None, None)


def draw_seeds(x: Tensor, call: Call) -> list[Tensor | None]:
    """A seed for each projection that drops, in the order of the projections."""
    draw = _path(call.triton).draw_seed
    return [draw(x) if p else None for p in call.dropouts]


class LoraMlpFunction(torch.autograd.Function):
    """flat: of each projection weight, bias, A, B; casting and choosing is before `apply`, and x is flattened inside,
    where autograd does not record it."""

    @staticmethod
    def forward(ctx, x, call: Call, *flat):
        wanted, seeds = ctx.needs_input_grad, draw_seeds(x, call) if any(call.dropouts) else _NO_SEEDS
        if not call.triton:
            seeds = list(map(torch_path.keeping, seeds, call.dropouts, [x.device] * 3))
        y, saved, fell_back = forward_of(call, wanted, _forward, (x, *flat, *seeds))
        if True in wanted:
            ctx.save_for_backward(*saved)
            ctx.call = call._replace(fell_back=True, programs=None) if fell_back else call
            ctx.input_dtype = x.dtype
        return y

    @staticmethod
    @first_order
    def backward(ctx, dy):
        return backward_of(ctx.call, ctx.needs_input_grad, _backward, (dy, *ctx.saved_tensors), ctx.input_dtype)


def _forward(x, *others):
    """(y, what backward reads, whether the kernels failed); others: `flat`, three seeds, the call, and whether each of
    `apply`'s arguments wants a gradient."""
    *tensors, call, wanted = others
    flat, seeds, needs = tensors[:12], tensors[12:], needs_of(wanted[0], wanted[2:])
    y, gate_MH, up_MH, s, call = run_forward(x, flat, seeds, call, needs)
    saved = kept(x, gate_MH, up_MH, s, flat, list(map(torch_path.kept, seeds)), call, needs)
    return own_of_rows(y, x), saved, call.fell_back


def _backward(dy, *others):
    """A gradient for each of `apply`'s arguments; others: what was saved, the call, what is wanted, and x's dtype."""
    *saved, call, wanted, dtype = others
    # What the op made is contiguous, as it was: a hook may have given it other strides.
    saved[1:6] = [each if each is None else each.contiguous() for each in saved[1:6]]
    dx, dbias, da, db = run_backward(as_rows(dy), saved, call, needs_of(wanted[0], wanted[2:]))
    dx = None if dx is None else own_of_rows(cast(dx, dtype), dy)
    gate, up, down = zip((None, None, None), dbias, da, db, strict=True)
    return dx, None, *gate, *up, *down


def kept(x, gate_MH, up_MH, s, flat, seeds, call: Call, needs: Needs) -> list[Tensor | None]:
    """What backward reads: x, g, u, three S, three seeds, and the twelve of `flat`."""
    again = call.recompute and needs.inner
    keep_products = needs.inner and not call.recompute
    s_needed = (needs.b[0] or again, needs.b[1] or again, needs.b[2])
    s_wanted = s if False not in s_needed else [each if need else None for each, need in zip(s, s_needed, strict=True)]
    products = (gate_MH, up_MH) if keep_products else (None, None)
    return [x if needs.a[0] or needs.a[1] or again else None, *products, *s_wanted, *seeds, *flat]


def _projections(flat, dtype: torch.dtype) -> tuple[Tensors, Tensors, Tensors]:
    """In the dtype of the products."""
    if any([each is not None and each.dtype is not dtype for each in (*flat[0::4], *flat[1::4])]):
        flat = [cast(each, dtype) if number % 4 < 2 else each for number, each in enumerate(flat)]
    return Tensors(*flat[:4]), Tensors(*flat[4:8]), Tensors(*flat[8:])


def run_forward(x, flat, seeds, call: Call, needs: Needs):
    """(y (..., N) or [M, N], g [M, H], u [M, H], the three S, the call as it was served) on the call's backend."""
    x, projections = cast(x, call.dtype), _projections(flat, call.dtype)
    keep = needs.inner and not call.recompute

    def by_torch(seeds):
        return torch_path.forward(as_rows(x), projections, seeds, call, keep)

    if not call.triton:
        return *by_torch(seeds), call
    found, by_kernels = kernels_or_torch(
        lambda: _kind("forward", call, x, projections),
        call.demanded,
        lambda: _path(True).forward(x, projections, seeds, call),
        lambda: by_torch(_masks(seeds, call, as_rows(x), projections, False)),
    )
    return *found, call if by_kernels else call._replace(fell_back=True)


def _kind(phase: str, call: Call, rows: Tensor, projections) -> tuple:
    """What kernels are compiled for, in words."""
    gate, _, down = projections
    ranks = "/".join("-" if each.a is None else str(len(each.a)) for each in projections)
    sizes = f"K {gate.weight.shape[1]}, H {len(gate.weight)}, N {len(down.weight)}, ranks {ranks}"
    adapter = f"adapter {adapter_dtype(projections)}"
    return "lora_mlp", phase, rows.device, call.dtype, call.activation, sizes, adapter, f"dropout {any(call.dropouts)}"


def adapter_dtype(projections) -> torch.dtype:
    """That of the matrices of LoRA."""
    return next(each.a.dtype for each in projections if each.a is not None)


def _masks(seeds, call: Call, rows: Tensor, projections, needed: bool):
    """What the torch path drops in the place of the kernels: as they do, if they can say, which may be `needed`."""
    if not any(call.dropouts):
        return seeds
    path, given, kind = _path(True), [], ("lora_mlp", "dropout", rows.device)
    for seed, p, each in zip(seeds, call.dropouts, projections, strict=True):
        drawn = None if seed is None else (seed, p, len(rows), each.a.shape[1], rows.device)
        mask = drawn and mask_of_kernels(kind, needed, functools.partial(path.keep_mask, *drawn))
        given.append(seed if mask is None else given_mask(mask, path.honoured(p)))
    return given


def run_backward(dy_MN, saved, call: Call, needs: Needs):
    """(dX, and of each projection dbias, dA, dB), each None where `needs` does not ask for it."""
    x, *products = saved[:3]
    s, seeds, projections = saved[3:6], saved[6:9], _projections(saved[9:], call.dtype)
    dy, x = cast(dy_MN, call.dtype), cast(x, call.dtype)

    def by_torch(seeds):
        x_MK = None if x is None else as_rows(x)
        return torch_path.backward(dy, x_MK, products, s, projections, seeds, call, needs)

    def by_torch_as_kernels():
        return by_torch(_masks(seeds, call, dy, projections, not call.fell_back))

    if not call.triton:
        found = by_torch(seeds)
    elif call.fell_back:
        found = by_torch_as_kernels()
    else:
        found, _ = kernels_or_torch(
            lambda: _kind("backward", call, dy, projections),
            call.demanded,
            lambda: _path(True).backward(dy, x, products, s, projections, seeds, call, needs),
            by_torch_as_kernels,
        )
    dx, da, db, *inner = found
    dbias = None, None, None
    if True in needs.bias:
        of_each = zip((*inner, dy), needs.bias, saved[10::4], strict=True)
        dbias = [grad.sum(0).to(bias.dtype) if need else None for grad, need, bias in of_each]
    return dx, dbias, da, db


def decide(x: Tensor, flat, activation: str, scalings, dropouts, dtype: torch.dtype, recompute: bool, patched) -> Call:
    """The call's numbers, and its backend by `dispatch`; without elements the torch path, as a kernel has no grid over
    nothing."""
    rank = max([a.shape[0] for a in flat[2::4] if a is not None])
    something = x.numel() * flat[0].numel() * flat[8].numel() * rank > 0  # x and the weights of gate and down
    triton = something and choose_backend(x, dtype, rank, patched).backend == "triton"
    dx_dtype = dtype if x.dtype is dtype else widest(dtype, x)
    demanded = triton and is_demanded(patched)
    dropouts = (0.0, 0.0, 0.0) if x.is_meta else tuple(dropouts)
    return Call(activation, tuple(scalings), dropouts, dtype, dx_dtype, recompute, triton, demanded)


def _widened(flat: list, dtype: torch.dtype) -> list:
    """With every A and B in the widest type of theirs and this."""
    wide = widest(dtype, *[each for each in flat[2::4] + flat[3::4] if each is not None])
    return [cast(each, wide) if number % 4 > 1 else each for number, each in enumerate(flat)]


def apply_lora_mlp(
    x: Tensor, gate: Projection, up: Projection, down: Projection, activation: str, *, recompute: bool = False,
    patched_backend: str | None = None,
) -> Tensor:  # fmt: skip
    """`lora_mlp` for callers that have checked their tensors: autocast, dtypes, backend, shapes, `apply`. The dropout
    of a projection is the probability in force."""
    flat = matrices = [*gate[:4], *up[:4], *down[:4]]
    given = [each for each in (x, *flat) if each is not None]
    missing = gate.bias is None, gate.lora_A is None, up.bias is None, up.lora_A is None, down.bias is None
    others = activation, recompute, missing, down.lora_A is None
    compiling = torch.compiler.is_compiling()
    if LEARNED and not compiling:
        asked = (gate.scaling, up.scaling, down.scaling), (gate.dropout, up.dropout, down.dropout), others
        if (found := known(LoraMlpFunction, given, patched_backend, asked)) is not None:
            return applied(LoraMlpFunction, x, found.call, *flat, narrow=found.narrow)
    scalings = tuple([1.0 if each.lora_A is None else float(each.scaling) for each in (gate, up, down)])
    dropouts = tuple([0.0 if each.lora_A is None else float(each.dropout) for each in (gate, up, down)])
    narrow = autocast_dtype(x)
    dtype = narrow or x.dtype
    for number, weight in enumerate(flat[0::4] if narrow is None else ()):
        if weight.dtype is not dtype:
            raise OpError(
                f"lora_mlp: x is {dtype} but {SIDES[number]}'s weight is {weight.dtype}; cast one, or use "
                "torch.autocast"
            )
    for matrix in flat[2::4] + flat[3::4]:
        if matrix is not None and matrix.dtype is not dtype:
            flat = _widened(flat, dtype)
            break
    if compiling:
        from fastpeft.ops._lora_mlp_compiled import compiled_lora_mlp

        numbers = list(scalings), list(dropouts)
        return of_rows(compiled_lora_mlp(as_rows(x), flat, activation, *numbers, dtype, recompute, patched_backend), x)
    call = decide(x, flat, activation, scalings, dropouts, dtype, recompute, patched_backend)
    if all(map(operator.is_, flat, matrices)):  # what is cast here, autograd records
        learn(LoraMlpFunction, given, patched_backend, (scalings, dropouts, others), call, narrow)
    return applied(LoraMlpFunction, x, call, *flat, narrow=narrow)


def _check(x, projections, activation: str) -> None:
    """Raises OpError unless `lora_mlp` can take these."""
    if activation not in ACTIVATIONS:
        raise OpError(f"lora_mlp: activation is {activation!r}; one of {', '.join(map(repr, ACTIVATIONS))} is needed")
    _check_tensor("x", x, x)
    if x.ndim == 0:
        raise OpError("lora_mlp: x of shape () is a scalar; its last dimension must be the inputs")
    inputs, inner = x.shape[-1], None
    for name, each in zip(SIDES, projections, strict=True):
        if not isinstance(each, Projection):
            raise OpError(f"lora_mlp: {name} is of {type(each).__name__}; a Projection is needed")
        if (each.lora_A is None) != (each.lora_B is None):
            raise OpError(f"lora_mlp: {name} has one of lora_A and lora_B; both or none are needed")
        outputs = inner if name == "up" else None
        inner = _check_projection(name, each, x, inputs, outputs)
        inputs = inner if name == "up" else inputs
    if all(each.lora_A is None for each in projections):
        raise OpError("lora_mlp: none of gate, up and down has lora_A and lora_B; at least one needs them")


def _check_projection(name: str, each: Projection, x: Tensor, inputs: int, outputs: int | None) -> int:
    """Its outputs, which must be as many as `outputs` if that is given."""
    sizes = {"N": outputs, "r": None}
    shapes = {"weight": ("N", inputs), "bias": ("N",), "lora_A": ("r", inputs), "lora_B": ("N", "r")}
    for field, shape in shapes.items():
        tensor = getattr(each, field)
        if tensor is None and field != "weight":
            continue
        _check_tensor(f"{name}'s {field}", tensor, x)
        expected = [size if isinstance(size, int) else sizes[size] or size for size in shape]
        fits = tensor.ndim == len(shape) and all(
            isinstance(want, str) or have == want for have, want in zip(tensor.shape, expected, strict=True)
        )
        if not fits:
            raise OpError(
                f"lora_mlp: {name}'s {field} has shape {tuple(tensor.shape)}, expected "
                f"({', '.join(map(str, expected))}) for x of shape {tuple(x.shape)}"
            )
        sizes.update({size: have for size, have in zip(shape, tensor.shape, strict=True) if isinstance(size, str)})
    if sizes["r"] == 0:
        raise OpError(f"lora_mlp: {name}'s lora_A and lora_B have rank 0; a rank of at least 1 is needed")
    if torch.is_grad_enabled() and each.weight.requires_grad:
        raise OpError(f"lora_mlp: {name}'s weight wants a gradient; it is taken as frozen, so freeze or detach it")
    if not _is_number(each.scaling) or not -math.inf < each.scaling < math.inf:
        raise OpError(f"lora_mlp: {name}'s scaling is {each.scaling!r}; a finite number is needed")
    if not _is_number(each.dropout) or not 0.0 <= each.dropout < 1.0:
        raise OpError(f"lora_mlp: {name}'s dropout is {each.dropout!r}; a probability in [0, 1) is needed")
    return each.weight.shape[0]


def _check_tensor(name: str, tensor, x) -> None:
    if not isinstance(tensor, Tensor):
        raise OpError(f"lora_mlp: {name} is of {type(tensor).__name__}; a tensor is needed")
    if tensor.is_meta and x.is_meta:
        raise OpError(f"lora_mlp: {name} is on the meta device and has no values; give it some")
    if tensor.device != x.device:
        raise OpError(f"lora_mlp: {name} is on {tensor.device}, x on {x.device}; move one of them")
    if tensor.dtype not in DTYPES:
        kind = "float32, float16, bfloat16 or float64" if tensor.is_floating_point() else "floating point"
        raise OpError(f"lora_mlp: {name} is {tensor.dtype}; {kind} is needed")


def lora_mlp(
    x: Tensor,
    gate: Projection,
    up: Projection,
    down: Projection,
    activation: str = "silu",
    *,
    training: bool = False,
    recompute: bool = False,
) -> Tensor:
    """down(act(gate(x))·up(x)), each projection z Wᵀ + bias + scaling·drop(z) Aᵀ Bᵀ, with the gradients of x and of
    every bias, A and B that wants one.

    Args:
        x: (..., K), any strides; fp32, fp16 or bf16 (fp64 on the torch backend).
        gate, up: of weight (H, K) in x's dtype (any, under autocast), frozen; see `Projection`. Ranks, scalings and
            probabilities differ as they like; a projection without LoRA has neither A nor B, but one of the three has.
        down: of weight (N, H), likewise.
        activation: "silu", "gelu" (exact), "gelu_tanh" or "relu2", the square of relu.
        training: dropout acts only if True.
        recompute: gate(x) and up(x) are computed once more in backward instead of being saved.

    Returns:
        (..., N) in x's dtype, or autocast's.

    Raises:
        OpError (a ValueError): a shape, device, dtype or type does not fit, a weight wants a gradient, a scaling is not
            finite, or a dropout is outside [0, 1).
        BackendError: the triton backend was demanded and cannot serve the call.
    """
    projections = (gate, up, down)
    _check(x, projections, activation)
    in_force = [each if training else each._replace(dropout=0.0) for each in projections]
    return apply_lora_mlp(x, *in_force, activation, recompute=recompute)
