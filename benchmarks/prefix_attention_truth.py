"""The truth of attention over a prefix and a sequence in float64, and the plain form in the data's dtype.

With w the softmax over both sets of keys, the result is w_p Vp + w_s V, and dq is scale·(ds_p Kp + ds_s K): the terms
of the prefix are judged alone too, since a sequence of thousands of keys hides what a few virtual ones do. Nothing here
shares code with the op: the gradients are written out, and computed for one sample, one key head and some rows at a
time, so that 8192 tokens fit.
"""

import math
from dataclasses import dataclass

import torch

from .accuracy import MAX_RMS_RATIO, SEED, Expected, Tensors, Verdict, judge, poison
from .harness import Call

LEAVES = ("query", "key", "value", "prefix_key", "prefix_value")
LABELS = {"out": "out", **{name: f"d{name}" for name in LEAVES}}
# fp32 sums in another order differ by tens of percent in their few roundings; this is far from any lower precision.
FP32_FLOOR = 1e-6
CHUNK_BYTES = 1 << 29  # of a matrix of weights in float64

# Letters of the shape suffixes: B batch, H query heads, G key heads, S queries and keys, P virtual keys, D head
# dimension, h heads of a group.


@dataclass
class Inputs:
    """Tensors of one cell: q, grad (B, H, S, D) and k, v (B, G, S, D), heads last but one in memory as models make
    them; pk, pv (G, P, D); slopes (H,) of ALiBi, or None."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    pk: torch.Tensor
    pv: torch.Tensor
    grad: torch.Tensor
    slopes: torch.Tensor | None = None

    def leaves(self) -> Tensors:
        """Fresh leaves, strided as they are here."""
        tensors = (self.q, self.k, self.v, self.pk, self.pv)
        return {name: t.detach().clone().requires_grad_() for name, t in zip(LEAVES, tensors, strict=True)}


def scores(q, keys, prefix: int, first: int, slopes) -> torch.Tensor:
    """(h, rows, P + keys): query row i, at key position first + i, sees the prefix and keys up to its own; the product
    is in q's dtype, the rest in fp32 or float64."""
    wide = torch.promote_types(q.dtype, torch.float32)
    found = (q @ keys.T).to(wide) * (1 / math.sqrt(q.shape[-1]))
    at = torch.arange(-prefix, len(keys) - prefix, device=q.device)
    if slopes is not None:
        found = found + slopes.to(wide)[:, None, None] * at
    rows = first + torch.arange(q.shape[1], device=q.device)
    return found.masked_fill_(at > rows[:, None], -math.inf)


def plain(q, k, v, pk, pv, slopes) -> torch.Tensor:
    """The materialised form for the heads of a group: q (h, S, D), k, v (S, D), pk, pv (P, D)."""
    weights = torch.softmax(scores(q, torch.cat((pk, k)), len(pk), 0, slopes), -1).to(q.dtype)
    return weights @ torch.cat((pv, v))


