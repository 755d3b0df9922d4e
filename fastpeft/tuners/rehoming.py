"""Which layers' weights can have room beside them for their adapter's matrices, and who gives it to them."""

import torch
from torch import nn

from fastpeft.distributed import part_of
from fastpeft.ops._rooms import fits, room_of, with_room


def refusal(layer: nn.Module) -> str | None:
    """Why the weight of an adapted layer stays where it is, or None."""
    part = part_of(getattr(layer, "weight", None))
    if part is not None:
        return f"its weight {part}, and is whole in its layer's call alone"
    if not (hasattr(layer, "lone_adapter") and layer.plain_base()) or layer.matrix() is not layer.weight:
        return "it is no linear layer with a dense weight (N, K)"
    weight = layer.weight
    if weight.requires_grad:
        return "its weight is trained"
    if weight.is_meta or "_hf_hook" in layer.__dict__:
        return "its weight is elsewhere"
    own = weight.is_contiguous() and weight.untyped_storage().nbytes() == weight.numel() * weight.element_size()
    if not own and room_of(weight) is None:
        return "its weight is a part of another tensor"
    if not any(_takes(layer, name) for name in layer.lora_A):
        return f"no adapter of it is in {weight.dtype}"
    return None


def _takes(layer: nn.Module, name: str) -> bool:
    """Whether a product of the weight's dtype rounds nothing of the adapter."""
    return all(factor.dtype == layer.weight.dtype and not factor.is_meta for factor in layer.factors(name))


def give_room(layer: nn.Module) -> None:
    """For its adapters' ranks, unless there is as much already."""
    rank = max(layer.factors(name)[0].shape[0] for name in layer.lora_A if _takes(layer, name))
    if not fits(layer.weight, rank):
        layer.weight.data = with_room(layer.weight, rank)


def take_rooms(model: nn.Module) -> None:
    """Every parameter with room is in a storage of its own size again."""
    for parameter in model.parameters():
        if type(parameter) is nn.Parameter and type(parameter.data) is torch.Tensor and room_of(parameter) is not None:
            parameter.data = parameter.data.contiguous()
