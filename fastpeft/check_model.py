"""What the checks of whole models share: batches, one forward and backward, and the same in float64."""

import contextlib
import copy
from collections.abc import Iterator

import torch
from torch import nn

from fastpeft.check_batches import Batch, logits_and_loss, random_batch
from fastpeft.errors import FastpeftError
from fastpeft.local_model import task_of

Outcome = dict[str, torch.Tensor]  # "logits", and the gradient of each adapter parameter by its name


def batches(model: nn.Module, count: int, seed: int, room: int = 0, padded: bool = False) -> list[Batch]:
    """`count` batches of random tokens, for the model's task. room: of how many more positions the model is to have;
    padded: with a mask, and a causal model's padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    return [random_batch(model, task_of(type(model).__name__), generator, room, padded) for _ in range(count)]


def outcome(model: nn.Module, batch: Batch, named: dict[str, nn.Parameter]) -> Outcome:
    """Logits, and the gradients of these parameters, as far as they are used."""
    logits, loss = logits_and_loss(batch, model(**batch.inputs))
    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    used = {name: each for name, each in zip(named, gradients, strict=True) if each is not None}
    return {"logits": logits.detach(), **used}


def in_float64(model: nn.Module) -> nn.Module:
    """A copy. What transformers computes in fp32 whatever the dtype (norms, rotary angles) stays so, in all alike. The
    experts of a mixture are called one by one: torch's grouped product has no float64."""
    exact = copy.deepcopy(model).double()
    if callable(getattr(exact, "set_experts_implementation", None)):
        exact.set_experts_implementation("eager")
    return exact


@contextlib.contextmanager
def computing_in_float64() -> Iterator[None]:
    """Not every model can; then FastpeftError says so."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        raise FastpeftError(f"check: this model cannot be computed in float64, to compare with: {reason}") from error
