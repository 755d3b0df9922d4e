"""Models with virtual tokens in front of their input, and the oracle: the plain model whose vocabulary goes on with the
prompt's rows, fed their ids."""

import torch
from torch import nn

import fastpeft
from tests.models import VOCABULARY, batch_for, tiny
from tests.peft_pair import quietly
from tests.prefix_pair import task_of

LENGTH = 5
METHODS = {"prompt": "PromptTuningConfig", "mlp": "PromptEncoderConfig", "lstm": "PromptEncoderConfig"}
EXTRA = {"prompt": {}, "mlp": {}, "lstm": {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 12}}

# What peft does not find in these models' configurations.
SIZES = {"mpt": {"num_attention_heads": 4, "token_dim": 32, "num_layers": 2}}


def settings_of(family: str, task: str | None = None, method: str = "prompt", **settings) -> dict:
    common = {"task_type": task or task_of(family), "num_virtual_tokens": LENGTH}
    return {**common, **EXTRA[method], **SIZES.get(family, {}), **settings}


def prompt_pair(family: str, task: str | None = None, method: str = "prompt", *, quirks: bool = True, **settings):
    """(peft's model, ours) with a prompt each, drawn from one seed; ours as peft's where that is wrong, with
    `quirks`."""
    import peft

    task = task or task_of(family)
    torch.manual_seed(11)
    config = getattr(peft, METHODS[method])(**settings_of(family, task, method, **settings))
    hf = quietly(peft.get_peft_model, tiny(family, task), config).eval()
    return hf, prompted(family, task, method, hf_quirks=quirks, **settings)


def prompted(
    family: str = "llama", task: str | None = None, method: str = "prompt", *,
    base: nn.Module | None = None, seed: int = 11, hf_quirks: bool = False, **settings,
) -> nn.Module:  # fmt: skip
    """Our model with a prompt, in eval mode. `base`: in place of the tiny model."""
    task = task or task_of(family)
    base = tiny(family, task) if base is None else base
    torch.manual_seed(seed)
    config = getattr(fastpeft, METHODS[method])(**settings_of(family, task, method, **settings))
    return quietly(fastpeft.patch, base, config, hf_quirks=hf_quirks).eval()


def rows_of(model: nn.Module, name: str = "default") -> torch.Tensor:
    """(P, H): the rows in front."""
    encoder = model.prompt_encoder[name]
    return encoder.table()[: encoder.used].detach()


def oracle(family: str, task: str, rows: torch.Tensor, base: nn.Module | None = None) -> nn.Module:
    """The plain model with the prompt's rows behind its vocabulary; its head, tied or not, keeps its size."""
    model = tiny(family, task) if base is None else base
    tables = {id(stack.get_input_embeddings().weight) for stack in stacks(model)}
    for embedding in [module for module in model.modules() if isinstance(module, nn.Embedding)]:
        if id(embedding.weight) in tables:
            table = torch.cat((embedding.weight.detach(), rows / getattr(embedding, "embed_scale", 1)))
            embedding.weight = nn.Parameter(table)
            embedding.num_embeddings += len(rows)
    return model


def stacks(model: nn.Module) -> list[nn.Module]:
    pair = getattr(model.config, "is_encoder_decoder", False)
    return [model.get_encoder(), model.get_decoder()] if pair else [model]


def starts(inputs: dict) -> list[int]:
    """How much padding each row has in front."""
    return [int(row.nonzero()[0]) if row.any() else 0 for row in inputs["attention_mask"]]


def in_rows(values: torch.Tensor, at: list[int], fill) -> torch.Tensor:
    """`fill`, a tensor, put into each row where `at` says."""
    pieces = zip(values, at, strict=True)
    return torch.stack([torch.cat((row[:k], fill.to(row.dtype), row[k:])) for row, k in pieces])


def with_prompt(inputs: dict, count: int = LENGTH) -> dict:
    """What the oracle is fed for a batch of text."""
    at, ones = starts(inputs), torch.ones(count)
    fills = {
        "input_ids": VOCABULARY + torch.arange(count), "attention_mask": ones, "token_type_ids": ones * 0,
        "labels": ones * -100, "position_ids": torch.arange(count),
    }  # fmt: skip
    out, shape = dict(inputs), inputs["input_ids"].shape
    for name, fill in fills.items():
        if name in inputs and inputs[name].shape == shape:
            values = inputs[name]
            if name == "position_ids":
                values = torch.stack([torch.cat((r[:k], r[k:] + count)) for r, k in zip(values, at, strict=True)])
            out[name] = in_rows(values, at, fill)
    for name in ("start_positions", "end_positions"):
        if name in inputs:
            out[name] = inputs[name] + count
    return out


def of_tokens(values: torch.Tensor, inputs: dict, count: int = LENGTH) -> torch.Tensor:
    """The places of (B, P + S, ...) where real tokens are, one after the other."""
    at, mask = starts(inputs), inputs["attention_mask"].bool()
    kept = [torch.cat((row[:k], row[k + count :])) for row, k in zip(values, at, strict=True)]
    return torch.stack(kept)[mask]


def padded(side: str, family: str, task: str) -> dict:
    """A batch whose last row is shorter by two tokens, with padding behind it or in front."""
    inputs = batch_for(family, task)
    shape = inputs["attention_mask"].shape
    if side == "left":
        for key, value in inputs.items():
            if value.shape == shape and not (key == "labels" and task == "SEQ_2_SEQ_LM"):
                inputs[key] = torch.stack((*value[:-1], value[-1].roll(2)))
        for key in ("start_positions", "end_positions"):
            if key in inputs:
                inputs[key] = inputs[key] + torch.tensor([0] * (shape[0] - 1) + [2])
    if task == "TOKEN_CLS":
        inputs["labels"] = inputs["labels"].masked_fill(inputs["attention_mask"] == 0, -100)
    return inputs
