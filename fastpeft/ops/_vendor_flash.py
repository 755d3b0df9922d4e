"""The vendors' flash attention, forward with its L and backward from any out and L: whichever aten serves.

For dense tensors without a mask but the causal one, which ends at the bottom right: the last query sees the last key.
L is natural everywhere; its layout is not: cuDNN has [B, H, S, 1], the memory-efficient kernels pad S to a multiple of
32. Backward wants it contiguous. Which vendor: predicted from torch's own order of preference, measured on no GPU yet.
"""

import torch
from torch import Tensor

aten = torch.ops.aten
NO_MASK, BOTTOM_RIGHT = 0, 2  # the memory-efficient kernels' custom_mask_type


def vendor_of(q: Tensor, k: Tensor, causal: bool) -> str:
    """ "cpu", "cudnn", "flash" or "efficient", as torch's settings allow. cuDNN's causal mask begins at the top left;
    fp32 is served by "efficient" alone."""
    if q.device.type == "cpu":
        return "cpu"
    allowed, depth, half = torch.backends.cuda, q.shape[3], q.dtype != torch.float32
    aligned = not causal or q.shape[2] == k.shape[2]
    if half and aligned and torch.version.hip is None and torch.cuda.get_device_capability(q.device)[0] in (9, 10):
        deterministic = torch.are_deterministic_algorithms_enabled()
        if allowed.cudnn_sdp_enabled() and depth <= 128 and not deterministic:
            return "cudnn"
    return "flash" if half and allowed.flash_sdp_enabled() else "efficient"


def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """(out [B, H, S, D], L [B, H, S] in fp32), any strides."""
    vendor = vendor_of(q, k, causal)
    q, k, v = (_in_rows(t) for t in (q, k, v))
    if vendor == "cpu":
        causal, mask = _mask_on_cpu(q, k, causal)
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
    if vendor == "cudnn":
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)
        return out, lse.view(q.shape[:3])
    if vendor == "flash":
        return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)[:2]
    q, k, v = (t.transpose(1, 2) for t in (q, _for_every_head(q, k), _for_every_head(q, v)))
    kind = BOTTOM_RIGHT if causal else NO_MASK
    out, lse, *_ = aten._efficient_attention_forward(
        q, k, v, None, None, None, None, None, 0.0, kind, compute_log_sumexp=True, scale=scale
    )
    return out.transpose(1, 2), lse[..., : q.shape[1]]


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of the softmax whose weights are exp(score - L), L [B, H, S] contiguous."""
    vendor = vendor_of(q, k, causal)
    dout, q, k, v = (_in_rows(t) for t in (dout, q, k, v))
    if vendor == "cpu":
        causal, mask = _mask_on_cpu(q, k, causal)
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale
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
    given = (t.transpose(1, 2) for t in (dout, q, _for_every_head(q, k), _for_every_head(q, v)))
    dq, dk, dv, _ = aten._efficient_attention_backward(
        *given, None, out.transpose(1, 2), *lengths, padded, 0.0, none[0], none[1],
        BOTTOM_RIGHT if causal else NO_MASK, False, scale=scale,
    )  # fmt: skip
    dq, dk, dv = (t.transpose(1, 2) for t in (dq, dk, dv))
    return dq, _over_the_group(dk, k), _over_the_group(dv, v)


def _in_rows(t: Tensor) -> Tensor:
    """The vendors take any strides but that of the last dimension."""
    return t if t.stride(3) == 1 else t.contiguous()


def _mask_on_cpu(q: Tensor, k: Tensor, causal: bool) -> tuple[bool, Tensor | None]:
    """(whether the kernel's own causal mask serves, which begins at the top left; else numbers [S, T] to add)."""
    queries, keys = q.shape[2], k.shape[2]
    if not causal or queries == keys:
        return causal, None
    return False, q.new_full((queries, keys), -torch.inf).triu_(keys - queries + 1)


def _for_every_head(q: Tensor, k: Tensor) -> Tensor:
    return k if k.shape[1] == q.shape[1] else k.repeat_interleave(q.shape[1] // k.shape[1], 1)


def _over_the_group(dk: Tensor, k: Tensor) -> Tensor:
    if dk.shape == k.shape:
        return dk
    return dk.unflatten(1, (k.shape[1], -1)).sum(2, dtype=torch.float32).to(k.dtype)
