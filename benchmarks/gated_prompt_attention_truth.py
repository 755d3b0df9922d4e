"""The truth of attention plus a gated softmax over a prompt in float64, and the plain form in the data's dtype.

The two softmaxes share nothing but the queries, so each is the truth of `prefix_attention_truth` with one set of keys:
out = O_s + γ O_p, where the gradients of the prompt's are those for γ∘dout, and dγ = Σ dout∘O_p. The prompt's terms of
out and dq are judged alone too.
"""

import math
from dataclasses import dataclass, replace

import torch

from .accuracy import MAX_GAIN_ERROR, Expected, Tensors
from .prefix_attention_truth import LEAVES as OF_A_PREFIX
from .prefix_attention_truth import Inputs, PrefixTruth, Shared, eager_of, plain, truth_of

LEAVES = (*OF_A_PREFIX[:3], "prompt_key", "prompt_value", "gate")


@dataclass(kw_only=True)
class GatedInputs(Inputs):
    """As `Inputs`, whose prefix is the prompt; gate (1,) or (H,), in the data's dtype as in a model."""

    gate: torch.Tensor

    def leaves(self) -> Tensors:
        given = (*super().leaves().values(), self.gate.detach().clone().requires_grad_())
        return dict(zip(LEAVES, given, strict=True))


def _sequence(inputs: GatedInputs) -> Tensors:
    """{"out", "query"} as O_s and its part of dq, and the gradients of "key" and "value"."""
    base, tail = truth_of(replace(inputs, pk=inputs.pk[:, :0], pv=inputs.pv[:, :0]))
    return base | {name: tail[name] for name in ("key", "value")}


def _prompt(inputs: GatedInputs) -> Tensors:
    """{"out", "query"} as γ O_p and its part of dq, and the gradients of what the batch shares."""
    dout, gates = inputs.grad.double(), inputs.gate.double().view(-1, 1, 1)
    _, tail = truth_of(replace(inputs, k=inputs.k[:, :, :0], v=inputs.v[:, :, :0], grad=dout * gates))
    by_head = (tail["out"] * dout).sum((0, 2, 3))
    return {
        "out": tail["out"].mul_(gates),
        "query": tail["query"],
        "prompt_key": tail["prefix_key"],
        "prompt_value": tail["prefix_value"],
        "gate": by_head if len(inputs.gate) > 1 else by_head.sum(0, keepdim=True),
    }


def plain_gated(q, k, v, pk, pv, gate) -> torch.Tensor:
    """The materialised form for the heads of a group, as in `plain`; gate (1,) or (h,)."""
    own = plain(q, k, v, pk[:0], pv[:0], None)
    return own + gate.view(-1, 1, 1) * plain(q, k[:0], v[:0], pk, pv, None)


class GatedTruth(PrefixTruth):
    """Truth and eager's results for one cell, both made once."""

    part = "the prompt's part"

    def __init__(self, inputs: GatedInputs):
        own, self.tail = _sequence(inputs), _prompt(inputs)
        self.base = {name: own.pop(name) for name in ("out", "query")}
        self.tail |= own
        one = len(inputs.gate) == 1
        shared = {
            "prompt_key": Shared(inputs.pk),
            "prompt_value": Shared(inputs.pv),
            "gate": Shared(inputs.gate, lambda heads, g: slice(None) if one else heads),
        }
        self.eager = eager_of(inputs, shared, lambda heads, *tensors: plain_gated(*tensors))

    def expected(self, name: str) -> Expected:
        """How far eager is off in the few numbers of a gate's gradient is a matter of luck: the gain judges them, and
        an error as small as a gain's is good enough. The rounding of each number to its dtype is granted beside."""
        expected = super().expected(name)
        if name != "gate":
            return expected
        rounding, count = torch.finfo(expected.eager.dtype).eps / 2, expected.eager.numel()
        floor, gain_error = MAX_GAIN_ERROR + rounding, MAX_GAIN_ERROR + rounding / math.sqrt(count)
        return replace(expected, floor=floor, gain_error=gain_error)
