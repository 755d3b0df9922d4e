"""Gated prompts (LLaMA-Adapter): their keys and values out of a module's own frozen projections, without rotation."""

from torch import Tensor, nn
from torch.nn import functional as F

from fastpeft.errors import TargetError

PAIRS = (("k_proj", "v_proj"), ("key", "value"), ("k", "v"), ("key_proj", "value_proj"), ("k_lin", "v_lin"))
FUSED = ("query_key_value", "qkv_proj", "c_attn", "Wqkv")


def prompt_keys_and_values(module: nn.Module, prompt: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """(Hkv, P, D) each, of a prompt (1, P, hidden), for a module whose keys are (B, Hkv, T, D). A mixin for a class
    with a layout of its own has a method for it, `prompt_pair`: (1, P, hidden) -> two (1, Hkv, P, D)."""
    heads, depth = key.shape[1], key.shape[3]
    if hasattr(module, "prompt_pair"):
        return tuple(t[0].to(key.dtype) for t in module.prompt_pair(prompt))
    for names in PAIRS:
        if hasattr(module, names[0]):
            projected = [getattr(module, name)(prompt) for name in names]
            break
    else:
        projected = _of_fused(module, prompt, heads, depth)
    return tuple(t[0].unflatten(-1, (heads, depth)).transpose(0, 1).to(key.dtype) for t in projected)


def _of_fused(module: nn.Module, prompt: Tensor, heads: int, depth: int) -> tuple[Tensor, Tensor]:
    """Keys and values stand at the end of a fused projection (Phi-3, GPT-2, ModernBERT), or by head in threes
    (GPT-NeoX, GPT-BigCode with a key for each head)."""
    fused = next(getattr(module, each) for each in FUSED if hasattr(module, each))(prompt)
    if hasattr(module, "query_key_value") or getattr(module, "multi_query", None) is False:
        fused = fused.unflatten(-1, (heads, 3, depth))
        return fused[..., 1, :].flatten(-2), fused[..., 2, :].flatten(-2)
    return fused[..., -2 * heads * depth :].chunk(2, -1)


def check_projections(name: str, module: nn.Module, mixin: type) -> None:
    """Raises TargetError unless `prompt_keys_and_values` knows where the module's keys and values come from."""
    known = (*(pair[0] for pair in PAIRS), *FUSED)
    if not hasattr(mixin, "prompt_pair") and not any(hasattr(module, each) for each in known):
        children = [child for child, _ in module.named_children()]
        raise TargetError(
            f"{name} ({type(module).__name__}) cannot carry a gated prompt, whose keys and values come out of the "
            f"module's own projections: these are called {children}, and one of {sorted(known)} is known; use prefix "
            "tuning or LoRA"
        )


def gated_term(query: Tensor, key: Tensor, value: Tensor, gate: Tensor, scale: float | None) -> Tensor:
    """gate·softmax(scale·q kᵀ) v (B, H, S, D) alone: key, value (Hkv, P, D), which see no mask."""
    shared = (t[None].expand(len(query), -1, -1, -1) for t in (key, value))
    return gate.to(query.dtype) * F.scaled_dot_product_attention(query, *shared, scale=scale, enable_gqa=True)
