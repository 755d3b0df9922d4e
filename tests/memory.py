"""Bytes that a computation allocates and keeps, read from torch's dispatcher; no GPU and no sampling."""

import contextlib
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Allocations(TorchDispatchMode):
    """Every storage that comes into being within the block: `sizes` of all, in order, and the `peak` of those alive."""

    def __init__(self):
        super().__init__()
        self.sizes, self.live, self.peak = [], 0, 0
        self._seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for tensor in _tensors((args, kwargs)):
            self._know(tensor.untyped_storage())
        out = function(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            self._add(tensor.untyped_storage())
        return out

    def _know(self, storage):
        """What was made out of the dispatcher's sight, until another storage may come to lie there."""
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            weakref.finalize(storage, self._seen.discard, storage._cdata)

    def _add(self, storage):
        if storage._cdata in self._seen:
            return
        self._seen.add(storage._cdata)
        self.sizes.append(storage.nbytes())
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())

    def _free(self, address, size):
        self.live -= size
        self._seen.discard(address)  # another storage may come to lie there


def _tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


@contextlib.contextmanager
def saved_for_backward(*, besides=()):
    """Yields a dict from a storage's address to its bytes, of all that autograd saves within the block, each storage
    once, without those of the tensors in `besides`."""
    known = {tensor.untyped_storage().data_ptr() for tensor in besides}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved
