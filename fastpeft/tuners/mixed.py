"""LoRA layers on mixed batches: each sample of a call has the adapter that the call names for it, or none."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastpeft.distributed import check_gathered
from fastpeft.errors import PatchError
from fastpeft.ops.mixed_lora_linear import Adapter, apply_mixed_lora


class WrongRows(PatchError):
    """A layer's input, or result, has not a row for each sample for which a call has named an adapter; `layer` is the
    module."""

    def __init__(self, layer, what: str):
        self.layer, self.what = layer, what
        super().__init__(what)


def check_rows(layer, rows: Sequence[str], x, what: str = "an input") -> None:
    """Raises WrongRows unless x is a tensor whose first dimension has one sample for each name."""
    shape = x.shape if isinstance(x, Tensor) else ()
    if not shape or shape[0] != len(rows):
        raise WrongRows(
            layer, f"{what} of shape {tuple(shape)} has not the {len(rows)} samples of adapter_names, and needs them"
        )


def mixed_linear(layer, names: Sequence[str], rows: Sequence[str], input: Tensor, *args, **kwargs) -> Tensor:
    """The forward of a layer with `LinearArithmetic` of x (B, ..., K), for which `rows` names B adapters; `names` are
    those that the layer has, and another is none."""
    check_rows(layer, rows, input)
    fused = layer.plain_base() and not args and not kwargs
    result = None if fused else layer.base_forward(input, *args, **kwargs)
    adapters = []
    for name in names:
        a, b = layer.factors(name)
        check_gathered("a factor of LoRA", a, b)
        settings = layer.settings(name)
        adapters.append(Adapter(a, b, settings.scaling, layer.dropout_of(name)))
    places = [names.index(row) if row in names else -1 for row in rows]
    base = (layer.matrix(), layer.base_bias()) if fused else (None, None)
    result = apply_mixed_lora(input, *base, result, adapters, places, layer.backend())
    if any(layer.settings(name).bias for name in names):
        result = result + _biases(layer, names, places, result)
    return result


def _biases(layer, names: Sequence[str], places: Sequence[int], like: Tensor) -> Tensor:
    """(B, ..., N): scaling·bias of each sample's adapter, zero where that has none."""
    nothing = like.new_zeros(like.shape[-1])
    biases = []
    for name in names:
        settings = layer.settings(name)
        biases.append((settings.scaling * layer._bias_of(name)).to(like.dtype) if settings.bias else nothing)
    each = torch.stack([*biases, nothing])[[place % (len(names) + 1) for place in places]]
    return each.view(len(places), *(1,) * (like.ndim - 2), -1)


def mixed_one_by_one(
    layer, names: Sequence[str], rows: Sequence[str], input: Tensor, result: Tensor, add: Callable
) -> Tensor:
    """`result` (B, ...) with add(name, samples of the input, their result) in the place of each named sample's."""
    check_rows(layer, rows, input)
    for name in names:
        place = torch.tensor([b for b, row in enumerate(rows) if row == name], device=result.device)
        result = result.index_copy(0, place, add(name, input[place], result[place]).to(result.dtype))
    return result
