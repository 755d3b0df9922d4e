"""What adapters change of the base model in place: biases that they train, weights that the file of one replaces. What
these were before is kept, and whose they are."""

import contextlib
import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastpeft.config_base import PeftConfig


class Before(NamedTuple):
    """What a base parameter was, on the CPU, before the adapter `owner` changed it."""

    values: Tensor
    owner: str


def trains_biases(config: PeftConfig) -> bool:
    """Whether an adapter trains biases of the base model in place."""
    return getattr(config, "bias", "none") != "none"


def is_bias(name: str) -> bool:
    """HF peft's rule (0.21.2) for what `bias="all"` trains, by the whole name. T5's relative_attention_bias.weight and
    torch.nn.MultiheadAttention's in_proj_bias are none."""
    return name == "bias" or name.endswith(".bias")


def note(state, name: str, parameter: Tensor, owner: str) -> None:
    """Remember a base parameter that an adapter is about to change; `state` is the model's PatchState."""
    before = parameter.detach().to("cpu", copy=True)
    state.in_place.setdefault(name, Before(before, owner))
    if state.undo is not None:
        state.undo.append(functools.partial(parameter.copy_, before))


def give_back(model: nn.Module, state, owner: str | None = None) -> None:
    """Give the base parameters that an adapter (None: any) has changed their values from before."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    ours = [name for name, before in state.in_place.items() if owner in (None, before.owner)]
    with torch.no_grad():
        for name in ours:
            parameters[name].copy_(state.in_place.pop(name).values).requires_grad_(False)


@contextlib.contextmanager
def undone_on_failure(state):
    """Around what changes base parameters: if it fails, they are as they were."""
    known = dict(state.in_place)
    try:
        state.undo = []
        yield
        state.undo = None  # until here an interruption undoes everything
    except BaseException:
        with torch.no_grad():
            for undo in reversed(state.undo or ()):
                undo()
        state.in_place, state.undo = known, None
        raise
