"""Stacks whose layers share attention modules."""

from fastpeft.tuners.layer import Companion


class Numbering(Companion):
    """A stack that calls an attention module for several layers, and gives each call the number of its pass as
    `pass_number`, which goes through the layers to the attention function.

    Each kind of stack has `passes_of(stack)`: id of an attention module -> {number of a pass: the layer that the module
    is in it}.
    """

    prefix = "Numbered"