class PrefixTruth:
    """Truth and eager's results for one cell, both made once."""

    def __init__(self, inputs: Inputs):
        self.inputs = inputs
        self.tail, self.base, self.eager = {}, {}, {}
        self._make_truth()
        self._make_eager()

    def _groups(self):
        """(sample, heads, key head) of every group."""
        batch, heads, groups = len(self.inputs.q), self.inputs.q.shape[1], self.inputs.k.shape[1]
        share = heads // groups
        for b in range(batch):
            for g in range(groups):
                yield b, slice(g * share, (g + 1) * share), g

    def _make_truth(self) -> None:
        q, k, pk = self.inputs.q, self.inputs.k, self.inputs.pk
        self.base = {name: torch.zeros(q.shape, dtype=torch.float64, device=q.device) for name in ("out", "query")}
        like = {"out": q, "query": q, "key": k, "value": k, "prefix_key": pk, "prefix_value": pk}
        self.tail = {name: torch.zeros(t.shape, dtype=torch.float64, device=q.device) for name, t in like.items()}
        keys = k.shape[2] + pk.shape[1]
        rows = max(1, min(q.shape[2], CHUNK_BYTES // (8 * keys * (q.shape[1] // k.shape[1]))))
        for b, heads, g in self._groups():
            for first in range(0, q.shape[2], rows):
                self._add_rows(b, heads, g, slice(first, min(first + rows, q.shape[2])))

    def _add_rows(self, b: int, heads: slice, g: int, rows: slice) -> None:
        """What these query rows contribute; they see no key beyond their own."""
        inputs, seen = self.inputs, slice(0, rows.stop)
        prefix, scale = inputs.pk.shape[1], 1 / math.sqrt(inputs.q.shape[-1])
        q, dout = inputs.q[b, heads, rows].double(), inputs.grad[b, heads, rows].double()
        keys = torch.cat((inputs.pk[g], inputs.k[b, g, seen])).double()
        values = torch.cat((inputs.pv[g], inputs.v[b, g, seen])).double()
        slopes = None if inputs.slopes is None else inputs.slopes[heads]
        weights = torch.softmax(scores(q, keys, prefix, rows.start, slopes), -1)
        out_of_prefix, out_of_sequence = (
            weights[..., :prefix] @ values[:prefix],
            weights[..., prefix:] @ values[prefix:],
        )
        delta = (dout * (out_of_prefix + out_of_sequence)).sum(-1, keepdim=True)
        slope = weights * (dout @ values.T - delta) * scale  # of the products q·k
        self.tail["out"][b, heads, rows] = out_of_prefix
        self.base["out"][b, heads, rows] = out_of_sequence
        self.tail["query"][b, heads, rows] = slope[..., :prefix] @ keys[:prefix]
        self.base["query"][b, heads, rows] = slope[..., prefix:] @ keys[prefix:]
        dkeys = (slope.transpose(1, 2) @ q).sum(0)
        dvalues = (weights.transpose(1, 2) @ dout).sum(0)
        self.tail["prefix_key"][g] += dkeys[:prefix]
        self.tail["prefix_value"][g] += dvalues[:prefix]
        self.tail["key"][b, g, seen] += dkeys[prefix:]
        self.tail["value"][b, g, seen] += dvalues[prefix:]

    def _make_eager(self) -> None:
        """The prefix's gradients, which each sample has in the data's dtype, are summed in fp32 and rounded once."""
        inputs = self.inputs
        tensors = {"out": inputs.q, "query": inputs.q, "key": inputs.k, "value": inputs.v}
        self.eager = {name: torch.empty_like(t) for name, t in tensors.items()}
        wide = torch.promote_types(inputs.q.dtype, torch.float32)
        sums = {name: torch.zeros(inputs.pk.shape, dtype=wide, device=inputs.q.device) for name in LEAVES[3:]}
        for b, heads, g in self._groups():
            own = (inputs.q[b, heads], inputs.k[b, g], inputs.v[b, g], inputs.pk[g], inputs.pv[g])
            own = [t.detach().requires_grad_() for t in own]
            out = plain(*own, None if inputs.slopes is None else inputs.slopes[heads])
            grads = torch.autograd.grad(out, own, inputs.grad[b, heads])
            self.eager["out"][b, heads], self.eager["query"][b, heads] = out.detach(), grads[0]
            self.eager["key"][b, g], self.eager["value"][b, g] = grads[1:3]
            sums["prefix_key"][g] += grads[3]
            sums["prefix_value"][g] += grads[4]
        self.eager |= {name: total.to(inputs.pk.dtype) for name, total in sums.items()}

    def verify(self, call: Call, max_rms_ratio: float = MAX_RMS_RATIO) -> Verdict:
        """The result of `call` and the gradients of its leaves, which must have this cell's values."""
        verdict = Verdict()
        poison([self.eager["out"], self.eager["out"], self.eager["key"], self.eager["prefix_key"]])
        torch.manual_seed(SEED)
        out, grads = call.run()
        floor = FP32_FLOOR if out.dtype == torch.float32 else 0.0
        for name, got in {"out": out.detach(), **dict(zip(call.leaves, grads, strict=True))}.items():
            expected = Expected(LABELS[name], self.eager[name], self.tail[name], self.base.get(name), floor)
            judge(verdict, name, got, expected, max_rms_ratio, "the prefix's part")
        return verdict
