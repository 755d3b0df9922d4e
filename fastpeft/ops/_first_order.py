"""How the ops' Functions are called, and what their backward passes share: these have no derivatives of their own, and
say so."""

import functools
from collections.abc import Callable

import torch
from torch._C import _are_functorch_transforms_active as is_transformed
from torch._C._functorch import unwrap_if_dead
from torch.autograd import forward_ad

from fastpeft.errors import OpError
from fastpeft.ops._autocast import without_autocast


class _Nothing:
    """In the place of a Function's ctx where no gradient can be had: it keeps nothing."""

    def __init__(self, count: int):
        self.needs_input_grad = (False,) * count

    def save_for_backward(self, *tensors):
        pass

    def set_materialize_grads(self, value):
        pass


@functools.cache
def _nothing(count: int) -> _Nothing:
    """One for all calls of so many arguments, as none changes it."""
    return _Nothing(count)


@functools.cache
def _apply_of(function: type[torch.autograd.Function]) -> Callable:
    """What `function.apply` comes to outside of functorch's transforms."""
    return super(torch.autograd.Function, function).apply


def applied(function: type[torch.autograd.Function], *arguments, narrow: torch.dtype | None = None):
    """function.apply(*arguments), beyond autocast, which has had its say where there is a `narrow` dtype. While
    gradients are off it is its forward alone: autograd, which would find that out in five microseconds, is not asked.
    What else it refuses, tangents and transforms, it is shown. Otherwise it is asked without torch's own Python before
    it, which takes a few microseconds to look in every argument for a tensor that an ended transform of functorch has
    left behind: here the first alone may be one. torch.compile traces that."""
    if narrow is not None:
        with without_autocast(arguments[0]):
            return applied(function, *arguments)
    transformed = is_transformed()
    if transformed or torch.is_grad_enabled() or forward_ad._current_level >= 0:
        if transformed or torch.compiler.is_dynamo_compiling():
            return function.apply(*arguments)
        first, *others = arguments
        return _apply_of(function)(unwrap_if_dead(first) if isinstance(first, torch.Tensor) else first, *others)
    return function.forward(_nothing(len(arguments)), *arguments)


class _End(torch.autograd.Function):
    """The gradients of a backward pass, connected with all that they were computed from, so that whoever
    differentiates them comes to `backward`."""

    @staticmethod
    def forward(ctx, count: int, *tensors):
        return tuple(tensor.detach() for tensor in tensors[:count])

    @staticmethod
    def backward(ctx, *_):
        raise OpError(
            "fastpeft's ops have first derivatives only, and this asks for one of a gradient (create_graph=True); "
            "fastpeft.unpatch(model), or a model of HF peft's, has second ones"
        )


class _Read:
    """A context whose saved tensors have been read, which a checkpointed segment allows once."""

    def __init__(self, ctx):
        self.ctx, self.saved_tensors = ctx, ctx.saved_tensors

    def __getattr__(self, name: str):
        return getattr(self.ctx, name)


def first_order(backward: Callable) -> Callable:
    """For a Function's `backward(ctx, *dys)`: its operations are not recorded, and a derivative of its results raises
    OpError. torch's own once_differentiable cuts the results off, so that torch.autograd.grad passes them by in
    silence."""

    @functools.wraps(backward)
    def unrecorded(ctx, *dys):
        if not torch.is_grad_enabled():
            return backward(ctx, *dys)
        ctx = _Read(ctx)
        with torch.no_grad():
            grads = backward(ctx, *dys)
        alone = isinstance(grads, torch.Tensor)
        grads = (grads,) if alone else grads
        present = [grad for grad in grads if grad is not None]
        sources = [source for source in (*dys, *ctx.saved_tensors) if source is not None and source.requires_grad]
        if not sources:
            return grads[0] if alone else grads
        connected = iter(_End.apply(len(present), *present, *sources))
        grads = tuple(None if grad is None else next(connected) for grad in grads)
        return grads[0] if alone else grads

    return unrecorded
