"""A tiny model with two adapters that do different things, and what it computes with each."""

import torch

import fastpeft
from tests.models import batch, tiny
from tests.peft_pair import randomise, result

TARGETS = ["q_proj", "v_proj", "down_proj"]


def config(**settings) -> fastpeft.LoraConfig:
    return fastpeft.LoraConfig(**{"r": 4, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **settings})


def two(layers: int | None = None, **settings):
    """A model with the adapters a (active) and b, which do different things."""
    torch.manual_seed(11)
    model = fastpeft.patch(tiny(layers=layers), config(**settings), adapter_name="a")
    model.add_adapter("b", config(r=2, lora_alpha=6, target_modules=["q_proj", "up_proj"]))
    for name in ("b", "a"):
        model.set_adapter(name)
        randomise(model, seed=ord(name))
    return model


def outputs(layers: int | None = None) -> dict[tuple[str, ...], torch.Tensor]:
    """The logits of `two()` under each choice of adapters."""
    model = two(layers)
    found = {(): result(tiny(layers=layers), batch()).detach()}
    for names in (("a",), ("b",), ("a", "b")):
        model.set_adapter(list(names))
        found[names] = result(model, batch()).detach()
    assert all(not torch.allclose(found[x], found[y]) for x in found for y in found if x != y)
    return found


def trained(model) -> set[str]:
    """The adapters whose parameters want a gradient."""
    wanting = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all("lora_" in name for name in wanting)
    return {name.split(".")[-2] for name in wanting}
