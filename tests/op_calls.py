"""One call of every op in each of its forms, as a function of tensors that want gradients."""

import torch

from fastpeft.dispatch import Plan
from fastpeft.ops import (
    expert_lora_linear,
    gated_prompt_attention,
    lora_linear,
    lora_mlp,
    lora_projections,
    mixed_lora_linear,
    prefix_attention,
    prepend_prompt,
    prompt_embedding,
)
from fastpeft.ops.lora_mlp import Projection
from fastpeft.ops.lora_projections import apply_lora_projections


def leaf(*shape) -> torch.Tensor:
    return torch.randn(*shape, requires_grad=True)


def of_lora(x, weight, bias, a, b, **more):
    return lora_linear(x, weight, bias, a, b, 2.0, training=True, **more)


def of_mixed(x, weight, bias, *matrices, **more):
    return mixed_lora_linear(
        x, weight, bias, matrices[:2], matrices[2:], [1.0, 2.0], rows=[0, -1, 1], training=True, **more
    )


def of_experts(x, weight, bias, a, b, ends, **more):
    return expert_lora_linear(x, weight, bias, a, b, 2.0, ends, **more)


def of_projections(x, *tensors, **more):
    weights, biases, a, b = (tensors[i : i + 2] for i in range(0, 8, 2))
    return torch.cat(lora_projections(x, weights, biases, a, b, [1.0, 2.0], training=True, **more), -1)


def of_based_projections(x, *tensors, dropouts=(0.0, 0.0)):
    """On base products that somebody else has computed."""
    bases, a, b = (tensors[i : i + 2] for i in range(0, 6, 2))
    projections = list(map(Projection, bases, [None, None], a, b, [1.0, 2.0], dropouts))
    return torch.cat(apply_lora_projections(x, projections, based=True), -1)


def of_mlp(x, *tensors, dropouts=(0.0, 0.0, 0.0), **more):
    parts = [tensors[i : i + 4] for i in range(0, 12, 4)]
    projections = [Projection(*each, 2.0, p) for each, p in zip(parts, dropouts, strict=True)]
    return lora_mlp(x, *projections, training=True, **more)


def of_prefix(q, k, v, pk, pv, padding, **more):
    return prefix_attention(q, k, v, pk, pv, padding_mask=padding, training=True, **more)


def of_gated(q, k, v, pk, pv, gate, padding, **more):
    return gated_prompt_attention(q, k, v, pk, pv, gate, padding_mask=padding, training=True, **more)


def _linear(*matrices):
    return lambda: (leaf(3, 5, 16), leaf(24, 16), leaf(24), *(leaf(*shape) for shape in matrices))


def _attention(*gate, queries: int = 7):
    padding = torch.ones(2, 7, dtype=torch.bool)
    padding[0, 5:] = False
    shapes = ((2, 4, queries, 16), (2, 2, 7, 16), (2, 2, 7, 16), (2, 3, 16), (2, 3, 16), *gate)
    return lambda: (*(leaf(*shape) for shape in shapes), padding)


def _experts():
    """Three, of which the second has no rows; rank 2."""
    shapes = ((9, 16), (3, 24, 16), (3, 24), (6, 16), (24, 6))
    return *(leaf(*shape) for shape in shapes), torch.tensor([4, 4, 9])


def _projections():
    shapes = ((24, 16), (9, 16), (24,), (9,), (2, 16), (4, 16), (24, 2), (9, 4))
    return leaf(3, 5, 16), *(leaf(*shape) for shape in shapes)


def _based_projections():
    x, _, _, _, _, *matrices = _projections()
    return x, leaf(3, 5, 24), leaf(3, 5, 9), *matrices


def _mlp():
    """Ranks of gate, up and down 2, 4 and 3."""
    found = [leaf(3, 5, 16)]
    for inputs, outputs, rank in ((16, 24, 2), (16, 24, 4), (24, 16, 3)):
        found += [torch.randn(outputs, inputs), leaf(outputs), leaf(rank, inputs), leaf(outputs, rank)]
    return tuple(found)


LORA, MIXED = _linear((4, 16), (24, 4)), _linear((2, 16), (4, 16), (24, 2), (24, 4))
OPS = {  # name -> (the op, its tensors, its options, the plan that is forced)
    **{
        f"lora-{name}": (of_lora, LORA, {}, Plan(name, name, "test"))
        for name in ("fused", "prewrite", "addmm", "augment", "persistent")
    },
    "lora-dropout": (of_lora, LORA, {"dropout": 0.5}, None),
    "mixed": (of_mixed, MIXED, {}, None),
    "mixed-dropout": (of_mixed, MIXED, {"dropouts": [0.5, 0.0]}, None),
    "experts": (of_experts, _experts, {}, None),
    "projections": (of_projections, _projections, {}, None),
    "projections-dropout": (of_projections, _projections, {"dropouts": [0.5, 0.0]}, None),
    "projections-based": (of_based_projections, _based_projections, {"dropouts": (0.0, 0.5)}, None),
    "mlp": (of_mlp, _mlp, {}, None),
    "mlp-dropout": (of_mlp, _mlp, {"dropouts": [0.5, 0.0, 0.3], "recompute": True}, None),
    "prefix": (of_prefix, _attention(), {}, None),
    "prefix-window": (of_prefix, _attention(), {"sliding_window": 3}, None),
    "prefix-decode": (of_prefix, _attention(queries=1), {}, None),
    "prefix-dropout": (of_prefix, _attention(), {"dropout": 0.5}, None),
    "gated": (of_gated, _attention((1,)), {}, None),
    "prompt": (prompt_embedding, lambda: (torch.tensor([[1, 2, 3], [0, 4, 0]]), leaf(9, 16), leaf(3, 16)), {}, None),
    "prompt-start": (
        lambda rows, prompt, start: prepend_prompt(rows, prompt, start=start),
        lambda: (leaf(2, 5, 16), leaf(3, 16), torch.tensor([0, 2])),
        {},
        None,
    ),
}
