"""What the processes of the distributed tests do: the methods, their batches, and steps of training."""

import contextlib
import functools

import torch
import torch.distributed as dist
from torch import nn

import fastpeft
from tests.models import VOCABULARY, tiny
from tests.peft_pair import quietly, randomise

ROWS, LENGTH, STEPS = 8, 9, 4
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
ADALORA = {"init_r": 4, "target_r": 2, "tinit": 0, "tfinal": 1, "deltaT": 1, "total_step": STEPS}
VIRTUAL = {"num_virtual_tokens": 3}

# Method -> (task, configuration's class, its fields).
METHODS = {
    "lora": ("CAUSAL_LM", fastpeft.LoraConfig, LORA),
    "rslora-dora": ("CAUSAL_LM", fastpeft.LoraConfig, {**LORA, "use_rslora": True, "use_dora": True}),
    "embedding": ("CAUSAL_LM", fastpeft.LoraConfig, {"r": 4, "target_modules": ["embed_tokens", "v_proj"]}),
    "adalora": ("CAUSAL_LM", fastpeft.AdaLoraConfig, {**ADALORA, "target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "prefix": ("CAUSAL_LM", fastpeft.PrefixTuningConfig, VIRTUAL),
    "prefix-projection": (
        *("CAUSAL_LM", fastpeft.PrefixTuningConfig),
        {**VIRTUAL, "prefix_projection": True, "encoder_hidden_size": 8},
    ),
    "prompt": ("CAUSAL_LM", fastpeft.PromptTuningConfig, VIRTUAL),
    "p-tuning": ("CAUSAL_LM", fastpeft.PromptEncoderConfig, {**VIRTUAL, "encoder_hidden_size": 8}),
    "p-tuning-lstm": (
        *("CAUSAL_LM", fastpeft.PromptEncoderConfig),
        {**VIRTUAL, "encoder_hidden_size": 8, "encoder_reparameterization_type": "LSTM", "encoder_dropout": 0.0},
    ),
    "adapter": ("CAUSAL_LM", fastpeft.AdaptionPromptConfig, {"adapter_len": 3, "adapter_layers": 2}),
    "lora-head": ("SEQ_CLS", fastpeft.LoraConfig, LORA),
    "prefix-head": ("SEQ_CLS", fastpeft.PrefixTuningConfig, VIRTUAL),
    "adapter-head": ("SEQ_CLS", fastpeft.AdaptionPromptConfig, {"adapter_len": 3, "adapter_layers": 2}),
}


def patched(method: str, dtype: torch.dtype = torch.float32, **options) -> nn.Module:
    """A tiny model with an adapter that does something, in training mode; the same numbers at every call."""
    task, kind, settings = METHODS[method]
    torch.manual_seed(3)
    model = fastpeft.patch(tiny(task=task, dtype=dtype), kind(task_type=task, **settings), **options)
    randomise(model)
    return model.train()


@functools.cache
def batches(task: str) -> list[dict[str, torch.Tensor]]:
    """One for each step; every row has as many labels as any other, so that a mean over rows is one over labels."""
    generator = torch.Generator().manual_seed(5)
    out = []
    for _ in range(STEPS):
        ids = torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=generator)
        mask = torch.ones_like(ids)
        mask[:, :2] = 0
        classes = torch.randint(0, 3, (ROWS,), generator=generator)
        labels = classes if task == "SEQ_CLS" else ids.masked_fill(mask == 0, -100)
        out.append({"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask, "labels": labels})
    return out


def trained_names(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def train(
    model: nn.Module,
    wrapped=None,
    *,
    rank: int = 0,
    world: int = 1,
    micro: int = 1,
    unsynced=None,
    optimizer=None,
    first: int = 0,
    steps: int = STEPS,
) -> list[float]:
    """The losses of the whole batch, step by step. Each rank sees its rows in `micro` parts, all but the last under
    `unsynced()`. The optimizer is one in which a gradient's scale counts."""
    wrapped = model if wrapped is None else wrapped
    config = model.peft_config["default"]
    if optimizer is None:
        optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    losses = []
    for step in range(first, steps):
        inputs, total = batches(str(config.task_type.value))[step], 0.0
        for part in range(micro):
            rows = slice(part * world + rank, None, micro * world)
            quiet = unsynced if unsynced is not None and part + 1 < micro else contextlib.nullcontext
            with quiet():
                loss = wrapped(**{key: value[rows] for key, value in inputs.items()}).loss / micro
                loss.backward()
            total = total + loss.detach().float()
        optimizer.step()
        if isinstance(config, fastpeft.AdaLoraConfig):
            fastpeft.update_and_allocate(model, step + 1)
        optimizer.zero_grad()
        if world > 1:
            dist.all_reduce(total)
        losses.append(float(total) / world)
    return losses


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def result_of(model: nn.Module, losses: list[float]) -> dict:
    """Losses, trained parameters by name, ranks."""
    parameters = dict(model.named_parameters())
    pattern = getattr(model.peft_config["default"], "rank_pattern", None)
    return {
        "losses": losses,
        "parameters": {name: whole(parameters[name]) for name in trained_names(model)},
        "ranks": pattern,
    }


@functools.cache
def alone(method: str, steps: int = STEPS) -> dict:
    """The result of one process with the whole batch."""
    model = patched(method)
    return result_of(model, train(model, steps=steps))


def assert_as_alone(method: str, found: list[dict], what: object = "", rtol: float = 1e-5) -> None:
    """What each rank has found is the result of one process."""
    expected = alone(method)
    for rank, each in enumerate(found):
        where = f"{method} {what}, rank {rank}"
        numbers = dict(expected["parameters"])
        assert each["parameters"].keys() == numbers.keys() and each["ranks"] == expected["ranks"], where
        numbers["losses"] = torch.tensor(expected["losses"])
        for name, number in numbers.items():
            mine = torch.tensor(each["losses"]) if name == "losses" else each["parameters"][name]
            error, scale = float((mine - number).abs().max()), float(number.abs().max())
            assert error <= rtol * scale, f"{where}: {name} differs by {error:.2g}, its greatest value is {scale:.2g}"


def checkpointing(model: nn.Module, kind: str | None) -> None:
    if kind is not None:
        quietly(model.gradient_checkpointing_enable, {"use_reentrant": kind == "reentrant"})


# DDP


def ddp(rank: int, cases: list[tuple[str, dict]]) -> list[dict | str]:
    """Each case is a method, and of its training: micro, checkpointing, and DDP's options. Where fastpeft refuses, its
    words."""
    from torch.nn.parallel import DistributedDataParallel

    out, world = [], dist.get_world_size()
    for method, case in cases:
        options = dict(case)
        micro = options.pop("micro", 1)
        model = patched(method)
        checkpointing(model, options.pop("checkpointing", None))
        wrapped = DistributedDataParallel(model, **options)
        try:
            losses = train(model, wrapped, rank=rank, world=world, micro=micro, unsynced=wrapped.no_sync)
        except fastpeft.PatchError as error:
            out.append(str(error))
        else:
            out.append(result_of(model, losses))
    return out
