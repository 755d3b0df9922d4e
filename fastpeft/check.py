"""`fastpeft check`: measure, on this very machine, how right the fused ops are. Results and every adapter gradient,
beside eager torch in the same dtypes and HF peft, all against float64: the ops at the shapes of the model's layers,
then the whole model with LoRA, with a prefix, and with gated prompts (LLaMA-Adapter). With --base fp8: what a base in
float8 costs LoRA in accuracy."""

import argparse
import contextlib
import dataclasses
import json
from pathlib import Path

import torch
from torch import nn

import fastpeft
from fastpeft import check_attention, check_fp8, check_lora, info
from fastpeft.check_rows import USUAL, WHOLE, Cost, Measured, Row
from fastpeft.console import Console
from fastpeft.dispatch import MAX_RANK
from fastpeft.errors import ConfigError, FastpeftError, TargetError
from fastpeft.fallback import no_fallback
from fastpeft.local_model import load_model, quiet_transformers

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
METHODS = {"lora": check_lora.measure, "prefix": check_attention.measure, "adapter": check_attention.measure}
BASES = {"fp8": check_fp8.measure}
OPS = {"lora": "lora_linear", "prefix": "prefix_attention", "adapter": "gated_prompt_attention", "fp8": "fp8_linear"}
MOST_VIRTUAL_TOKENS = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, metavar="DIR", help="a model of yours; default: a tiny Llama")
    parser.add_argument("--method", choices=(*METHODS, "all"), default="all", help="default all")
    parser.add_argument("--base", choices=("own", *BASES), default="own", help="fp8: as quantise_base_fp8 makes it")
    parser.add_argument("--rank", type=_rank, default=8, metavar="R", help="of LoRA; default 8")
    parser.add_argument("--prefix", type=_tokens, default=8, metavar="P", help="virtual tokens; default 8")
    parser.add_argument("--dtype", choices=DTYPES, help="of the base; default: the model's own, fp32 for the tiny one")
    parser.add_argument("--backend", choices=("auto", "triton", "torch"), default="auto", help="default auto")
    parser.add_argument("--dropout", type=_probability, default=0.0, metavar="P", help="of LoRA; default 0")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")


def _rank(text: str) -> int:
    return _count(text, MAX_RANK)


def _tokens(text: str) -> int:
    return _count(text, MOST_VIRTUAL_TOKENS)


def _count(text: str, most: int) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number from 1 to {most} is wanted")
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
    with quiet_transformers(), torch.random.fork_rng(), fastpeft.backend(arguments.backend), no_fallback():
        base = _base(arguments.model, device)
        if arguments.dtype:
            base = base.to(DTYPES[arguments.dtype])
        console.line((f"fastpeft {fastpeft.__version__}", "bold"), f" on {info.devices()[_key(device)]}")
        found, refused = _measure(base, arguments, console)
    faults = [
        f"{row.method}, {row.part}: {fault}" for each in found.values() for row in each.rows for fault in row.faults
    ]
    _show(console, found, refused, faults)
    if arguments.json:
        _write(arguments, found, refused, faults)
    return 1 if faults else 0


def _measure(base: nn.Module, arguments, console: Console) -> tuple[dict[str, Measured], dict[str, str]]:
    """By method what was found, and why a method does not serve this model. Raises if none of those asked for does."""
    names = tuple(METHODS) if arguments.method == "all" else (arguments.method,)
    if arguments.base != "own":
        if arguments.method not in ("all", "lora"):
            raise FastpeftError(f"--base {arguments.base} is checked with LoRA; leave out --method {arguments.method}")
        names = (arguments.base,)
    found, refused, peft = {}, {}, _peft()
    for name in names:
        try:
            found[name] = (METHODS | BASES)[name](name, base, arguments, peft, console)
        except (ConfigError, TargetError) as error:
            if len(refused) + 1 == len(names):
                raise
            refused[name] = str(error)
    return found, refused


def _peft():
    """HF's library, or None."""
    try:
        import peft
    except ImportError:
        return None
    return peft


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


