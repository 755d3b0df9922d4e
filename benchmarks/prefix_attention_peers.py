"""What attention over a prefix is measured against, and ours: a table of named implementations.

What a model makes once for all its layers (a mask, ALiBi's numbers, a block mask) is made before the clock runs; what
every layer does with a prefix is timed, forward and backward.
"""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F

from .accuracy import Tensors
from .baselines import Implementation, Missing, in_force
from .harness import Call
from .prefix_attention_truth import LEAVES, Inputs
from .report import FLOOR

ACTIVATIONS = LEAVES[:3]
# Flash attention in half precision adds up dk and dv block by block, on CPUs in half precision, over the heads of a
# group: 2.1 times eager's error at 512 tokens. Ours are made of it, and may have what it is commonly allowed.
FLASH_RMS_RATIO = 1.25
FLASH_PEER_RMS_RATIO = 4.0
# BLOOM adds ALiBi in the model's dtype: in bf16 a score near 64 is rounded by up to 0.25, 8 times eager's error here.
BLOOM_RMS_RATIO = 16.0
TORCH_UP_TO = 512  # tokens, of the torch backend on a GPU


def call_of(forward, leaves, inputs: Inputs, frozen=None, **options) -> Call:
    return Call(forward, leaves, inputs.grad, frozen or {}, activations=ACTIVATIONS, **options)


def build_floor(inputs: Inputs) -> Call:
    """SDPA without a prefix and without ALiBi."""
    leaves = {name: inputs.leaves()[name] for name in ACTIVATIONS}
    grouped = inputs.q.shape[1] != inputs.k.shape[1]

    def forward():
        return F.scaled_dot_product_attention(*leaves.values(), is_causal=inputs.causal, enable_gqa=grouped)

    return call_of(forward, leaves, inputs)


def expand_and_cat(prefix: torch.Tensor, sequence: torch.Tensor) -> torch.Tensor:
    """As peft and a DynamicCache make the keys: P rows for every sample, then the layer's own behind them."""
    batch = len(sequence)
    # peft looks every sample's rows up in an embedding, so each has its own copy before the cache makes another.
    return torch.cat((prefix.expand(batch, -1, -1, -1).contiguous(), sequence), 2)


def repeat_kv(t: torch.Tensor, times: int) -> torch.Tensor:
    batch, groups, length, depth = t.shape
    if times == 1:
        return t
    return t[:, :, None].expand(batch, groups, times, length, depth).reshape(batch, groups * times, length, depth)


def causal_mask(inputs: Inputs) -> torch.Tensor:
    """(S, P + S) bool, True where a query sees a key."""
    prefix, length = inputs.pk.shape[1], inputs.q.shape[2]
    return torch.ones(length, prefix + length, dtype=torch.bool, device=inputs.q.device).tril(prefix)


def build_peft(inputs: Inputs) -> Call:
    """transformers' sdpa_attention_forward on peft's cache."""
    leaves, times = inputs.leaves(), inputs.q.shape[1] // inputs.k.shape[1]
    mask = causal_mask(inputs).expand(len(inputs.q), 1, -1, -1).contiguous() if inputs.causal else None

    def forward():
        q, k, v, pk, pv = leaves.values()
        k, v = (repeat_kv(expand_and_cat(*pair), times) for pair in ((pk, k), (pv, v)))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.transpose(1, 2).contiguous().transpose(1, 2)

    return call_of(forward, leaves, inputs, {"mask": mask} if inputs.causal else {})


