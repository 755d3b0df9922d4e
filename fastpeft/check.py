"""`fastpeft check`: measure, on this very machine, how right the fused ops are. Results and every adapter gradient,
beside eager torch in the same dtypes and HF peft, all against float64: the op at the shapes of the model's layers, then
the whole model."""

import argparse
import contextlib
import copy
import dataclasses
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

import fastpeft
from fastpeft import check_model, info
from fastpeft.console import Console
from fastpeft.dispatch import MAX_RANK, Choice, choose_backend, interpreting
from fastpeft.errors import FastpeftError
from fastpeft.local_model import load_model, quiet_transformers, task_of
from fastpeft.oracle import Bounds, Difference, compare, lora_linear_outcomes, random_lora_problem

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WANTED = ("x", "lora_A", "lora_B")  # base weights and biases are frozen

# The low-rank term alone: scaling and 1/(1 - p) folded into S are one rounding more than eager has there, 7 to 10 %
# more error at low rank. Of a whole model: the errors of its tensors hang together, so that the ratio varies more.
ALONE = Bounds(rms=1.25, peak=2.5, row=2.5)
# fp32 gradients of fp32 adapters on fp16 data come from tf32 products of two parts, which hold 21 of eager's 24 bits.
TWO_PARTS = Bounds(rms=16, peak=16, row=32)
# Triton's interpreter truncates where it makes a bf16 of an fp32, which doubles the error of a rounding and shrinks
# every value by up to 2**-8, twice in one op.
TRUNCATED = Bounds(rms=2.2, peak=4.0, row=4.0, gain=0.002 + 2 * 2**-8)
NOTES = {
    ALONE: "the low-rank term alone, and whole models",
    TWO_PARTS: "fp32 gradients of fp32 adapters on fp16 data, which the kernels compute to 21 bits",
    TRUNCATED: "bf16 in Triton's interpreter, which truncates",
}


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
    return Extent(op_rows=150 if choice.backend == "triton" else 70, op_draws=16 * more, model_draws=8 * more)


@dataclass
class Row:
    """One tensor. ours, eager and peft: relative rms errors; difference: ours in units of eager's."""

    part: str
    tensor: str
    ours: float
    eager: float
    difference: Difference
    bounds: Bounds
    faults: list[str]
    peft: float | None = None
    pooled: int = 1  # how many tensors it is the worst of

    def severity(self) -> tuple[bool, float]:
        return bool(self.faults), self.difference.rms


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, metavar="DIR", help="a model of yours; default: a tiny Llama")
    parser.add_argument("--method", choices=("lora",), default="lora")
    parser.add_argument("--rank", type=_rank, default=8, metavar="R", help="default 8")
    parser.add_argument("--dtype", choices=DTYPES, help="of the base; default: the model's own, fp32 for the tiny one")
    parser.add_argument("--backend", choices=("auto", "triton", "torch"), default="auto", help="default auto")
    parser.add_argument("--dropout", type=_probability, default=0.0, metavar="P", help="default 0")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")


