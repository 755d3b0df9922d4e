"""`fastpeft check` of attention over virtual tokens, prefix tuning and LLaMA-Adapter: the op with the heads of the
model and every kind of mask and modifier, then the whole model."""

import argparse
import math
from collections import defaultdict
from typing import NamedTuple

import torch
from torch import nn

import fastpeft
from fastpeft import check_attention_model as ways
from fastpeft import check_model
from fastpeft.attention_oracle import attention_draws, random_attention_problem, sdpa
from fastpeft.check_rows import (
    ALONE,
    FEW,
    FLASH,
    ONE,
    TRUNCATED,
    USUAL,
    WHOLE,
    Measured,
    Noted,
    Row,
    added_in_half,
    relative_error,
    row_of,
    worst,
)
from fastpeft.console import Console
from fastpeft.dispatch import Choice, choose_backend, interpreting
from fastpeft.prefix_geometry import geometry

APART = 1e-4  # HF peft in float64 from our truth, relative: transformers computes softmax and norms in fp32 even there
APART_AS_IT_IS = 8  # times eager's error, where it has no number in float64: a mask that hides a whole row is NaN there


FEWEST = 4  # virtual tokens of the op: a softmax over one is constant, and its gradient nothing but rounding


class Case(NamedTuple):
    """Calls of an op. modifiers: as in `attention_oracle`; queries: the last of the keys, None is all."""

    name: str
    modifiers: tuple[str, ...] = ()
    queries: int | None = None
    alone: bool = False  # of a prefix, not of gated prompts


CASES = (
    Case("causal"),
    Case("left padding", ("left",)),
    Case("sliding window", ("window",)),
    Case("sliding window, the prefix pinned", ("pin", "left"), alone=True),
    Case("packed sequences", ("packed",)),
    Case("ALiBi, left padding", ("alibi", "left")),
    Case("softcap, sinks", ("softcap", "sinks")),
    Case("additive biases", ("bias", "prefix-bias")),
    Case("dropout", ("dropout",), alone=True),
    Case("cached decoding", ("left",), queries=1),
    Case("a cached beginning", ("left",), queries=7),
)


class Extent(NamedTuple):
    """How much is computed. Errors are pooled over the draws; one query has few of its own, and takes more."""

    keys: int
    op_draws: int
    short_draws: int
    model_draws: int
    decoded: int


