"""The truth of attention over a prefix and a sequence in float64, and the plain form in the data's dtype.

With w the softmax over both sets of keys, the result is w_p Vp + w_s V, and dq is scale·(ds_p Kp + ds_s K): the terms
of the prefix are judged alone too, since a sequence of thousands of keys hides what a few virtual ones do. Nothing here
shares code with the op: the gradients are written out, and computed for one sample, one key head and some rows at a
time, so that 8192 tokens fit.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .accuracy import MAX_RMS_RATIO, SEED, Expected, Tensors, Verdict, judge, poison
from .harness import Call

LEAVES = ("query", "key", "value", "prefix_key", "prefix_value")
# fp32 sums in another order differ by tens of percent in their few roundings; this is far from any lower precision.
FP32_FLOOR = 1e-6
CHUNK_BYTES = 1 << 29  # of a matrix of weights in float64

# Letters of the shape suffixes: B batch, H query heads, G key heads, S queries and keys, P virtual keys, D head
# dimension, h heads of a group.


@dataclass
class Inputs:
    """Tensors of one cell: q, grad (B, H, S, D) and k, v (B, G, S, D), heads last but one in memory as models make
    them; pk, pv (G, P, D); slopes (H,) of ALiBi, or None. causal: a query sees no key behind its own."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    pk: torch.Tensor
    pv: torch.Tensor
    grad: torch.Tensor
    slopes: torch.Tensor | None = None
    causal: bool = True

    def leaves(self) -> Tensors:
        """Fresh leaves, strided as they are here."""
        tensors = (self.q, self.k, self.v, self.pk, self.pv)
        return {name: t.detach().clone().requires_grad_() for name, t in zip(LEAVES, tensors, strict=True)}


def scores(q, keys, prefix: int, first: int, slopes, causal: bool) -> torch.Tensor:
    """(h, rows, P + keys): query row i, at key position first + i, sees the prefix and keys up to its own, or all; the
    product is in q's dtype, the rest in fp32 or float64."""
    wide = torch.promote_types(q.dtype, torch.float32)
    found = (q @ keys.T).to(wide) * (1 / math.sqrt(q.shape[-1]))
    at = torch.arange(-prefix, len(keys) - prefix, device=q.device)
    if slopes is not None:
        found = found + slopes.to(wide)[:, None, None] * at
    if not causal:
        return found
    rows = first + torch.arange(q.shape[1], device=q.device)
    return found.masked_fill_(at > rows[:, None], -math.inf)


def plain(q, k, v, pk, pv, slopes, causal: bool = True) -> torch.Tensor:
    """The materialised form for the heads of a group: q (h, S, D), k, v (S, D), pk, pv (P, D)."""
    weights = torch.softmax(scores(q, torch.cat((pk, k)), len(pk), 0, slopes, causal), -1).to(q.dtype)
    return weights @ torch.cat((pv, v))


def groups_of(inputs: Inputs) -> Iterator[tuple[int, slice, int]]:
    """(sample, heads, key head) of every group."""
    share = inputs.q.shape[1] // inputs.k.shape[1]
    for b in range(len(inputs.q)):
        for g in range(inputs.k.shape[1]):
            yield b, slice(g * share, (g + 1) * share), g


