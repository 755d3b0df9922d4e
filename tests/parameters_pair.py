"""Models with LoRA on parameters (`target_parameters`), HF peft's and ours, and their adapters' tensors."""

import torch
from torch import nn

import fastpeft
from tests.models import tiny
from tests.peft_pair import close, pair_of

EXPERTS = ["experts.down_proj", "experts.gate_up_proj"]
FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss")


def experts(family: str, how: str = "grouped_mm", dtype=torch.float32) -> nn.Module:
    model = tiny(family, dtype=dtype)
    model.set_experts_implementation(how)
    return model


def settings_for(**more) -> dict:
    both = {"target_modules": ["q_proj"], "target_parameters": EXPERTS, "task_type": "CAUSAL_LM"}
    return {"init_lora_weights": False, **both, **more}


def peft_pair(build, **more):
    """(peft's model, ours), their adapters the same and not neutral."""
    return pair_of(build, settings_for(**more))


def own(model: nn.Module, of: str = "data") -> dict[str, torch.Tensor]:
    """The adapter's tensors, or their gradients, by their names in peft's file."""
    if hasattr(model, "_fastpeft"):
        found = {
            f"base_model.model.{path}.{key}": each
            for path, layer in fastpeft.patching.layers(model)
            for key, each in layer.parameters_of("default").items()
        }
    else:
        found = {n.replace(".default", ""): each for n, each in model.named_parameters() if ".lora_" in n}
    return {name: getattr(each, of) for name, each in found.items()}


def assert_same_tensors(found: dict, expected: dict, rtol: float = 0.0) -> None:
    assert found.keys() == expected.keys() and expected
    for name, each in expected.items():
        if rtol:
            close(found[name], each, rtol)
        else:
            assert found[name].dtype == each.dtype and torch.equal(found[name], each), name


def patched(family: str, **more) -> nn.Module:
    torch.manual_seed(1)
    return fastpeft.patch(tiny(family), fastpeft.LoraConfig(**settings_for(**more)))


class Mixture(nn.Module):
    """Two matrices for each expert, multiplied in a way that nobody knows."""

    def __init__(self, transposed: bool | None):
        super().__init__()
        if transposed is not None:
            self.is_transposed = transposed
        self.up = nn.Parameter(torch.randn(3, 4, 6))
        self.down = nn.Parameter(torch.randn(3, 6, 4))
        self.gain = nn.Parameter(torch.randn(3, 4))

    def forward(self, x):
        return torch.bmm(torch.bmm(x.expand(3, -1, -1), self.up), self.down).mul(self.gain[:, None]).sum(0)


class Outer(nn.Module):
    def __init__(self, transposed: bool | None = None, task=None):
        super().__init__()
        torch.manual_seed(5)
        self.first, self.experts, self.table = nn.Linear(4, 4), Mixture(transposed), nn.Embedding(7, 4)

    def forward(self, ids):
        return self.experts(self.first(self.table(ids)))
