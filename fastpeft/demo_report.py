"""What the demo shows and writes: the table, the picture, result.json."""

import json
import math
import statistics
from pathlib import Path
from typing import NamedTuple

import torch

import fastpeft
from fastpeft import info
from fastpeft.console import Console
from fastpeft.demo_train import Memory, Run, paired_ratio

OURS, PEFT, FLOOR = "fastpeft", "HF peft", "frozen base"


class Proof(NamedTuple):
    """One thing the demo claims, and whether it held."""

    what: str
    ok: bool
    detail: str


def _perplexities(losses: dict[str, float]) -> dict[str, float]:
    return {text: math.exp(min(loss, 700.0)) for text, loss in losses.items()}


def result_of(
    subject, before: dict[str, float], after: dict[str, dict], runs: list[Run], memory: dict[str, Memory]
) -> dict:
    """The content of result.json, without the proofs."""
    model = runs[0].model
    count, total = fastpeft.count_parameters(model)
    config = next(iter(model.peft_config.values()))
    scale = subject.scale
    cuda = subject.device.type == "cuda"
    measured = "torch's CUDA allocator" if cuda else "live tensors of forward and backward, counted by a dispatch mode"
    rows = {}
    for run in runs:
        rows[run.name] = {"step_ms": 1e3 * statistics.median(run.block_seconds), "losses": run.losses}
        rows[run.name]["block_ms"] = [1e3 * seconds for seconds in run.block_seconds]
        if run.name in after:
            rows[run.name]["held_out_loss"] = after[run.name]
            rows[run.name]["perplexity"] = _perplexities(after[run.name])
            rows[run.name] |= {f"{key}_bytes": value for key, value in memory[run.name]._asdict().items()}
    both = {run.name: run for run in runs}
    ratios = paired_ratio(both[OURS], both[PEFT]) if PEFT in both else None
    return {
        "schema": 1,
        "versions": info.versions(),
        "threads": torch.get_num_threads(),
        "seed": subject.seed,
        "model": subject.base.name,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "parameters": total,
        "trainable": count,
        "adapter": {"r": config.r, "lora_alpha": config.lora_alpha, "lora_dropout": config.lora_dropout},
        "steps": scale.steps, "batch": scale.batch, "sequence": scale.sequence, "block": scale.block,
        "corpora": {text.corpus.name: text.facts() for text in subject.texts},
        "texts": [text.corpus.name for text in subject.texts],
        "before": _perplexities(before),
        "runs": rows,
        "step_ratio": ratios and dict(zip(("median", "p20", "p80"), ratios, strict=True)),
        "memory_measured_by": measured,
        "report": str(fastpeft.report(model)).splitlines(),
    }  # fmt: skip


def _number(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:,.0f}"


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def show(console: Console, result: dict, peft) -> None:
    """The table of figures and the list of proofs."""
    runs, other = result["runs"], result["runs"].get(PEFT)
    ours = runs[OURS]
    rows = []
    for text in reversed(result["texts"]):
        figures = [_number(result["before"][text]), (_number(ours["perplexity"][text]), "bold")]
        figures += [_number(other["perplexity"][text]), ""] if other else []
        rows.append([f"held-out perplexity, {text}", *figures])
    rows.append([])

    def cost(label: str, mine: str, its: str, ratio: str) -> None:
        rows.append([label, "", (mine, "bold"), *([its, (ratio, "bold")] if other else [])])

    ratio = result["step_ratio"] or {}
    times = "{median:.2f} ({p20:.2f}-{p80:.2f})".format(**ratio) if ratio else ""
    cost("one step", f"{ours['step_ms']:.1f} ms", f"{other['step_ms']:.1f} ms" if other else "", times)
    rows.append(["  the frozen base alone", f"{runs[FLOOR]['step_ms']:.1f} ms", *[""] * (3 if other else 1)])
    for label, key in (("peak memory of a step", "peak_bytes"), ("  kept for backward, of it", "saved_bytes")):
        its = other[key] if other else 0
        cost(label, _mib(ours[key]), _mib(its), f"{ours[key] / its:.2f}" if its else "")
    adapter = f"LoRA r={result['adapter']['r']} with dropout {result['adapter']['lora_dropout']}"
    title = f"{adapter} on {result['model']}: {result['trainable']:,} of {result['parameters']:,} parameters trained"
    columns = ["", "before", OURS, *([f"HF peft {peft.__version__}", "fastpeft / HF peft"] if other else [])]
    console.table(columns, rows, title=title)
    console.line(
        ("Step: forward, backward, optimizer; the ratio is that of blocks run in turns, median (20-80 %).", "dim")
    )
    console.line((f"Memory: {result['memory_measured_by']}, and weights and optimizer state.", "dim"))
    if not other:
        console.line("peft is not installed, so there is nothing to compare with: pip install peft")
    console.line()
    for proof in result["proofs"]:
        mark = ("    ok  ", "green") if proof["ok"] else ("FAILED  ", "bold red")
        console.line(mark, f"{proof['what']}: ", (proof["detail"], "dim"))


def write(console: Console, result: dict, out: Path) -> None:
    """result.json and, where matplotlib is installed, curves.png."""
    (out / "result.json").write_text(json.dumps(_finite(result), indent=1) + "\n", encoding="utf-8")
    try:
        from fastpeft.demo_plot import draw

        draw(result, out / "curves.png")
        picture = f"{out / 'curves.png'}, "
    except ImportError as error:
        console.line(f"There is no picture ({error}): pip install matplotlib")
        picture = ""
    console.line(f"\n{result['seconds']:.0f} s. Written: {picture}{out / 'result.json'}, {out / 'adapter'}/")
    console.line("Next: fastpeft demo --model DIR --data FILE, fastpeft check, fastpeft bench lora")


def _finite(value):
    """JSON has no NaN and no infinity; a diverged loss becomes null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