def _rank(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MAX_RANK:
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number from 1 to {MAX_RANK} is wanted")
    return int(text)


def _probability(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= float(text) < 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r}: a probability 0 <= P < 1 is wanted")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print. Returns 0, or 1 if a bound is broken; raises FastpeftError for what cannot be checked."""
    console = Console()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with quiet_transformers(), torch.random.fork_rng(), fastpeft.backend(arguments.backend):
        base = _base(arguments.model, device)
        if arguments.dtype:
            base = base.to(DTYPES[arguments.dtype])
        config = {
            "r": arguments.rank, "lora_alpha": 2 * arguments.rank, "lora_dropout": arguments.dropout,
            "target_modules": "all-linear", "task_type": task_of(type(base).__name__).value,
        }  # fmt: skip
        torch.manual_seed(0)
        model = fastpeft.patch(copy.deepcopy(base), fastpeft.LoraConfig(**config)).eval()
        check_model.randomize(model, seed=0)
        layer = check_model.lora_layers(model)[0][1]
        choice = choose_backend(layer.weight, layer.weight.dtype, arguments.rank)
        console.line((f"fastpeft {fastpeft.__version__}", "bold"), f" on {info.devices()[_key(device)]}")
        console.line(str(fastpeft.report(model)))
        extent = extent_of(choice, arguments.rank)
        rows = op_rows(model, arguments, choice, extent)
        rows += model_rows(base, model, config, arguments, choice, extent)
    faults = [f"{row.part}: {fault}" for row in rows for fault in row.faults]
    _show(console, rows, choice, faults)
    if arguments.json:
        _write(arguments, rows, choice, faults)
    return 1 if faults else 0


def _key(device: torch.device) -> str:
    return "cuda:0" if device.type == "cuda" else "cpu"


def _base(path: Path | None, device: torch.device) -> nn.Module:
    """The user's model, or a Llama with two layers, grouped keys and no round sizes."""
    if path is not None:
        model = load_model(path, device)
        if getattr(model.config, "pad_token_id", None) is None:
            model.config.pad_token_id = 0  # without one, a decoder classifies a single sentence at a time
        return model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=251, hidden_size=72, intermediate_size=136, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.08, attention_bias=True,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(device).eval()


def _relative_error(got: list[torch.Tensor], truth: list[torch.Tensor]) -> float:
    error = sum(float((g.double() - t.double()).square().sum()) for g, t in zip(got, truth, strict=True))
    power = sum(float(t.double().square().sum()) for t in truth)
    return (error / power) ** 0.5 if power else error**0.5


def _row(part: str, tensor: str, got, eager, truth, bounds: Bounds) -> Row:
    difference = compare(tensor, got, eager, truth)
    # What half precision takes from eager's projection is no fault of ours; a factor of ours comes on top of it.
    allowed = bounds.gain + abs(compare(tensor, eager, eager, truth).gain - 1)
    faults = difference.faults(dataclasses.replace(bounds, gain=allowed))
    return Row(part, tensor, _relative_error(got, truth), _relative_error(eager, truth), difference, bounds, faults)


def _worst(rows: list[Row]) -> Row:
    worst = max(rows, key=Row.severity)
    worst.faults = [fault for row in rows for fault in row.faults]
    worst.pooled = len(rows)
    return worst


def bounds_of(tensor: str, choice: Choice, dtype: torch.dtype, split: bool, otherwise: Bounds) -> Bounds:
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
    for path, layer in check_model.lora_layers(model):
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
        for variant, usual in ((problems, Bounds()), ([problem.without_base() for problem in problems], ALONE)):
            draws = [lora_linear_outcomes(problem, WANTED, seed) for seed, problem in enumerate(variant)]
            for tensor in draws[0][0]:
                bounds = bounds_of(tensor, choice, layer.weight.dtype, adapter_dtype == torch.float32, usual)
                three = ([draw[i][tensor] for draw in draws] for i in range(3))
                found[tensor].append(_row(part, tensor, *three, bounds))
        rows += [_worst(both) for both in found.values()]
    return rows


def model_rows(
    base: nn.Module, model: nn.Module, config: dict, arguments: argparse.Namespace, choice: Choice, extent: Extent
) -> list[Row]:
    """Logits and the adapter gradients of the whole model; of the layers of one name, the worst."""
    if arguments.dropout:
        for _, layer in check_model.lora_layers(model):
            layer.training = True  # of the layer alone: the model's own dropouts stay off
    batches = check_model.batches(model, extent.model_draws, seed=1)
    seeded = list(enumerate(batches))
    eager, masks = zip(*(check_model.eager(model, ids, arguments.dropout, s) for s, ids in seeded), strict=True)
    ours = [check_model.fused(model, ids, s) for s, ids in seeded]
    exact = check_model.in_float64(model)
    try:
        truth = [check_model.truth(exact, ids, mask) for ids, mask in zip(batches, masks, strict=True)]
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        raise FastpeftError(f"check: this model cannot be computed in float64, to compare with: {reason}") from error
    del exact
    theirs = _hf_outcomes(base, model, config, batches, masks)
    bounds = bounds_of("", choice, base.dtype, False, ALONE)
    found: dict[str, list[Row]] = defaultdict(list)
    for name in truth[0]:
        draws = [[outcome[name] for outcome in outcomes] for outcomes in (ours, eager, truth)]
        row = _row("whole model", name, *draws, bounds)
        row.peft = _relative_error([outcome[name] for outcome in theirs], draws[2]) if theirs else None
        row.tensor = ".".join(name.split(".")[-4:-2]) or name
        found[row.tensor].append(row)
    return [_worst(rows) for rows in found.values()]


def _hf_outcomes(base, model, config, batches, masks) -> list[check_model.Outcome]:
    """HF peft's outcomes from our adapters' values; none where it is not installed."""
    try:
        import peft
    except ImportError:
        return []
    # "all-linear" fails in peft for some tasks, and takes in what `patch` leaves out
    settings = {**config, "target_modules": list(model.peft_config["default"].target_modules)}
    other = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**settings)).eval()
    values = {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if ".lora_" in name:
                parameter.copy_(values[name.removeprefix("base_model.model.")])
    return [check_model.hf_peft(other, ids, mask) for ids, mask in zip(batches, masks, strict=True)]


def _show(console: Console, rows: list[Row], choice: Choice, faults: list[str]) -> None:
    columns = ("error of", "ours", "eager", "HF peft", "rms", "max", "row", "gain", "verdict")
    for part in dict.fromkeys(row.part for row in rows):
        title = "whole model, the worst layer of each name" if part == "whole model" else f"lora_linear, {part}"
        cells = []
        for row in (row for row in rows if row.part == part):
            d = row.difference
            theirs = "" if row.peft is None else f"{row.peft:.1e}"
            verdict = ("FAILED", "bold red") if row.faults else ("ok", "green")
            ratios = [f"{value:.2f}" for value in (d.rms, d.peak, d.row)]
            cells.append([row.tensor, f"{row.ours:.1e}", f"{row.eager:.1e}", theirs, *ratios, f"{d.gain:.4f}", verdict])
        console.table(columns, cells, title=f"{title}, on {choice.backend}")
    console.line(("Errors are relative to float64. rms, max, row: ours over eager's, of all elements, the", "dim"))
    console.line(("greatest, the worst row. gain: the projection on float64, beside eager's. Bounds:", "dim"))
    for bounds in dict.fromkeys([Bounds(), *(row.bounds for row in rows)]):
        where = f"for {NOTES[bounds]}" if bounds in NOTES else "in general"
        figures = f"{bounds.rms}, {bounds.peak}, {bounds.row}, 1 +- {bounds.gain:.3g}"
        console.line((f"  {figures} {where}", "dim"))
    for fault in faults:
        console.line(("FAILED  ", "bold red"), fault)
    if not faults:
        console.line(("ok  ", "green"), f"{sum(row.pooled for row in rows)} comparisons: as right as eager torch")
    if all(row.peft is None for row in rows):
        console.line("peft is not installed, so it was not measured: pip install peft")


def _write(arguments: argparse.Namespace, rows: list[Row], choice: Choice, faults: list[str]) -> None:
    document = {
        "schema": 1,
        "versions": info.versions(),
        "devices": info.devices(),
        "model": str(arguments.model or "tiny Llama"),
        "rank": arguments.rank,
        "dropout": arguments.dropout,
        "dtype": arguments.dtype,
        "backend": choice._asdict(),
        "rows": [dataclasses.asdict(row) for row in rows],
        "faults": faults,
    }
    try:
        arguments.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise FastpeftError(f"--json {arguments.json}: cannot be written: {error.strerror}") from None
