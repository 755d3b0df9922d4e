"""Modules beside the attention that a prefix needs changed, and stacks whose layers share attention modules."""

from torch import nn

from fastpeft.errors import TargetError
from fastpeft.tuners.layer import AdapterLayer


class Companion(AdapterLayer):
    """A module that a prefix needs changed and that holds nothing of it; an adapter's entry is its number of virtual
    tokens."""

    does = "works for a prefix"  # what to say of it to one who targets it besides

    def add_adapter(self, name: str, *args, **kwargs) -> None:
        """What other tuners call, which find a layer of fastpeft here. Raises TargetError."""
        kind = self._fastpeft.original_class.__name__
        raise TargetError(f"adapter {name!r}: one of its targets is the {kind} {self.does}; leave it out")

    def parameters_of(self, name: str) -> dict:
        return {}

    def delete_adapter(self, name: str) -> None:
        self._fastpeft.adapters.pop(name, None)

    def prepare_merge(self, names) -> None:
        """Nothing to merge."""

    def unmerge(self) -> None:
        """Nothing to do."""


class Numbering(Companion):
    """A stack that calls an attention module for several layers, and gives each call the number of its pass as
    `pass_number`, which goes through the layers to the attention function."""

    prefix = "Numbered"
    does = "whose passes a prefix counts"

    @staticmethod
    def passes_of(stack: nn.Module) -> dict[int, dict[int, int]]:
        """id of an attention module -> {number of a pass: the layer that the module is in it}."""
        raise NotImplementedError