def extent_of(choice: Choice, heads: int, depth: int) -> Extent:
    """Keys such that the kernels take more than one tile of them; fewer draws of wide heads, which have more elements.
    The interpreter is thousands of times slower."""
    if choice.backend == "triton" and interpreting():
        return Extent(keys=21, op_draws=2, short_draws=4, model_draws=1, decoded=1)
    draws = min(24, max(4, 24 * 72 // (heads * depth)))
    keys, short = 150 if choice.backend == "triton" else 70, max(96, 8 * draws)
    return Extent(keys=keys, op_draws=draws, short_draws=short, model_draws=16, decoded=2)


def measure(method: str, base: nn.Module, arguments: argparse.Namespace, peft, console: Console) -> Measured:
    """All rows. peft: the library, or None. Raises FastpeftError for what cannot be checked."""
    model = ways.patched(method, base, arguments.prefix)
    found = geometry(model)
    heads, groups, depth = found.heads or 8, found.kv_heads or found.heads or 8, found.head_dim or 64
    choice = choose_backend(next(base.parameters()), base.dtype, depth, of="head dimension")
    console.line(str(fastpeft.report(model)))
    extent = extent_of(choice, heads, depth)
    sizes = {"heads": heads, "groups": groups, "depth": depth, "prefix": max(FEWEST, arguments.prefix)}
    rows = op_rows(method, sizes, base, choice, extent)
    more, notes = model_rows(method, base, model, choice, extent, peft)
    return Measured(choice, rows + more, tuple(notes))


def by_flash(choice: Choice, device: torch.device) -> bool:
    """Whether CPU flash attention serves what it can."""
    return choice.backend == "torch" and device.type == "cpu"


def bounds_of(tensor: str, choice: Choice, dtype: torch.dtype, otherwise: Noted) -> Noted:
    """What a tensor may differ by: `otherwise`, unless it has few numbers or the kernels round more."""
    if tensor in ("dsinks", "dgate", "adaption_gate"):
        return FEW
    truncated = choice.backend == "triton" and dtype == torch.bfloat16 and interpreting()
    return TRUNCATED if truncated else otherwise


def _flash_bounds(case: Case, tensor: str, sizes: dict, dtype: torch.dtype) -> Noted:
    if dtype == torch.float32:
        return ONE if case.queries == 1 else FLASH
    return added_in_half(sizes["heads"] // sizes["groups"]) if tensor in ("dkey", "dvalue") else FLASH


def op_rows(method: str, sizes: dict, base: nn.Module, choice: Choice, extent: Extent) -> list[Row]:
    """The result and every gradient of every case, of random operands. Each sample and head is a draw, since the error
    of one row in fp32 is mostly one number."""
    device, dtype, gated = next(base.parameters()).device, base.dtype, method == "adapter"
    rows = []
    for case in CASES:
        if gated and case.alone:
            continue
        flash = by_flash(choice, device) and (gated or not {"softcap", "dropout"} & set(case.modifiers))
        count = extent.op_draws if case.queries is None else extent.short_draws
        problems = [_problem(case, method, sizes, dtype, device, extent.keys, seed) for seed in range(count)]
        measure_of = sdpa if flash and dtype == torch.float32 else None
        draws = attention_draws(problems, problems[0].present(), measure_of)
        for tensor in draws[0]:
            usual = _flash_bounds(case, tensor, sizes, dtype) if flash else USUAL
            three = (_heads(each[tensor]) for each in draws)
            rows.append(row_of(method, case.name, tensor, *three, bounds_of(tensor, choice, dtype, usual)))
    return rows


def _heads(draws: torch.Tensor) -> torch.Tensor:
    return draws.flatten(0, -3) if draws.ndim > 3 else draws


def _problem(case: Case, method: str, sizes: dict, dtype, device, keys: int, seed: int):
    gated = method == "adapter"
    modifiers = [name for name in case.modifiers if not (gated and name == "prefix-bias")]
    problem = random_attention_problem(
        modifiers, queries=case.queries or keys, keys=keys, gate=(sizes["heads"],) if gated else None, dtype=dtype,
        device=device, seed=seed, **sizes,
    )  # fmt: skip
    if gated:
        problem.options.pop("prefix_window", None)
    return problem


def model_rows(
    method: str, base: nn.Module, model: nn.Module, choice: Choice, extent: Extent, peft
) -> tuple[list[Row], list[str]]:
    """(rows, notes): logits, the gradients of the virtual tokens, of layers the worst, and decoding."""
    length = getattr(model.peft_config["default"], "num_virtual_tokens", 0)
    batches = check_model.batches(model, extent.model_draws, 1, room=length + ways.STEPS, padded=True)
    sdpa_too = by_flash(choice, batches[0].targets[0].device) and base.dtype == torch.float32
    exact = check_model.in_float64(model)
    runs = {"ours": _all(method, model, batches, extent.decoded)}
    tokens = [each.tokens for each in runs["ours"][1]]
    with ways.plain(by_sdpa=sdpa_too):
        runs["eager"] = _all(method, model, batches, extent.decoded, tokens)
    with ways.plain(), check_model.computing_in_float64():
        runs["truth"] = _all(method, exact, batches, extent.decoded, tokens)
    del exact
    notes = _add_peft(runs, peft, method, base, model, batches, extent.decoded, tokens) if peft else []
    found: dict[str, list[Row]] = defaultdict(list)
    for name in runs["truth"][0][0]:
        draws = {who: [outcome[name] for outcome in outcomes] for who, (outcomes, _) in runs.items()}
        found[name.partition(".")[0]].append(_model_row(method, name.partition(".")[0], draws, choice, base.dtype))
    if tokens:
        draws = {who: [each.logits for each in decoded] for who, (_, decoded) in runs.items()}
        found["decoding"].append(_model_row(method, "decoded logits", draws, choice, base.dtype))
        notes.append(_tokens_note(method, runs))
    return [worst(rows) for rows in found.values()], notes


def _all(method: str, model: nn.Module, batches, decoded: int, forced=()):
    """(outcomes, decoded) of the batches."""
    outcomes = [ways.outcome(method, model, batch) for batch in batches]
    if not ways.decodes(batches[0]):
        return outcomes, []
    forced = forced or [None] * decoded
    return outcomes, [ways.decode(model, *each) for each in zip(batches[:decoded], forced, strict=False)]


def _add_peft(runs: dict, peft, method: str, base: nn.Module, model: nn.Module, batches, decoded, tokens) -> list[str]:
    """HF peft's runs, in the base's dtype and in float64; or the reason why there are none, which is its own."""
    try:
        theirs = {"peft": ways.peft_model(peft, method, base, model)}
        theirs["peft in float64"] = ways.peft_model(peft, method, check_model.in_float64(base), model)
        found = {who: _all(method, other, batches, decoded, tokens) for who, other in theirs.items()}
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        return [f"{method}: HF peft does not serve this model: {type(error).__name__}: {reason}"]
    runs |= found
    return []


def _model_row(method: str, tensor: str, draws: dict, choice: Choice, dtype: torch.dtype) -> Row:
    bounds = bounds_of(tensor, choice, dtype, ALONE)
    row = row_of(method, WHOLE, tensor, draws["ours"], draws["eager"], draws["truth"], bounds)
    if "peft" not in draws:
        return row
    row.peft = relative_error(draws["peft"], draws["truth"])
    apart = relative_error(draws["peft in float64"], draws["truth"])
    if math.isfinite(apart):
        row.apart = apart
    if not (apart <= APART if math.isfinite(apart) else row.peft <= APART_AS_IT_IS * row.eager):
        row.faults.append(f"{tensor}: HF peft computes something else, {row.peft:.1e} apart, in float64 {apart:.1e}")
    return row


def _tokens_note(method: str, runs: dict) -> str:
    """How many of the tokens that ours decodes are those that the other would take after the same ones."""
    who, name = ("peft", "HF peft") if "peft" in runs else ("eager", "eager")
    tokens = torch.cat([each.tokens.flatten() for each in runs["ours"][1]])
    same = torch.cat([each.logits.argmax(-1) for each in runs[who][1]]) == tokens
    return f"{method}: greedy decoding, {int(same.sum())} of {len(tokens)} tokens are {name}'s"