def truth_of(inputs: Inputs) -> tuple[Tensors, Tensors]:
    """(base, tail): of out and query what the sequence and what the prefix contribute; of the others all, as tail."""
    q, k, pk = inputs.q, inputs.k, inputs.pk
    like = {"out": q, "query": q, "key": k, "value": k, "prefix_key": pk, "prefix_value": pk}
    base = {name: torch.zeros(q.shape, dtype=torch.float64, device=q.device) for name in ("out", "query")}
    tail = {name: torch.zeros(t.shape, dtype=torch.float64, device=q.device) for name, t in like.items()}
    keys = k.shape[2] + pk.shape[1]
    rows = max(1, min(q.shape[2], CHUNK_BYTES // (8 * keys * (q.shape[1] // k.shape[1]))))
    for b, heads, g in groups_of(inputs):
        for first in range(0, q.shape[2], rows):
            _add_rows(base, tail, inputs, (b, heads, g), slice(first, min(first + rows, q.shape[2])))
    return base, tail


def _add_rows(base: Tensors, tail: Tensors, inputs: Inputs, group: tuple[int, slice, int], rows: slice) -> None:
    """What these query rows contribute."""
    (b, heads, g), seen = group, slice(0, rows.stop if inputs.causal else None)
    prefix, scale = inputs.pk.shape[1], 1 / math.sqrt(inputs.q.shape[-1])
    q, dout = inputs.q[b, heads, rows].double(), inputs.grad[b, heads, rows].double()
    keys = torch.cat((inputs.pk[g], inputs.k[b, g, seen])).double()
    values = torch.cat((inputs.pv[g], inputs.v[b, g, seen])).double()
    slopes = None if inputs.slopes is None else inputs.slopes[heads]
    weights = torch.softmax(scores(q, keys, prefix, rows.start, slopes, inputs.causal), -1)
    out_of_prefix, out_of_sequence = weights[..., :prefix] @ values[:prefix], weights[..., prefix:] @ values[prefix:]
    delta = (dout * (out_of_prefix + out_of_sequence)).sum(-1, keepdim=True)
    slope = weights * (dout @ values.T - delta) * scale  # of the products q·k
    tail["out"][b, heads, rows] = out_of_prefix
    base["out"][b, heads, rows] = out_of_sequence
    tail["query"][b, heads, rows] = slope[..., :prefix] @ keys[:prefix]
    base["query"][b, heads, rows] = slope[..., prefix:] @ keys[prefix:]
    dkeys = (slope.transpose(1, 2) @ q).sum(0)
    dvalues = (weights.transpose(1, 2) @ dout).sum(0)
    tail["prefix_key"][g] += dkeys[:prefix]
    tail["prefix_value"][g] += dvalues[:prefix]
    tail["key"][b, g, seen] += dkeys[prefix:]
    tail["value"][b, g, seen] += dvalues[prefix:]


@dataclass(frozen=True)
class Shared:
    """A tensor that the batch shares, and which part of it belongs to a group (heads, key head)."""

    tensor: torch.Tensor
    of: Callable[[slice, int], Any] = lambda heads, g: g


def eager_of(inputs: Inputs, shared: dict[str, Shared], attend: Callable[..., torch.Tensor]) -> Tensors:
    """The result and the gradients of attend(heads, q, k, v, *shared) for each group, in the data's dtype. What the
    batch shares has its gradients summed in fp32 and rounded once."""
    tensors = {"out": inputs.q, "query": inputs.q, "key": inputs.k, "value": inputs.v}
    eager = {name: torch.empty_like(t) for name, t in tensors.items()}
    wide = torch.promote_types(inputs.q.dtype, torch.float32)
    sums = {name: torch.zeros(s.tensor.shape, dtype=wide, device=inputs.q.device) for name, s in shared.items()}
    for b, heads, g in groups_of(inputs):
        own = [inputs.q[b, heads], inputs.k[b, g], inputs.v[b, g], *(s.tensor[s.of(heads, g)] for s in shared.values())]
        own = [t.detach().requires_grad_() for t in own]
        out = attend(heads, *own)
        grads = torch.autograd.grad(out, own, inputs.grad[b, heads])
        eager["out"][b, heads], eager["query"][b, heads] = out.detach(), grads[0]
        eager["key"][b, g], eager["value"][b, g] = grads[1:3]
        for (name, s), grad in zip(shared.items(), grads[3:], strict=True):
            sums[name][s.of(heads, g)] += grad
    return eager | {name: total.to(shared[name].tensor.dtype) for name, total in sums.items()}


class PrefixTruth:
    """Truth and eager's results for one cell, both made once."""

    part = "the prefix's part"

    def __init__(self, inputs: Inputs):
        slopes = inputs.slopes

        def attend(heads, *own):
            return plain(*own, None if slopes is None else slopes[heads], inputs.causal)

        self.base, self.tail = truth_of(inputs)
        self.eager = eager_of(inputs, {"prefix_key": Shared(inputs.pk), "prefix_value": Shared(inputs.pv)}, attend)

    def expected(self, name: str) -> Expected:
        eager = self.eager[name]
        floor = FP32_FLOOR if eager.dtype == torch.float32 else 0.0
        label = name if name == "out" else f"d{name}"
        return Expected(label, eager, self.tail[name], self.base.get(name), floor)

    def verify(self, call: Call, max_rms_ratio: float = MAX_RMS_RATIO) -> Verdict:
        """The result of `call` and the gradients of its leaves, which must have this cell's values."""
        verdict = Verdict()
        poison([self.eager["out"], *self.eager.values()])
        torch.manual_seed(SEED)
        out, grads = call.run()
        for name, got in {"out": out.detach(), **dict(zip(call.leaves, grads, strict=True))}.items():
            judge(verdict, name, got, self.expected(name), max_rms_ratio, self.part)
        return verdict
