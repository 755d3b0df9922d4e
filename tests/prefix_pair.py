"""Prefix-tuned models of every tiny family, Hugging Face peft's and ours, and what is compared of the two."""

import inspect

import torch

import fastpeft
from tests.models import FAMILIES, MORE_FAMILIES, tiny
from tests.peft_pair import by_base_name, close, logits_of, pair_of, result

SEQ2SEQ = (
    *("t5", "mt5", "umt5", "bart", "mbart", "pegasus", "pegasus_x", "marian", "m2m_100", "plbart"),
    *("blenderbot", "blenderbot-small"),
)
ENCODERS = ("bert", "roberta", "electra", "xlm-roberta", "camembert")
REFUSED = ("xglm",)  # whose attention computes its scores itself
EVERY = tuple(family for family in (*FAMILIES, *MORE_FAMILIES) if family not in REFUSED)
DECODERS = tuple(family for family in EVERY if family not in SEQ2SEQ and family not in ENCODERS)

# What peft takes wrongly from these models' configurations, or does not find there.
SIZES = {
    "falcon-mq": {"num_attention_heads": 1, "token_dim": 8},
    "mpt": {"num_attention_heads": 4, "token_dim": 32, "num_layers": 2},
}
LENGTH = 5


def task_of(family: str) -> str:
    return "SEQ_2_SEQ_LM" if family in SEQ2SEQ else "SEQ_CLS" if family in ENCODERS else "CAUSAL_LM"


def settings_of(family: str, task: str | None = None, **settings) -> dict:
    return {"task_type": task or task_of(family), "num_virtual_tokens": LENGTH, **SIZES.get(family, {}), **settings}


def prefix_pair(family: str, task: str | None = None, dtype=torch.float32, **settings):
    """(peft's model, ours) with a prefix each, drawn from one seed."""
    task = task or task_of(family)
    return pair_of(lambda: tiny(family, task, dtype), settings_of(family, task, **settings), "PrefixTuningConfig")


def prefixed(family: str = "llama", task: str | None = None, base=None, seed: int = 11, **settings):
    """Our model with a prefix, in eval mode. `base`: in place of the tiny model."""
    task = task or task_of(family)
    base = tiny(family, task) if base is None else base
    torch.manual_seed(seed)
    return fastpeft.patch(base, fastpeft.PrefixTuningConfig(**settings_of(family, task, **settings))).eval()


def padded_left(inputs: dict) -> dict:
    """The same batch, turned around row by row, so that its padding is in front."""
    return {k: v.flip(1) if v.shape == inputs["attention_mask"].shape else v for k, v in inputs.items()}


def takes_positions(model: torch.nn.Module) -> bool:
    original = getattr(model, "_fastpeft", None)
    kind = type(model) if original is None else original.original_class
    return "position_ids" in inspect.signature(kind.forward).parameters


def with_positions(inputs: dict, start: int = 3) -> dict:
    """With explicit positions, from `start` on for real tokens."""
    return {**inputs, "position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0) + start}


def real(logits: torch.Tensor, inputs: dict) -> torch.Tensor:
    """The logits of real tokens, where there is one row of them for each token."""
    mask = inputs["attention_mask"].bool()
    return logits[mask] if logits.shape[:2] == mask.shape else logits


def tokens(model: torch.nn.Module, inputs: dict) -> torch.Tensor:
    """The logits of real tokens. What a causal model computes at padding behind them is another matter."""
    return real(result(model, inputs), inputs).detach()


def assert_within(found: torch.Tensor, expected: torch.Tensor, bound: float) -> None:
    """The greatest difference, relative to the greatest value."""
    error = float((found - expected).abs().max() / expected.abs().max())
    assert error <= bound, f"{error:.2e} of the greatest value; {bound:.0e} allowed"


def trained_gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The gradients of everything trainable, of which there must be some; nothing else may have one."""
    found = {}
    for name, parameter in by_base_name(model).items():
        assert parameter.requires_grad or parameter.grad is None, name
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            found[name] = parameter.grad
    assert any(grad.any() for grad in found.values())
    return found


def assert_same_prefix_step(hf, ours, inputs: dict, bound: float = 1e-6, slope_bound: float = 1e-5) -> None:
    """Loss, the logits of real tokens with gradients and without, and each gradient in the norm; a gradient that is one
    number, whose terms may cancel, beside the greatest one."""
    if "labels" in inputs and inputs["labels"].shape == inputs["attention_mask"].shape:
        inputs = {**inputs, "labels": inputs["labels"].masked_fill(inputs["attention_mask"] == 0, -100)}
    outputs = [model(**inputs) for model in (hf, ours)]
    close(outputs[1].loss, outputs[0].loss, bound)
    with torch.no_grad():
        for logits in (logits_of(outputs[1]), result(ours, inputs)):
            assert_within(real(logits, inputs), real(logits_of(outputs[0]), inputs), bound)
    for model, output in zip((hf, ours), outputs, strict=True):
        model.zero_grad()
        output.loss.backward()
    expected, found = trained_gradients(hf), trained_gradients(ours)
    assert found.keys() == expected.keys()
    greatest = max(float(grad.norm()) for grad in expected.values())
    for name, grad in expected.items():
        error, least = float((found[name] - grad).norm()), greatest * (0.3 if grad.numel() == 1 else 0.1)
        assert error <= slope_bound * max(float(grad.norm()), least), (name, error, float(grad.norm()))


def step_gradients(model: torch.nn.Module, inputs: dict, **more) -> dict[str, torch.Tensor]:
    """Of one training step, in train mode."""
    model.train()
    model.zero_grad()
    model(**inputs, **more).loss.backward()
    return {name: grad.clone() for name, grad in trained_gradients(model).items()}
