"""Strategies: how a kernel meets the vendor's matrix product or flash attention, and which there are."""

from typing import NamedTuple

LORA_STRATEGIES = ("prewrite", "addmm", "augment", "fused", "persistent")
ATTENTION_STRATEGIES = ("fused", "merge", "concat")  # which can be forced; decode is for one query alone
GATED_STRATEGIES = ("fused", "merge")


class Plan(NamedTuple):
    """How a kernel meets the vendor's; of `lora_linear`, the rank-r terms and the base products x Wᵀ (forward) and dY W
    (backward).

    prewrite: a kernel writes the rank-r term, the vendor's product accumulates onto it (beta = 1). addmm: the vendor's
    product first, the rank-r term added to it. augment: one vendor's product [x|S]·[W|B]ᵀ or [dY|T]·[W;A], for which
    the operands are copied next to each other. fused: one Triton product carries both. persistent: so does one whose
    tiles travel by descriptors (TMA), for 16-bit data on CUDA from compute capability 9.0 on. Where rounding or dropout
    rule one out, the nearest stands in: forward, an fp32 term is always added last; backward, a masked one is
    prewritten; fused stands in for persistent where rows are not aligned to 16 bytes or the device has no descriptors.

    Of `prefix_attention`, where backward goes as forward. fused: the kernels attend to prefix and sequence. merge: the
    vendor's flash to the sequence, and a kernel merges the prefix into its result. concat: the vendor's flash to both,
    copied next to each other; chosen only where a GPU has measured it. decode, forward only: one query a sample, the
    keys split among programs. `gated_prompt_attention` has a softmax for each and so knows neither concat nor decode.

    source: "measured on <device>, <date>", or "predicted: " and the reason. reads: how often backward of `lora_linear`
    reads dY for dB and T; None is once up to the rank at which registers allow it, which 1 cannot raise.
    """

    forward: str
    backward: str
    source: str
    reads: int | None = None
