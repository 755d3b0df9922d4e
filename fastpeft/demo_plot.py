"""The demo's picture: training loss, held-out perplexity, and what a step costs."""

from pathlib import Path

OURS, PEFT, BEFORE = "#0f766e", "#f59e0b", "#cbd5e1"
COLOURS = {"fastpeft": OURS, "HF peft": PEFT, "frozen base": BEFORE}


def draw(result: dict, path: Path) -> None:
    """Write a PNG of a finished demo's `result` (the content of result.json)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.4), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    loss, perplexity, seconds, memory = figure.subplots(1, 4, width_ratios=(2.4, 1.6, 1, 1))
    for axes in (loss, perplexity, seconds, memory):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    _losses(loss, result)
    _perplexities(perplexity, result)
    _costs(seconds, {name: run["step_ms"] for name, run in result["runs"].items()}, "one step, ms")
    peaks = {name: run["peak_bytes"] / 2**20 for name, run in result["runs"].items() if name != "frozen base"}
    _costs(memory, peaks, "peak memory of a step, MiB")
    adapter = f"LoRA r={result['adapter']['r']}, {result['trainable']:,} of {result['parameters']:,} parameters"
    figure.suptitle(
        f"fastpeft demo on {result['device']}: {result['model']}, {adapter}", fontsize=10, x=0.01, ha="left"
    )
    figure.savefig(path, dpi=150, metadata={"Software": None})


def _title(axes, text: str) -> None:
    axes.set_title(text, fontsize=9, loc="left")


def _losses(axes, result: dict) -> None:
    """Each loss pale, its mean over the steps around it, a tenth of all, strong; ours last, so thin above the other."""
    for name, width in (("HF peft", 4.5), ("fastpeft", 1.6)):
        losses = result["runs"].get(name, {}).get("losses")
        if not losses:
            continue
        reach = len(losses) // 20
        around = [losses[max(0, i - reach) : i + reach + 1] for i in range(len(losses))]
        mean = [sum(part) / len(part) for part in around]
        axes.plot(range(1, len(losses) + 1), losses, color=COLOURS[name], alpha=0.18, linewidth=0.8)
        axes.plot(range(1, len(losses) + 1), mean, color=COLOURS[name], linewidth=width, label=name)
    axes.set_xlabel("step", fontsize=8)
    axes.legend(frameon=False, fontsize=8)
    _title(axes, f"training loss on {result['texts'][-1]}")


def _perplexities(axes, result: dict) -> None:
    texts = result["texts"]
    series = {"before": result["before"]} | {
        name: run["perplexity"] for name, run in result["runs"].items() if name in ("fastpeft", "HF peft")
    }
    width = 0.8 / len(series)
    for i, (name, values) in enumerate(series.items()):
        places = [text + (i - (len(series) - 1) / 2) * width for text in range(len(texts))]
        bars = axes.bar(
            places, [values[text] for text in texts], width * 0.92, color=COLOURS.get(name, BEFORE), label=name
        )
        axes.bar_label(bars, fmt="%.3g", fontsize=7, padding=1)
    axes.set_xticks(range(len(texts)), texts)
    axes.legend(frameon=False, fontsize=8)
    axes.margins(y=0.15)
    _title(axes, "held-out perplexity")


def _costs(axes, values: dict[str, float], title: str) -> None:
    bars = axes.bar(list(values), list(values.values()), 0.7, color=[COLOURS[name] for name in values])
    axes.bar_label(bars, fmt="%.3g", fontsize=7, padding=1)
    axes.set_xticks(range(len(values)), [name.replace(" ", "\n") for name in values])
    axes.margins(y=0.15)
    _title(axes, title)
