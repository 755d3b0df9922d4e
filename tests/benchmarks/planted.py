"""Ops by their definition in float64, with one fault, for benches that must not print a speed of them."""

from collections.abc import Callable, Sequence

import torch

from benchmarks.baselines import Implementation
from benchmarks.harness import Call
from benchmarks.prefix_attention_peers import FLASH_RMS_RATIO


def planted(definition: Callable, names: Sequence[str], change: Callable) -> Implementation:
    """definition(*tensors) of leaves of these names; `change` gets (name, the result or a gradient) and may return
    another."""

    class Planted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):
            ctx.save_for_backward(*tensors)
            return change("out", definition(*(t.double() for t in tensors))).to(tensors[0].dtype)

        @staticmethod
        def backward(ctx, grad):
            with torch.enable_grad():
                leaves = [t.detach().double().requires_grad_() for t in ctx.saved_tensors]
                grads = torch.autograd.grad(definition(*leaves), leaves, grad.double())
            return tuple(change(name, g).to(grad.dtype) for name, g in zip(names, grads, strict=True))

    def build(inputs):
        leaves = inputs.leaves()
        return Call(lambda: Planted.apply(*leaves.values()), leaves, inputs.grad)

    return Implementation("planted", "planted", build, peer=False, rms_bound=FLASH_RMS_RATIO)


def on(wanted: str, do: Callable) -> Callable:
    """The change of one tensor alone."""
    return lambda name, t: do(t) if name == wanted else t
