"""What autocast costs where it is not in force: as little as may be. The context that ends it takes four microseconds,
half of what an op's own Python takes; to ask whether it is needed takes a tenth of one."""

import contextlib

import torch

_AS_IT_IS = contextlib.nullcontext()


def device_type_of(tensor: torch.Tensor) -> str:
    """The type of its device, which torch puts together anew whenever it is asked."""
    return "cuda" if tensor.is_cuda else "cpu" if tensor.is_cpu else tensor.device.type


def is_autocast(tensor: torch.Tensor) -> bool:
    """Whether autocast is on for the tensor's device; torch refuses to say so of the meta device, which has none."""
    return not tensor.is_meta and torch.is_autocast_enabled(device_type_of(tensor))


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """What autocast has products of x computed in, or None where it leaves them alone."""
    if x.is_meta or x.dtype is torch.float64 or not torch.is_autocast_enabled(device_type := device_type_of(x)):
        return None
    return torch.get_autocast_dtype(device_type)


def without_autocast(tensor: torch.Tensor):
    """A context in which autocast casts nothing on the tensor's device."""
    return torch.autocast(device_type_of(tensor), enabled=False) if is_autocast(tensor) else _AS_IT_IS