def _show(console: Console, found: dict[str, Measured], refused: dict[str, str], faults: list[str]) -> None:
    rows = [row for each in found.values() for row in each.rows]
    for method, measured in found.items():
        for part in dict.fromkeys(row.part for row in measured.rows):
            title = (
                f"{method}, whole model, the worst layer of each name" if part == WHOLE else f"{OPS[method]}, {part}"
            )
            _table(console, f"{title}, on {measured.choice.backend}", [r for r in measured.rows if r.part == part])
        for part in dict.fromkeys(cost.part for cost in measured.costs):
            _costs(console, f"what the base in {method} costs, {part}", [c for c in measured.costs if c.part == part])
    console.line(("Errors are relative to float64. rms, max, row: ours over eager's, of all elements, the", "dim"))
    console.line(("greatest, the worst row. gain: the projection on float64, beside eager's. Bounds:", "dim"))
    for bounds in dict.fromkeys([USUAL, *(row.bounds for row in rows)]):
        figures = f"{bounds.rms}, {bounds.peak}, {bounds.row}, 1 +- {bounds.gain:.3g}"
        console.line((f"  {figures} {bounds.note}", "dim"))
    apart = [row.apart for row in rows if row.apart is not None]
    if apart:
        told = f"HF peft in float64 is at most {max(apart):.1e} from ours; {check_attention.APART:.0e} allowed"
        console.line((told, "dim"))
    for note in (note for measured in found.values() for note in measured.notes):
        console.line(note)
    for method, reason in refused.items():
        console.line(("not checked  ", "bold yellow"), f"{method}: {reason}")
    for fault in faults:
        console.line(("FAILED  ", "bold red"), fault)
    if not faults:
        console.line(("ok  ", "green"), f"{sum(row.pooled for row in rows)} comparisons: as right as eager torch")
    if _peft() is None:
        console.line("peft is not installed, so it was not measured: pip install peft")


def _table(console: Console, title: str, rows: list[Row]) -> None:
    columns = ("error of", "ours", "eager", "HF peft", "rms", "max", "row", "gain", "verdict")
    cells = []
    for row in rows:
        d = row.difference
        theirs = "" if row.peft is None else f"{row.peft:.1e}"
        verdict = ("FAILED", "bold red") if row.faults else ("ok", "green")
        ratios = [f"{value:.2f}" for value in (d.rms, d.peak, d.row)]
        cells.append([row.tensor, f"{row.ours:.1e}", f"{row.eager:.1e}", theirs, *ratios, f"{d.gain:.4f}", verdict])
    console.table(columns, cells, title=title)


def _costs(console: Console, title: str, costs: list[Cost]) -> None:
    columns = ("error of", "fp8 base", "own base", "fp8 - own", "max, fp8", "max, own")
    cells = []
    for cost in costs:
        figures = (cost.fp8, cost.own, cost.apart, cost.fp8_peak, cost.own_peak)
        cells.append([cost.tensor, *(f"{figure:.1e}" for figure in figures)])
    console.table(columns, cells, title=title)


def _write(
    arguments: argparse.Namespace, found: dict[str, Measured], refused: dict[str, str], faults: list[str]
) -> None:
    document = {
        "schema": 2,
        "versions": info.versions(),
        "devices": info.devices(),
        "model": str(arguments.model or "tiny Llama"),
        "base": arguments.base,
        "rank": arguments.rank,
        "prefix": arguments.prefix,
        "dropout": arguments.dropout,
        "dtype": arguments.dtype,
        "backends": {name: each.choice._asdict() for name, each in found.items()},
        "rows": [dataclasses.asdict(row) for each in found.values() for row in each.rows],
        "costs": [dataclasses.asdict(cost) for each in found.values() for cost in each.costs],
        "notes": [note for each in found.values() for note in each.notes],
        "refused": refused,
        "faults": faults,
    }
    try:
        arguments.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise FastpeftError(f"--json {arguments.json}: cannot be written: {error.strerror}") from None
