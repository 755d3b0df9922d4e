"""How a LoRA's matrices begin. Draw for draw HF peft's order, so that one seed gives both the same weights.

The 16-bit rounding that HF's adapters go through on a half-precision base happens here too, in `place`.
"""

import math

import torch
from torch import nn

from fastpeft.errors import ConfigError, TargetError


def decomposes(init: bool | str | None) -> bool:
    """Whether an initialisation moves a part of the base weight into the adapter, so that the base changes too."""
    return isinstance(init, str) and (init == "olora" or init.startswith("pissa"))


def reset(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, init: bool | str, r: int) -> None:
    """A and B as `init_lora_weights` says: True (kaiming, as nn.Linear; B zero), "gaussian" (std 1/r; B zero), or
    False (both as nn.Linear's own draw left them, so the adapter is not neutral)."""
    if init is False:
        return
    if init == "gaussian":
        nn.init.normal_(a, std=1 / r)
    else:
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    nn.init.zeros_(b)
    if bias is not None:
        nn.init.zeros_(bias)


def pissa(weight_NK: torch.Tensor, r: int, scaling: float, init: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(A [r, K], B [N, r]) with scaling·B A the leading part of the weight's singular value decomposition (PiSSA,
    arXiv 2404.02948); "pissa_niter_N" approximates it with N subspace iterations. fp32."""
    weight = weight_NK.detach().float()
    if init == "pissa":
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        left, values, right = left[:, :r], values[:r], right[:r]
    else:
        left, values, right = torch.svd_lowrank(weight, r, niter=int(init.rsplit("_", 1)[1]))
        right = right.t()
    root = torch.sqrt(values / scaling)
    return torch.diag(root) @ right, left @ torch.diag(root)


def olora(weight_NK: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(A [r, K], B [N, r]) from the QR decomposition of the weight (OLoRA, arXiv 2406.01775). fp32."""
    q, upper = torch.linalg.qr(weight_NK.detach().float())
    return upper[:r].contiguous(), q[:, :r].contiguous()


def check_decomposition(name: str, weight: torch.Tensor, r: int, scaling: float, init: str) -> None:
    """Refuse what a decomposition of the base weight cannot give. Raises ConfigError, TargetError for the weight."""
    if weight.ndim != 2:
        raise ConfigError(f"init_lora_weights={init!r} decomposes a matrix; {name} is not a linear layer")
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ConfigError(f"init_lora_weights={init!r}: {name} has a weight of dtype {weight.dtype}; float is needed")
    if r > min(weight.shape):
        raise ConfigError(
            f"init_lora_weights={init!r}: r={r} exceeds the {min(weight.shape)} singular values of {name}; lower r"
        )
    if init != "olora" and not scaling > 0:
        raise ConfigError(
            f"init_lora_weights={init!r} divides by the scaling, which is {scaling:g} for {name}; set lora_alpha (or "
            "what alpha_pattern gives this layer) above 0"
        )
    if not torch.isfinite(weight).all():
        raise TargetError(f"init_lora_weights={init!r}: the weight of {name} has NaN or infinite values; load it again")
