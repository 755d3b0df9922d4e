"""What attention plus a gated softmax over a prompt is measured against, and ours: a table of named implementations.

Timed is what every layer does with queries, keys, values, prompt keys and values and a gate, forward and backward. Not
timed, being the same work for all or outside of the op: the projections that make them, RoPE and o_proj. HF peft
projects the queries (and the values, for nothing) a second time, and applies o_proj to both parts apart: its layer
costs more beside the floor than its row here says.
"""

import math

import torch
import torch.nn.functional as F

from .accuracy import Tensors
from .baselines import Implementation
from .gated_prompt_attention_truth import GatedInputs
from .harness import Call
from .prefix_attention_peers import build_floor, call_of, ours, peer
from .report import FLOOR


def build_peft(inputs: GatedInputs) -> Call:
    """peft's AdaptedAttention around transformers' sdpa_attention_forward, without projections."""
    leaves, (batch, heads, length, depth) = inputs.leaves(), inputs.q.shape
    times = heads // inputs.k.shape[1]

    def rows(t: torch.Tensor) -> torch.Tensor:
        """(Hkv, P, D), seen as the projection's (1, P, Hkv, D), to (B, H, P, D)."""
        t = t.transpose(0, 1)[None].repeat(batch, 1, 1, 1).transpose(1, 2)
        return torch.repeat_interleave(t, repeats=times, dim=1)

    def forward():
        q, k, v, pk, pv, gate = leaves.values()
        own = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=times > 1)
        own = own.transpose(1, 2).contiguous().reshape(batch, length, -1)
        scores = torch.matmul(q, rows(pk).transpose(2, 3)) / math.sqrt(depth)
        scores = gate.view(-1, 1, 1) * F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        of = torch.matmul(scores, rows(pv)).transpose(1, 2).reshape(batch, length, -1)
        return (own + of).view(batch, length, heads, depth).transpose(1, 2)

    return call_of(forward, leaves, inputs)


def _of_prompt(t: torch.Tensor, batch: int) -> torch.Tensor:
    return t.expand(batch, -1, -1, -1)


def build_sdpa(inputs: GatedInputs) -> Call:
    """What one writes by hand: SDPA for each set of keys, the second's result times the gate added."""
    leaves, grouped, batch = inputs.leaves(), inputs.q.shape[1] != inputs.k.shape[1], len(inputs.q)

    def forward():
        q, k, v, pk, pv, gate = leaves.values()
        own = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        of = F.scaled_dot_product_attention(q, _of_prompt(pk, batch), _of_prompt(pv, batch), enable_gqa=grouped)
        return own + gate.view(-1, 1, 1) * of

    return call_of(forward, leaves, inputs)


def build_flex(inputs: GatedInputs) -> Call:
    """FlexAttention for each set of keys, the gate and the sum in one compiled function with them."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    leaves, grouped, batch = inputs.leaves(), inputs.q.shape[1] != inputs.k.shape[1], len(inputs.q)
    length = inputs.q.shape[2]
    torch._dynamo.reset()  # every cell compiles the same code anew; dynamo gives up after eight such times
    blocks = create_block_mask(lambda b, h, i, j: j <= i, None, None, length, length, device=inputs.q.device)

    def attend(q, k, v, pk, pv, gate):
        own = flex_attention(q, k, v, block_mask=blocks, enable_gqa=grouped)
        of = flex_attention(q, _of_prompt(pk, batch), _of_prompt(pv, batch), enable_gqa=grouped)
        return own + gate.view(-1, 1, 1) * of

    compiled = torch.compile(attend, dynamic=False)
    return call_of(lambda: compiled(*leaves.values()), leaves, inputs)


def attend(inputs: GatedInputs, leaves: Tensors) -> torch.Tensor:
    from fastpeft.ops.gated_prompt_attention import gated_prompt_attention

    return gated_prompt_attention(*leaves.values())


IMPLEMENTATIONS = (
    Implementation(FLOOR, "causal SDPA over the sequence alone", build_floor),
    peer(
        "peft",
        "HF peft: SDPA, and eager softmax over a prompt repeated for all heads (second q_proj and o_proj not timed)",
        build_peft,
    ),
    peer("sdpa-twice", "SDPA for each set of keys, gate and sum by hand", build_sdpa),
    peer(
        "flex-twice",
        "FlexAttention for each set of keys, gate and sum, under torch.compile",
        build_flex,
        compiled=True,
    ),
    ours("fastpeft", "fastpeft, its own choice", attend=attend),
    ours(
        "fastpeft:fused",
        "Triton flash over the sequence, a kernel adds the gated prompt",
        backend="triton",
        strategy="fused",
        attend=attend,
    ),
    ours(
        "fastpeft:merge",
        "the vendor's flash over the sequence, a kernel adds the gated prompt",
        backend="triton",
        strategy="merge",
        attend=attend,
    ),
    ours("fastpeft:torch", "fastpeft, torch backend", backend="torch", attend=attend),
)
