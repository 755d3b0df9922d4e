"""Models whose adapted projections compute together, what a step of them gives, and which ops that was made of."""

import copy

import peft
import pytest
import torch
from torch import nn

import fastpeft
from fastpeft.tuners import siblings
from tests.models import batch, tiny
from tests.peft_pair import quietly, randomise

LORA = {"target_modules": "all-linear", "r": 4, "lora_alpha": 8}
SIZES = [3, 2, 3, 2]  # of the ops of a call of Llama with two layers: q, k, v and gate, up


@pytest.fixture
def seen(monkeypatch) -> list[int]:
    """Of how many projections each op was that was made since."""
    sizes, shipped = [], siblings.apply_lora_projections

    def spy(x, projections, *more):
        sizes.append(len(projections))
        return shipped(x, projections, *more)

    monkeypatch.setattr(siblings, "apply_lora_projections", spy)
    return sizes


def adapted(way: str = "native", family: str = "llama", base: nn.Module | None = None, **settings) -> nn.Module:
    """A model in eval mode with an adapter that is not neutral, fastpeft's own or peft's under the patch; `base` in the
    place of the tiny model."""
    model = tiny(family) if base is None else base
    torch.manual_seed(11)
    if way == "native":
        model = quietly(fastpeft.patch, model, fastpeft.LoraConfig(**LORA | settings))
    else:
        model = quietly(peft.get_peft_model, model, peft.LoraConfig(task_type="CAUSAL_LM", **LORA | settings))
        model = quietly(fastpeft.patch, model)
    randomise(model)
    return model.eval()


@torch.no_grad()
def called(model: nn.Module) -> torch.Tensor:
    """The logits of a batch."""
    return model(**batch()).logits


def fused(model: nn.Module) -> nn.Module:
    """The model, whose calls go together from now on."""
    called(fastpeft.fuse(model, "projections"))
    return model


def pair(way: str = "native", **settings) -> tuple[nn.Module, nn.Module]:
    """(a model that goes together, the same model that does not)."""
    model = adapted(way, **settings)
    return fused(copy.deepcopy(model)), model


def outcome(model: nn.Module, seed: int = 5, **inputs) -> dict[str, torch.Tensor]:
    """Loss, logits and every gradient of a step under this seed."""
    model.zero_grad()
    torch.manual_seed(seed)
    output = model(**batch() | inputs)
    output.loss.backward()
    found = {"loss": output.loss.detach(), "logits": output.logits.detach()}
    return found | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_alike(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], rtol: float = 1e-5) -> None:
    """But for the rounding of sums."""
    assert found.keys() == expected.keys() and len(found) > 2
    greatest = max(float(each.abs().max()) for each in expected.values())
    for name, each in expected.items():
        scale = float(each.abs().max())
        torch.testing.assert_close(
            found[name],
            each,
            rtol=rtol,
            atol=rtol * max(scale, 1e-3 * greatest),
            msg=lambda text, name=name: f"{name}: {text}",
        )
