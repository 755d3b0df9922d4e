"""`fastpeft check --base fp8`: the arithmetic of `fp8_linear`, judged against its own definition, and what it costs:
the errors of layers, logits and adapter gradients beside those of the base in its own dtype, both from float64."""

import argparse
import copy
from collections import defaultdict

import torch
from torch import nn
from torch.nn import functional as F

import fastpeft
from fastpeft import check_lora, check_lora_model, check_model
from fastpeft.check_rows import USUAL, WHOLE, Cost, Measured, Row, relative_error, row_of
from fastpeft.console import Console
from fastpeft.dispatch import Choice
from fastpeft.ops.fp8_linear import fp8_linear, fp8_linear_reference, quantise_rows, served

METHOD = "fp8"
SERVED = (512, 256)  # (N, K) of a layer that a GPU's products of 8 bits take, whatever the model's are
ROWS, OP_DRAWS, MODEL_DRAWS = 64, 8, 4
NOTE = (
    "What a base in fp8 costs is shown, not judged: errors over the root mean square of the truth, which is float64 on "
    "the base as it was."
)

Outcome = dict[str, torch.Tensor]


def measure(method: str, base: nn.Module, arguments: argparse.Namespace, peft, console: Console) -> Measured:
    """All rows and costs; peft is not asked. Raises FastpeftError for what cannot be checked."""
    model, _ = check_lora.adapted(base, arguments)
    layers = {}
    for path, layer in check_lora_model.lora_layers(model):
        layers.setdefault(layer.weight.shape, (path.rpartition(".")[2], copy.deepcopy(layer.weight.detach())))
    _, like = next(iter(layers.values()))
    generator = torch.Generator().manual_seed(2)
    added = torch.randn(SERVED, generator=generator).to(like.device, like.dtype) / SERVED[1] ** 0.5
    layers.setdefault(added.shape, ("random numbers", added))
    whole = model_costs(model, arguments)
    console.line(str(fastpeft.report(model)))
    rows, costs = [], []
    for (outputs, inputs), (name, weight) in layers.items():
        by = "8-bit products" if served(weight, quantise_rows(weight)[0], weight.dtype) else "widened"
        found, cost = op_rows(f"{inputs} -> {outputs} ({name}, {by})", weight)
        rows, costs = rows + found, costs + cost
    return Measured(Choice("torch", "the op is torch's products alone"), rows, (NOTE,), (*costs, *whole))


def op_rows(part: str, weight: torch.Tensor) -> tuple[list[Row], list[Cost]]:
    """y and dX of one weight (N, K), of random inputs."""
    codes, scale = quantise_rows(weight)
    exact = weight.double()
    draws = defaultdict(lambda: defaultdict(list))
    for seed in range(OP_DRAWS):
        generator = torch.Generator().manual_seed(seed)
        x, dy = (torch.randn(ROWS, size, generator=generator).to(weight) for size in reversed(weight.shape))
        ways = {
            "op": (lambda x: fp8_linear(x, codes, scale), x, dy),
            "reference": (lambda x: fp8_linear_reference(x, codes, scale), x, dy),
            "definition": (lambda x: fp8_linear_reference(x, codes, scale), x.double(), dy.double()),
            "own": (lambda x: F.linear(x, weight), x, dy),
            "truth": (lambda x: F.linear(x, exact), x.double(), dy.double()),
        }
        for way, problem in ways.items():
            for tensor, value in _outcome(*problem).items():
                draws[tensor][way].append(value)
    rows = [
        row_of(METHOD, part, name, each["op"], each["reference"], each["definition"], USUAL)
        for name, each in draws.items()
    ]
    return rows, [cost_of(part, name, each["op"], each["own"], each["truth"]) for name, each in draws.items()]


def _outcome(function, x: torch.Tensor, dy: torch.Tensor) -> Outcome:
    x = x.detach().requires_grad_()
    y = function(x)
    return {"y": y.detach(), "dx": torch.autograd.grad(y, x, dy)[0]}


def model_costs(model: nn.Module, arguments: argparse.Namespace) -> list[Cost]:
    """Logits and the adapter gradients of the whole model, whose base is in float8 afterwards; of the layers of one
    name, the worst."""
    if arguments.dropout:
        check_lora.train_layers(model)
    seeded = list(enumerate(check_model.batches(model, MODEL_DRAWS, seed=1)))
    masks = [check_lora_model.eager(model, batch, arguments.dropout, seed)[1] for seed, batch in seeded]
    own = [check_lora_model.fused(model, batch, seed) for seed, batch in seeded]
    exact = check_model.in_float64(model)
    with check_model.computing_in_float64():
        truth = [check_lora_model.truth(exact, batch, mask) for (_, batch), mask in zip(seeded, masks, strict=True)]
    del exact
    fastpeft.quantise_base_fp8(model)
    fp8 = [check_lora_model.fused(model, batch, seed) for seed, batch in seeded]
    found: dict[str, list[Cost]] = defaultdict(list)
    for name in truth[0]:
        tensor = ".".join(name.split(".")[-4:-2]) or name
        draws = ([outcome[name] for outcome in outcomes] for outcomes in (fp8, own, truth))
        found[tensor].append(cost_of(WHOLE, tensor, *draws))
    return [max(costs, key=lambda cost: cost.fp8) for costs in found.values()]


def cost_of(part: str, tensor: str, fp8, own, truth) -> Cost:
    """Of draws of one tensor, computed in the three ways."""
    size = (sum(float(t.double().square().sum()) for t in truth) / sum(t.numel() for t in truth)) ** 0.5 or 1.0
    peaks = [max(float((g.double() - t).abs().max()) for g, t in zip(got, truth, strict=True)) for got in (fp8, own)]
    difference = [f.double() - o.double() + t for f, o, t in zip(fp8, own, truth, strict=True)]
    errors = [relative_error(got, truth) for got in (fp8, own, difference)]
    return Cost(part, tensor, *errors, *(peak / size for peak in peaks))
