"""The learned table behind a prefix (prefix tuning, Li & Liang, arXiv 2101.00190, section 4.2), under HF peft's names.

One row for each virtual token, one block of columns for the keys and one for the values of each layer. With a
projection the rows are short and an MLP makes the blocks of them; a layer asks for its own blocks alone, so that each
is computed once a pass, in the layer that needs it, and recomputed there under gradient checkpointing.
"""

import inspect

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastpeft.distributed import check_gathered
from fastpeft.errors import PatchError
from fastpeft.tuners.layer import AdapterLayer, LayerState

TABLE = "prompt_embeddings"  # its name in HF peft's file; those of other stacks have theirs behind it


class PrefixEncoder(nn.Module):
    """P rows of `blocks` blocks of `width` columns. Drawn in the order of HF peft's: the table, then the layers."""

    def __init__(self, length: int, width: int, blocks: int, hidden: int | None = None, device=None):
        super().__init__()
        self.length, self.width, self.count = length, width, blocks
        if hidden is None:
            self.embedding = nn.Embedding(length, blocks * width, device=device)
        else:
            self.embedding = nn.Embedding(length, width, device=device)
            layers = (
                nn.Linear(width, hidden, device=device),
                nn.Tanh(),
                nn.Linear(hidden, blocks * width, device=device),
            )
            self.transform = nn.Sequential(*layers)
        self.left_behind = False  # whether the file it is from has a network, and this is the table alone
        self.parts = nn.ModuleDict()  # encoders of the same kind, for other stacks of the model

    @classmethod
    def over(cls, other: nn.Module, length: int, width: int, blocks: int) -> "PrefixEncoder":
        """One that computes with the children of another module, which have the same names."""
        view = cls.__new__(cls)
        nn.Module.__init__(view)
        view.length, view.width, view.count, view.left_behind = length, width, blocks, False
        view._modules.update(other._modules)
        view.parts = nn.ModuleDict()
        return view

    @torch.no_grad()
    def zero(self) -> None:
        """Zeros out of the encoder, which are not neutral: zero keys still take their share of the softmax."""
        last = self.transform[2].parameters() if self.projects else self.embedding.parameters()
        for parameter in last:
            parameter.zero_()
        for part in self.parts.values():
            part.zero()

    @property
    def projects(self) -> bool:
        return "transform" in self._modules

    def blocks(self, first: int, second: int) -> tuple[Tensor, Tensor]:
        """Two blocks of columns, (P, width) each."""
        if second == first + 1:
            return self.columns(first * self.width, (second + 1) * self.width).chunk(2, 1)
        return tuple(self.columns(block * self.width, (block + 1) * self.width) for block in (first, second))

    def columns(self, start: int, stop: int) -> Tensor:
        """These columns of the table."""
        rows = self.embedding.weight
        if "_hf_hook" in self.embedding.__dict__:  # accelerate, which may keep it elsewhere, brings it for a call
            rows = self.embedding(torch.arange(self.length))
        check_gathered("a prefix", rows)
        if not self.projects:
            return rows[:, start:stop]
        inner, activation, outer = self.transform
        if "_hf_hook" in outer.__dict__:
            return outer(activation(inner(rows)))[:, start:stop]
        check_gathered("the network of a prefix", outer.weight)
        return F.linear(activation(inner(rows)), outer.weight[start:stop], outer.bias[start:stop])

    def table(self) -> Tensor:
        """(P, blocks·width): what HF peft saves."""
        return self.columns(0, self.count * self.width)


def _no_cache(model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """In training a cache would only copy keys and values, and hide from the model that sequences are packed."""
    if model.training and torch.is_grad_enabled() and kwargs.get("past_key_values") is None:
        kwargs = {"use_cache": False, **kwargs}
    return args, kwargs


class PromptEncoders(AdapterLayer, nn.ModuleDict):
    """The encoders of all adapters with virtual tokens, by name: the model's child `prompt_encoder`, as in HF peft."""

    NAME = "prompt_encoder"

    def __init__(self, model_state):
        super().__init__()
        self._fastpeft = LayerState(model_state, type(self), None)
        self.hook = None

    @classmethod
    def of(cls, model: nn.Module, model_state) -> "PromptEncoders":
        """The model's, made now if it has none."""
        holder = model._modules.get(cls.NAME)
        if holder is None:
            holder = cls(model_state)
            takes_cache = "use_cache" in inspect.signature(model.forward).parameters
            model.add_module(cls.NAME, holder)
            if takes_cache:
                holder.hook = model.register_forward_pre_hook(_no_cache, with_kwargs=True)
        return holder

    def leave(self, model: nn.Module) -> None:
        """Undo what making the holder did to the model, and cease to be its child."""
        if self.hook is not None:
            self.hook.remove()
        del model._modules[self.NAME]

    def add_adapter(self, name: str, encoder: PrefixEncoder) -> None:
        self._modules[name] = encoder  # add_module takes no name of an attribute, such as "prefix"
        self._fastpeft.adapters[name] = encoder

    def delete_adapter(self, name: str) -> None:
        if name in self:
            del self[name]
        self._fastpeft.adapters.pop(name, None)

    def parameters_of(self, name: str) -> dict[str, nn.Parameter]:
        return dict(self[name].named_parameters())

    def file_tensors(self, name: str) -> dict[str, Tensor]:
        parts = self[name].parts.items()
        return {TABLE: self[name].table(), **{f"{TABLE}_{part}": each.table() for part, each in parts}}

    def prepare_merge(self, names) -> None:
        if held := [name for name in names if name in self]:
            kind = "prompt" if hasattr(self[held[0]], "rows") else "prefix"
            raise PatchError(f"{held[0]!r} is a {kind}, which no weight can hold; leave it out or keep it unmerged")

    def unmerge(self) -> None:
        """Nothing to do."""

    def __reduce_ex__(self, protocol):
        return nn.ModuleDict.__reduce_ex__(self, protocol)
