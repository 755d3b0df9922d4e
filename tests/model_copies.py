"""Copies of a model in a quarter of the time of copy.deepcopy: the modules are pickled once, the tensors cloned."""

import io
import pickle

import torch


class Original:
    """A model to be copied often, and not to be changed. Nothing but tied tensors may share memory."""

    def __init__(self, model: torch.nn.Module):
        file = io.BytesIO()
        pickler = _Pickler(file)
        pickler.dump(model)
        self.modules, self.tensors = file.getvalue(), [*pickler.tensors.values()]
        memory = [tensor.untyped_storage().data_ptr() for tensor in self.tensors if tensor.numel()]
        assert len(memory) == len(set(memory)), "a view of another tensor"
        assert {type(tensor) for tensor in self.tensors} <= {torch.Tensor, torch.nn.Parameter}

    def copy(self) -> torch.nn.Module:
        return _Unpickler(self.modules, [*map(_cloned, self.tensors)]).load()


class _Pickler(pickle.Pickler):
    """Writes in the place of a tensor its number, the same wherever it is met."""

    def __init__(self, file):
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.tensors, self.numbers = {}, {}

    def persistent_id(self, value):
        if not isinstance(value, torch.Tensor):
            return None
        self.tensors[id(value)] = value  # which keeps it, and its id its own
        return self.numbers.setdefault(id(value), len(self.numbers))


class _Unpickler(pickle.Unpickler):
    def __init__(self, modules: bytes, tensors: list[torch.Tensor]):
        super().__init__(io.BytesIO(modules))
        self.tensors = tensors

    def persistent_load(self, number: int) -> torch.Tensor:
        return self.tensors[number]


def _cloned(tensor: torch.Tensor) -> torch.Tensor:
    clone = tensor.detach().clone()
    if type(tensor) is torch.nn.Parameter:
        return torch.nn.Parameter(clone, tensor.requires_grad)
    return clone.requires_grad_(tensor.requires_grad)