def build_bloom(inputs: Inputs) -> Call:
    """transformers' BloomAttention on peft's cache, between its two projections."""
    leaves, (batch, heads, length, depth) = inputs.leaves(), inputs.q.shape
    dtype, mask = inputs.q.dtype, causal_mask(inputs).expand(len(inputs.q), 1, -1, -1)
    keys = mask.shape[-1]
    at = torch.arange(keys, device=inputs.q.device)  # from 0 at the prefix, where ours begin at -P
    alibi = (inputs.slopes[:, None] * at).expand(batch, -1, -1).reshape(batch * heads, 1, keys).to(dtype)
    added = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)

    def forward():
        q, k, v, pk, pv = leaves.values()
        k, v = expand_and_cat(pk, k), expand_and_cat(pv, v)
        q, v = q.reshape(batch * heads, -1, depth), v.reshape(batch * heads, -1, depth)
        k = k.reshape(batch * heads, -1, depth).transpose(-1, -2)
        weights = alibi.baddbmm(q, k, beta=1.0, alpha=1 / math.sqrt(depth)).view(batch, heads, length, -1) + added
        weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype)
        out = torch.bmm(weights.view(batch * heads, length, -1), v).view(batch, heads, length, depth)
        return out.transpose(1, 2).contiguous().transpose(1, 2)

    return call_of(forward, leaves, inputs, {"alibi": alibi, "added": added})


def build_cat(inputs: Inputs) -> Call:
    """Design C: P rows in front of the keys, then a kernel whose causal mask, if any, ends at the bottom right."""
    from torch.nn.attention.bias import causal_lower_right

    leaves, grouped = inputs.leaves(), inputs.q.shape[1] != inputs.k.shape[1]
    length = inputs.q.shape[2]
    mask = causal_lower_right(length, length + inputs.pk.shape[1]) if inputs.causal else None

    def forward():
        q, k, v, pk, pv = leaves.values()
        k, v = (torch.cat((p.expand(len(t), -1, -1, -1), t), 2) for p, t in ((pk, k), (pv, v)))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)

    return call_of(forward, leaves, inputs)


def build_square(inputs: Inputs) -> Call:
    """P rows in front of the keys and P rows of zeros in front of the queries make a causal square."""
    leaves, grouped, prefix = inputs.leaves(), inputs.q.shape[1] != inputs.k.shape[1], inputs.pk.shape[1]

    def forward():
        q, k, v, pk, pv = leaves.values()
        k, v = (torch.cat((p.expand(len(t), -1, -1, -1), t), 2) for p, t in ((pk, k), (pv, v)))
        q = F.pad(q, (0, 0, prefix, 0))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)[:, :, prefix:]

    return call_of(forward, leaves, inputs)


def build_flex(inputs: Inputs) -> Call:
    """FlexAttention under torch.compile, over concatenated keys, with a block mask that sees the prefix."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    leaves, grouped, prefix = inputs.leaves(), inputs.q.shape[1] != inputs.k.shape[1], inputs.pk.shape[1]
    length, slopes = inputs.q.shape[2], inputs.slopes
    torch._dynamo.reset()  # every cell compiles the same code anew; dynamo gives up after eight such times
    sizes, blocks = (None, None, length, prefix + length), None
    if inputs.causal:
        blocks = create_block_mask(lambda b, h, i, j: j <= i + prefix, *sizes, device=inputs.q.device)
    compiled = torch.compile(flex_attention, dynamic=False)

    def alibi(score, b, h, i, j):
        return score + slopes[h] * (j - prefix)

    def forward():
        q, k, v, pk, pv = leaves.values()
        k, v = (torch.cat((p.expand(len(t), -1, -1, -1), t), 2) for p, t in ((pk, k), (pv, v)))
        return compiled(q, k, v, None if slopes is None else alibi, block_mask=blocks, enable_gqa=grouped)

    return call_of(forward, leaves, inputs)


def attend(inputs: Inputs, leaves: Tensors) -> torch.Tensor:
    from fastpeft.ops.prefix_attention import prefix_attention

    return prefix_attention(*leaves.values(), alibi_slopes=inputs.slopes, causal=inputs.causal)


def build_fastpeft(inputs: Inputs, *, backend: str = "auto", strategy: str | None = None, attend=attend) -> Call:
    """Ours: attend(inputs, leaves), an op of ours on them."""
    context = in_force(backend, strategy)
    from fastpeft.errors import BackendError

    if strategy and (reason := _refusal(strategy, inputs)):
        raise Missing(reason)
    leaves = inputs.leaves()

    def forward():
        try:
            return attend(inputs, leaves)
        except BackendError as error:
            raise Missing(str(error)) from error

    return call_of(forward, leaves, inputs, context=context)


def _refusal(strategy: str, inputs: Inputs) -> str | None:
    """Why the strategy cannot serve a cell, in dispatch's words."""
    from fastpeft.dispatch import strategy_refusal
    from fastpeft.ops._prefix_attention_scores import Scores, Tensors

    tensors = Tensors(inputs.q, inputs.k, inputs.v, inputs.pk[None], inputs.pv[None], None, None, None)
    return strategy_refusal(strategy, tensors, Scores(True, 1.0, 0, slopes_H=inputs.slopes), 0.0)


