"""What makes the host wait for a GPU, found on CPU tensors: operators whose results have a shape or a value that the
host must read, and Python's own readings of a tensor."""

import collections
import traceback
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parents[1]
_TORCH = Path(torch.__file__).parent

_aten = torch.ops.aten
OPERATORS = {
    *(_aten._local_scalar_dense.default, _aten.is_nonzero.default, _aten.equal.default, _aten.item.default),
    *(_aten.nonzero.default, _aten.nonzero_numpy.default, _aten.argwhere.default, _aten.masked_select.default),
    *(_aten._unique.default, _aten._unique2.default, _aten.unique_dim.default, _aten.unique_consecutive.default),
    *(_aten.unique_dim_consecutive.default, _aten.bincount.default, _aten.repeat_interleave.Tensor),
}
# Of which PyTorch reads the values where they are, without an operator that is seen here.
METHODS = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu, torch.Tensor.item, torch.Tensor.__array__}


class HostSync(TorchDispatchMode):
    """Within the block `found` counts what would wait, by the line of Python that asked: "fastpeft/calls.py:100"; lines
    of others only with `everywhere`. What an operator of ours does inside is seen; what a kernel does is not."""

    def __init__(self, everywhere: bool = False):
        super().__init__()
        self.found: collections.Counter[str] = collections.Counter()
        self.everywhere, self.functions = everywhere, _Methods(self)

    def __enter__(self):
        self.functions.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.functions.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in OPERATORS or _takes_by_mask(func, args) or _leaves_device(func, args, kwargs or {}):
            self.note()
        return func(*args, **(kwargs or {}))

    def note(self) -> None:
        """Count the innermost line that is not PyTorch's own."""
        for frame in reversed(traceback.extract_stack()):
            path = Path(frame.filename)
            if _TORCH in path.parents or path == Path(__file__):
                continue
            if ROOT in path.parents and path.relative_to(ROOT).parts[0] in ("fastpeft", "kernels"):
                self.found[f"{path.relative_to(ROOT)} {frame.name}"] += 1
            elif self.everywhere:
                self.found[f"{path.name} {frame.name}"] += 1
            return


class _Methods(TorchFunctionMode):
    def __init__(self, owner: HostSync):
        super().__init__()
        self.owner = owner

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in METHODS - {torch.Tensor.item}:  # which is seen as an operator
            self.owner.note()
        return func(*args, **(kwargs or {}))


def _takes_by_mask(func, args) -> bool:
    if func in (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default):
        return any(each is not None and each.dtype in (torch.bool, torch.uint8) for each in args[1])
    return False


def _leaves_device(func, args, kwargs) -> bool:
    if func is not _aten._to_copy.default or kwargs.get("device") is None:
        return False
    return torch.device(kwargs["device"]).type != args[0].device.type
