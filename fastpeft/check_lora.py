"""`fastpeft check` of LoRA: the op at the shapes of the model's layers, then the whole model."""

import argparse
import copy
from collections import defaultdict
from typing import NamedTuple

import torch
from torch import nn

import fastpeft
from fastpeft import check_lora_model, check_model
from fastpeft.check_rows import (
    ALONE,
    TRUNCATED,
    TWO_PARTS,
    USUAL,
    WHOLE,
    Measured,
    Noted,
    Row,
    relative_error,
    row_of,
    worst,
)
from fastpeft.console import Console
from fastpeft.dispatch import Choice, choose_backend, interpreting
from fastpeft.local_model import task_of
from fastpeft.oracle import lora_linear_outcomes, random_lora_problem

METHOD = "lora"
WANTED = ("x", "lora_A", "lora_B")  # base weights and biases are frozen


class Extent(NamedTuple):
    """How much is computed. Errors are pooled over the draws: a small tensor's own is a handful of roundings."""

    op_rows: int
    op_draws: int
    model_draws: int


def extent_of(choice: Choice, rank: int) -> Extent:
    """Rows such that the kernels, and the torch path from 4096 inputs on, take more than one block of them; more draws
    at a low rank, whose errors are those of few numbers. The interpreter is thousands of times slower."""
    if choice.backend == "triton" and interpreting():
        return Extent(op_rows=40, op_draws=3, model_draws=2)
    more = 3 if rank < 4 else 1
    return Extent(op_rows=150 if choice.backend == "triton" else 70, op_draws=16 * more, model_draws=16 * more)


def adapted(base: nn.Module, arguments: argparse.Namespace) -> tuple[nn.Module, dict]:
    """A copy of the base with LoRA of random values on every linear layer, in eval mode; its configuration."""
    config = {
        "r": arguments.rank, "lora_alpha": 2 * arguments.rank, "lora_dropout": arguments.dropout,
        "target_modules": "all-linear", "task_type": task_of(type(base).__name__).value,
    }  # fmt: skip
    torch.manual_seed(0)
    model = fastpeft.patch(copy.deepcopy(base), fastpeft.LoraConfig(**config)).eval()
    check_lora_model.randomize(model, seed=0)
    return model, config


def measure(method: str, base: nn.Module, arguments: argparse.Namespace, peft, console: Console) -> Measured:
    """All rows. peft: the library, or None. Raises FastpeftError for what cannot be checked."""
    model, config = adapted(base, arguments)
    layer = check_lora_model.lora_layers(model)[0][1]
    choice = choose_backend(layer.weight, layer.weight.dtype)
    console.line(str(fastpeft.report(model)))
    extent = extent_of(choice, arguments.rank)
    rows = op_rows(model, arguments, choice, extent)
    return Measured(choice, rows + model_rows(base, model, config, arguments, choice, extent, peft))


def bounds_of(tensor: str, choice: Choice, dtype: torch.dtype, split: bool, otherwise: Noted) -> Noted:
    """What a tensor may differ by: `otherwise`, unless the kernels round more. `split`: it is a gradient of an fp32
    adapter by itself, not one that carries the errors of a whole model."""
    own_gradient = split and tensor.startswith("dlora")
    if choice.backend != "triton":
        return otherwise
    if dtype == torch.float16 and own_gradient and not interpreting():
        return TWO_PARTS
    return TRUNCATED if dtype == torch.bfloat16 and interpreting() and not own_gradient else otherwise


def op_rows(model: nn.Module, arguments: argparse.Namespace, choice: Choice, extent: Extent) -> list[Row]:
    """Every tensor of `lora_linear` at every shape of the model's layers, of random operands: with the base product
    and, since the low-rank term hides behind it, without; the worse of the two."""
    shapes: dict[tuple, list[str]] = defaultdict(list)
    for path, layer in check_lora_model.lora_layers(model):
        shapes[(*layer.matrix().shape, layer.bias is not None)].append(path.rpartition(".")[2])
    rows = []
    adapter_dtype = layer.factors("default")[0].dtype
    for (outputs, inputs, bias), names in shapes.items():
        part = f"{inputs} -> {outputs}{' with bias' if bias else ''} ({', '.join(dict.fromkeys(names))})"
        problems = [
            random_lora_problem(
                (extent.op_rows, inputs), outputs, arguments.rank, dtype=layer.weight.dtype, bias=bias, seed=seed,
                adapter_dtype=adapter_dtype, dropout=arguments.dropout, device=layer.weight.device,
            )
            for seed in range(extent.op_draws)
        ]  # fmt: skip
        found: dict[str, list[Row]] = defaultdict(list)
        for variant, usual in ((problems, USUAL), ([problem.without_base() for problem in problems], ALONE)):
            draws = [lora_linear_outcomes(problem, WANTED, seed) for seed, problem in enumerate(variant)]
            for tensor in draws[0][0]:
                bounds = bounds_of(tensor, choice, layer.weight.dtype, adapter_dtype == torch.float32, usual)
                three = ([draw[i][tensor] for draw in draws] for i in range(3))
                found[tensor].append(row_of(METHOD, part, tensor, *three, bounds))
        rows += [worst(both) for both in found.values()]
    return rows


def train_layers(model: nn.Module) -> None:
    """Let the adapters' dropout act, and the model's own not."""
    for _, layer in check_lora_model.lora_layers(model):
        layer.training = True


def model_rows(
    base: nn.Module, model: nn.Module, config: dict, arguments: argparse.Namespace, choice: Choice, extent: Extent, peft
) -> list[Row]:
    """Logits and the adapter gradients of the whole model; of the layers of one name, the worst."""
    if arguments.dropout:
        train_layers(model)
    batches = check_model.batches(model, extent.model_draws, seed=1)
    seeded = list(enumerate(batches))
    eager, masks = zip(*(check_lora_model.eager(model, ids, arguments.dropout, s) for s, ids in seeded), strict=True)
    ours = [check_lora_model.fused(model, ids, s) for s, ids in seeded]
    exact = check_model.in_float64(model)
    with check_model.computing_in_float64():
        truth = [check_lora_model.truth(exact, ids, mask) for ids, mask in zip(batches, masks, strict=True)]
    del exact
    theirs = _hf_outcomes(peft, base, model, config, batches, masks) if peft else []
    bounds = bounds_of("", choice, base.dtype, False, ALONE)
    found: dict[str, list[Row]] = defaultdict(list)
    for name in truth[0]:
        draws = [[outcome[name] for outcome in outcomes] for outcomes in (ours, eager, truth)]
        row = row_of(METHOD, WHOLE, name, *draws, bounds)
        row.peft = relative_error([outcome[name] for outcome in theirs], draws[2]) if theirs else None
        row.tensor = ".".join(name.split(".")[-4:-2]) or name
        found[row.tensor].append(row)
    return [worst(rows) for rows in found.values()]


def _hf_outcomes(peft, base, model, config, batches, masks) -> list[check_model.Outcome]:
    """HF peft's outcomes from our adapters' values."""
    # "all-linear" fails in peft for some tasks, and takes in what `patch` leaves out
    settings = {**config, "target_modules": list(model.peft_config["default"].target_modules)}
    other = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**settings)).eval()
    values = {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if ".lora_" in name:
                parameter.copy_(values[name.removeprefix("base_model.model.")])
    return [check_lora_model.hf_peft(other, ids, mask) for ids, mask in zip(batches, masks, strict=True)]
