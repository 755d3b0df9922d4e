"""How large the sums are of which a gated MLP's result and gradients are made: the error analysis behind its property.

In the letters of `fastpeft.ops.lora_mlp`, with the magnitude of every factor in its place: g and u are the sums of the
magnitudes of gate and up. A g that is wrong by ε·g makes h wrong by ε·act'(g)·g·u and dg by ε·dh·u·act''(g)·g, so such
terms count as if they were added up as well, each as often as a factor of a product may be wrong.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastpeft.ops import lora_linear_reference
from tests.ops.lora_mlp_cases import FIELDS, SIDES, Problem


class Activation(NamedTuple):
    """Bounds for |act|, |act'| and |act''| at any gate of at most this magnitude."""

    value: Tensor
    slope: Tensor | float
    bend: float


def activation_of(name: str, g: Tensor) -> Activation:
    if name == "relu2":
        return Activation(g.square(), 2 * g, 2.0)
    return Activation(g, 1.1, 0.5) if name == "silu" else Activation(g, 1.13, 0.8)


def _layer(z: Tensor, each, keep) -> Tensor:
    if each.lora_A is None:
        return torch.nn.functional.linear(z, each.weight, each.bias)
    return lora_linear_reference(z, *each[:5], keep, each.dropout)


def sizes_of(problem: Problem, keeps, least: float) -> dict[str, Tensor]:
    """Of the result and of every gradient, by the names of the problem's tensors. problem: in float64, of magnitudes
    alone, with the exact probabilities; least: what intermediate results are rounded to is a share of this, or more."""
    leaves = {name: t.detach().requires_grad_() for name, t in problem.tensors.items()}
    x, *projections = problem.with_leaves(leaves)
    g, u = (_layer(x, *each) + least for each in zip(projections[:2], keeps[:2], strict=True))
    gate, up = g.detach(), u.detach()
    act = activation_of(problem.activation, gate)
    # h itself, its rounding, what u adds to that, and what g does.
    h = ((3 * act.value + act.slope * gate) * up + least).requires_grad_()
    out = _layer(h, projections[2], keeps[2])
    own = [leaves[name] for side, field in _fields(2) if (name := f"{side}.{field}") in leaves]
    dh, *of_down = torch.autograd.grad(out, [h, *own], problem.dy)
    dh = dh + least
    dg = (4 * act.slope + act.bend * gate) * dh * up + least
    du = (3 * act.value + act.slope * gate) * dh + least
    others = [leaf for name, leaf in leaves.items() if not name.startswith(SIDES[2])]
    of_others = torch.autograd.grad([g, u], others, [dg, du])
    names = {id(leaf): name for name, leaf in leaves.items()}
    pairs = zip([*own, *others], [*of_down, *of_others], strict=True)
    return {"out": out.detach(), **{f"d{names[id(leaf)]}": grad for leaf, grad in pairs}}


def _fields(side: int) -> list[tuple[str, str]]:
    return [(SIDES[side], field) for field in FIELDS]
