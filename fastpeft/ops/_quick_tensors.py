"""Tensors in a third of the time that torch.empty takes, most of which goes to reading its arguments, and views in two
thirds: by what torch has for its compiled code (inductor's), which is not public. None, and programs do without, where
that is missing or makes something else."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor


@functools.cache
def quick_empty(device_type: str) -> Callable[[tuple, tuple, torch.dtype], Tensor] | None:
    """Of a shape, strides and a dtype what torch.empty makes of the first and the last, on the current device."""
    try:
        from torch._C._dynamo import guards

        make = {"cpu": guards._empty_strided_cpu, "cuda": guards._empty_strided_cuda}.get(device_type)
        return make if make and _alike(make((2, 3), (3, 1), torch.float16), _model(device_type)) else None
    except (ImportError, TypeError, AttributeError):
        return None


@functools.cache
def quick_part() -> Callable[[Tensor, tuple, tuple, int], Tensor] | None:
    """Of a tensor, a shape, strides and an offset a tensor with its memory: autograd does not see that it is a view."""
    try:
        from torch._C._dynamo.guards import _reinterpret_tensor as take

        whole = torch.nn.Parameter(_model("cpu").fill_(1.0))
        part = take(whole, (2,), (3,), 1)
        view = whole.detach()[:, 1]
        return take if _alike(part, view) and part.data_ptr() == view.data_ptr() else None
    except (ImportError, TypeError, AttributeError):
        return None


def _model(device_type: str) -> Tensor:
    return torch.empty((2, 3), dtype=torch.float16, device=device_type)


def _alike(found: Tensor, expected: Tensor) -> bool:
    one, other = (
        (type(each), each.shape, each.stride(), each.dtype, each.device, each.requires_grad)
        for each in (found, expected)
    )
    return one == other