def _plain(inputs: Inputs) -> bool:
    return inputs.slopes is None


def ours(name: str, label: str, *, backend: str = "auto", strategy: str | None = None, attend=attend) -> Implementation:
    def build(inputs: Inputs) -> Call:
        return build_fastpeft(inputs, backend=backend, strategy=strategy, attend=attend)

    options = {"needs_gpu": backend == "triton", "peer": False, "rms_bound": FLASH_RMS_RATIO}
    if backend == "torch":
        options["serves"] = _in_torch
    return Implementation(name, label, build, strategy=strategy or backend, **options)


def _in_torch(inputs: Inputs) -> bool:
    """The torch backend works in blocks of a CPU's cache: thousands of launches for a long sequence on a GPU."""
    return not inputs.q.is_cuda or inputs.q.shape[2] <= TORCH_UP_TO


def _plan(inputs: Inputs) -> str:
    """The strategy that serves the cell on a GPU, and why."""
    if not inputs.q.is_cuda:
        return ""
    from fastpeft.dispatch import prefix_attention_plan
    from fastpeft.ops._prefix_attention_scores import Scores, Tensors

    tensors = Tensors(inputs.q, inputs.k, inputs.v, inputs.pk[None], inputs.pv[None], None, None, None)
    scores = Scores(causal=inputs.causal, scale=inputs.q.shape[-1] ** -0.5, start=0, slopes_H=inputs.slopes)
    plan = prefix_attention_plan(tensors, scores, 0.0)
    return "the torch backend" if plan is None else f"{plan.forward}, {plan.source}"


def peer(name: str, label: str, build, *, rms_bound: float = FLASH_PEER_RMS_RATIO, **options) -> Implementation:
    return Implementation(name, label, build, rms_bound=rms_bound, **options)


IMPLEMENTATIONS = (
    Implementation(FLOOR, "SDPA over the sequence alone", build_floor),
    peer("peft", "HF peft: rows expanded into a cache, keys repeated, SDPA with a mask", build_peft, serves=_plain),
    peer(
        "peft-bloom",
        "HF peft on BLOOM: rows expanded into a cache, eager attention",
        build_bloom,
        rms_bound=BLOOM_RMS_RATIO,
        serves=lambda inputs: not _plain(inputs),
    ),
    peer("cat-sdpa", "keys concatenated, SDPA, causal to the bottom right (design C)", build_cat, serves=_plain),
    peer(
        "square",
        "keys and queries padded in front to a causal square, SDPA",
        build_square,
        serves=lambda inputs: inputs.causal and _plain(inputs),
    ),
    peer("flex", "FlexAttention under torch.compile, keys concatenated", build_flex, compiled=True),
    replace(ours("fastpeft", "fastpeft, its own choice"), said=_plan),
    ours(
        "fastpeft:fused",
        "one Triton flash over prefix and sequence (design A)",
        backend="triton",
        strategy="fused",
    ),
    ours(
        "fastpeft:merge",
        "the vendor's flash over the sequence, a kernel merges the prefix (design B)",
        backend="triton",
        strategy="merge",
    ),
    ours(
        "fastpeft:concat",
        "the vendor's flash over concatenated keys, joined again in backward (design C)",
        backend="triton",
        strategy="concat",
    ),
    ours("fastpeft:torch", "fastpeft, torch backend", backend="torch"),
)
