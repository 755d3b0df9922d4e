"""Quantised linear layers under an adapter: what must be known of another library's class, and where that is written.

Their forward is called and never replaced. Where the dense weight itself is needed (DoRA, merging, OLoRA's start, a
gradient that the library does not give), the library makes it, and nothing keeps it: in a forward and backward pass not
one tensor of N×K numbers outlives the layer that made it.

    fastpeft.quantised.register("mylibrary.MyLinear", Entry("mylibrary", dense=lambda module: module.unpack()))

serves a class of one's own; the known libraries' entries are in `fastpeft.integrations.quantised`.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastpeft.errors import PatchError
from fastpeft.ops._first_order import first_order

# Where quantised layers keep their numbers; the first that is there says where the layer is.
STORAGES = ("weight", "qweight", "W_q", "codes")


def _always(module: nn.Module) -> bool:
    return True


def _nothing(module: nn.Module) -> None:
    return None


@dataclass(frozen=True)
class Entry:
    """How one class of quantised linear layers is served. Each function gets the layer. The layer's forward gives a new
    tensor in every call, and draws no random numbers: `fastpeft.fuse` calls several layers' before it adds to any.

    library: what errors call it.
    features: (N, K), outputs and inputs; None reads out_features and in_features.
    dense: a new tensor (N, K), or one that is not written to, by the library's own means; None: there is none.
    requantised: (layer, weight (N, K)) -> attributes that give the layer this weight in its own format; they are
        set together, and their former values are put back to undo it. None: nothing can be merged.
    differentiable: whether the layer's forward, as it is now, gives x and the bias their gradients, without keeping a
        dense weight for that. Where it does not, dX = dY W with the weight made anew.
    refusal: why the layer cannot carry an adapter as it is now, or None.
    """

    library: str
    features: Callable[[nn.Module], tuple[int, int]] | None = None
    dense: Callable[[nn.Module], torch.Tensor] | None = None
    requantised: Callable[[nn.Module, torch.Tensor], dict[str, Any]] | None = None
    differentiable: Callable[[nn.Module], bool] = _always
    refusal: Callable[[nn.Module], str | None] = _nothing


_ENTRIES: dict[str, Entry] = {}
_PLAIN = (type(None), nn.Parameter, torch.Tensor)  # weights that are no library's class


def register(name: str, entry: Entry) -> None:
    """Serve a class of layers, and its subclasses, by an entry. `name` is its library's top-level package and the name
    of the class: of the module, or of the tensor that is its `weight` where the module is a torch.nn.Linear."""
    _ENTRIES[name] = entry
    _found.cache_clear()


def entry_of(module: nn.Module) -> Entry | None:
    """The entry that serves a module; None if it is no quantised linear layer that is known."""
    weight = module._parameters.get("weight") if isinstance(module, nn.Linear) else None
    return _found(type(module), None if type(weight) in _PLAIN else type(weight))


def is_quantised(weight: torch.Tensor) -> bool:
    """Whether a tensor is one of those that hold a quantised weight, of whatever module."""
    return hasattr(weight, "quant_state") or _found(type(None), type(weight)) is not None


@functools.cache
def _found(module: type, weight: type | None) -> Entry | None:
    from fastpeft.integrations.quantised import ENTRIES

    known = {**ENTRIES, **_ENTRIES}
    classes = (*module.__mro__, *(() if weight is None else weight.__mro__))
    names = (f"{each.__module__.partition('.')[0]}.{each.__qualname__}" for each in classes)
    return next((known[name] for name in names if name in known), None)


def features(module: nn.Module) -> tuple[int, int]:
    """(N, K) of a quantised layer."""
    own = entry_of(module).features
    if own is not None:
        return own(module)
    if hasattr(module, "outfeatures"):
        return module.outfeatures, module.infeatures
    return module.out_features, module.in_features


def storage(module: nn.Module) -> torch.Tensor:
    """The tensor that holds most of a linear layer, quantised or not. Raises PatchError if there is none."""
    for name in STORAGES:
        if isinstance(found := getattr(module, name, None), torch.Tensor):
            return found
    found = next(iter((*module.parameters(recurse=False), *module.buffers(recurse=False))), None)
    if found is None:
        raise PatchError(f"this {type(module).__name__} holds no tensor of its own, and one is needed")
    return found


def stand_in(module: nn.Module) -> torch.Tensor:
    """A tensor of the device and of a dtype that calls of a layer may have: a dense layer's weight itself."""
    found = storage(module)
    if not found.is_floating_point():
        return torch.empty(0, device=found.device)
    return found if found.itemsize > 1 else torch.empty(0, dtype=adapter_dtype(module), device=found.device)


def adapter_dtype(module: nn.Module) -> torch.dtype | None:
    """What HF peft (0.21.2) makes of an adapter's dtype before it widens half precision: the dtype that the layer says
    it computes in, else its storage's; None, which is torch's default, where that is no floating one."""
    dtype = module.compute_dtype if hasattr(module, "compute_dtype") else storage(module).dtype
    return dtype if dtype is not None and dtype.is_floating_point else None


@torch.no_grad()
def dense_weight(module: nn.Module) -> torch.Tensor:
    """W (N, K) of a quantised layer, by its own library, in the dtype that it gives. Not to be written to or kept.
    Raises PatchError if its library cannot make it."""
    entry = entry_of(module)
    if entry is None or entry.dense is None:
        library = "its library" if entry is None else entry.library
        raise PatchError(f"{library} does not say how to make the dense weight of a {type(module).__name__}")
    return entry.dense(module).detach()


class FrozenProduct(torch.autograd.Function):
    """y = x Wᵀ (+ bias), by whatever `product` does; dX = dY W with the weight that `dense()` makes in backward, so
    that it is not kept in between. A result that nothing uses costs backward nothing."""

    @staticmethod
    def forward(ctx, x, bias, dense: Callable[[], torch.Tensor], product: Callable[[torch.Tensor], torch.Tensor]):
        ctx.set_materialize_grads(False)
        ctx.dense, ctx.dtype = dense, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return product(x)

    @staticmethod
    @first_order
    def backward(ctx, dy):
        need_x, need_bias, _, _ = ctx.needs_input_grad
        dx = dbias = None
        if dy is None:
            return (None,) * 4
        with torch.autocast(dy.device.type, enabled=False):
            if need_x:
                dx = (dy @ ctx.dense().to(dy.dtype)).to(ctx.dtype)
            if need_bias:
                dbias = dy.flatten(0, -2).sum(0, dtype=ctx.bias_dtype)
        return dx, dbias, None, None


def call(module: nn.Module, forward: Callable[..., torch.Tensor], *args, **kwargs) -> torch.Tensor:
    """The result of `forward`, which is a layer's own and takes x first: with the gradients of x and the bias where it
    has none, or has them at the price of a dense weight kept. Of a layer that is not quantised it is plainly called."""
    entry, bias = entry_of(module), getattr(module, "bias", None)
    x = args[0] if args else next(iter(kwargs.values()), None)
    wanted = any(isinstance(each, torch.Tensor) and each.requires_grad for each in (x, bias))
    if entry is None or not wanted or not torch.is_grad_enabled() or entry.differentiable(module):
        return forward(*args, **kwargs)
    more = args[1:] if args else tuple(kwargs.values())[1:]
    named = kwargs if args else {}
    return FrozenProduct.apply(x, bias, functools.partial(dense_weight, module), lambda x: forward(x, *more, **named))
