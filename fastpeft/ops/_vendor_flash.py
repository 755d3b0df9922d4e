"""The vendors' flash attention, forward with its L and backward from any out and L: whichever aten serves.

For dense tensors without a mask, causal only where queries and keys begin together. L is natural everywhere; its layout
is not: cuDNN has [B, H, S, 1], the memory-efficient kernels pad S to a multiple of 32. Backward wants it contiguous.
Which vendor: predicted from torch's own order of preference, measured on no GPU yet.
"""

import torch
from torch import Tensor

aten = torch.ops.aten


def vendor_of(q: Tensor) -> str:
    """ "cpu", "cudnn", "flash" or "efficient", as torch's settings allow."""
    if q.device.type == "cpu":
        return "cpu"
    allowed, depth = torch.backends.cuda, q.shape[3]
    if torch.version.hip is None and torch.cuda.get_device_capability(q.device)[0] in (9, 10):
        deterministic = torch.are_deterministic_algorithms_enabled()
        if allowed.cudnn_sdp_enabled() and depth <= 128 and not deterministic:
            return "cudnn"
    return "flash" if allowed.flash_sdp_enabled() else "efficient"


def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """(out [B, H, S, D], L [B, H, S] in fp32, any strides)."""
    vendor = vendor_of(q)
    if vendor == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    if vendor == "cudnn":
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)
        return out, lse.view(q.shape[:3])
    if vendor == "flash":
        return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)[:2]
    k, v = _for_every_head(q, k), _for_every_head(q, v)
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=scale)
    return out, lse[..., : q.shape[2]]


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of the softmax whose weights are exp(score - L), L [B, H, S] contiguous."""
    vendor = vendor_of(q)
    if vendor == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, lse, 0.0, causal, scale=scale
        )
    none = torch.zeros(2, dtype=torch.int64, device=q.device)  # the state of a dropout that is not there
    lengths = (None, None, q.shape[2], k.shape[2])
    if vendor == "cudnn":
        return aten._scaled_dot_product_cudnn_attention_backward(
            dout, q, k, v, out, lse[..., None], none[0], none[1], None, *lengths, 0.0, causal, scale=scale
        )
    if vendor == "flash":
        return aten._scaled_dot_product_flash_attention_backward(
            dout, q, k, v, out, lse, *lengths, 0.0, causal, none, none[0], scale=scale
        )
    padded = torch.nn.functional.pad(lse, (0, -lse.shape[2] % 32), value=torch.inf)
    dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
        dout, q, _for_every_head(q, k), _for_every_head(q, v), None, out, padded, none[0], none[1], 0.0,
        [True, True, True, False], causal, scale=scale,
    )  # fmt: skip
    return dq, _over_the_group(dk, k), _over_the_group(dv, v)


def _for_every_head(q: Tensor, k: Tensor) -> Tensor:
    return k if k.shape[1] == q.shape[1] else k.repeat_interleave(q.shape[1] // k.shape[1], 1)


def _over_the_group(dk: Tensor, k: Tensor) -> Tensor:
    if dk.shape == k.shape:
        return dk
    return dk.unflatten(1, (k.shape[1], -1)).sum(2, dtype=torch.float32).to(k.dtype)
