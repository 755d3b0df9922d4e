"""What the project wants of a GPU, as numbers that a check-in's results either reach or miss, and by how much.

Set for an H200, in bf16, medians of interleaved rounds: a LoRA linear of Llama-3-8B may cost 11 % more than the frozen
one, 13 % with dropout; attention over 30 virtual tokens must be 1.6 times as fast as HF peft's way at every length. A
target's `stretch` is what would be better still, and no condition. On another GPU these numbers are a comparison, not a
promise.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from .geometry import GRID

Rows = Sequence[dict]
LAYER = {"q/o": 2, "k/v": 2, "gate/up": 2, "down": 1}  # how often a decoder layer has each kind of linear
LAYERS = 32


@dataclass(frozen=True)
class Target:
    """`of` gives the figure from the results that are ok, or None where they do not say. at_least: more is better.
    unit "%": a fraction, written in percent. stretch: what would be better still, where anything is said of it."""

    name: str
    wanted: float
    of: Callable[[Rows], float | None]
    at_least: bool = False
    unit: str = "%"
    stretch: float | None = None


@dataclass(frozen=True)
class Outcome:
    """measured: None where nothing says it. gap: the fraction by which the target is missed, below 0 if it is met.
    stretched: whether it is as good as the target's stretch, None where there is none."""

    target: Target
    measured: float | None

    @property
    def gap(self) -> float | None:
        if self.measured is None:
            return None
        wanted, measured = self.target.wanted, self.measured
        if self.target.unit == "%":  # of the whole time: 12 % where 11 % are allowed is one percent too long
            return (1 + measured) / (1 + wanted) - 1
        if self.target.at_least:
            return wanted / measured - 1 if measured > 0 else math.inf
        return measured / wanted - 1

    @property
    def met(self) -> bool | None:
        return None if self.gap is None else self.gap <= 0

    @property
    def stretched(self) -> bool | None:
        stretch, measured = self.target.stretch, self.measured
        if measured is None or stretch is None:
            return None
        return measured >= stretch if self.target.at_least else measured <= stretch


def _find(rows: Rows, op: str, impl: str, **wanted) -> Iterable[dict]:
    """Rows of forward and backward, or of whole steps, with these sizes."""
    for row in rows:
        known = {**row["shape"], "dropout": row["dropout"]}
        of = (row["op"], row["impl"]) == (op, impl) and row["pass"] in ("fwd+bwd", "step")
        if of and all(known.get(name) == value for name, value in wanted.items()):
            yield row


def _one(rows: Rows, figure: str, op: str, impl: str, **wanted) -> float | None:
    found = next(iter(_find(rows, op, impl, **wanted)), None)
    return None if found is None else found[figure]


def _overhead(op: str, **wanted) -> Callable[[Rows], float | None]:
    return lambda rows: _one(rows, "overhead_over_floor", op, "fastpeft", **wanted)


def _speedup(op: str, peer: str, **wanted) -> Callable[[Rows], float | None]:
    """The mean over all such cells, of ours over the peer."""

    def of(rows: Rows) -> float | None:
        ratios = [row["speedup_vs"].get(peer) for row in _find(rows, op, "fastpeft", **wanted)]
        ratios = [ratio for ratio in ratios if ratio is not None]
        return fmean(ratios) if ratios else None

    return of


def _layer(peer: str, dropout: float) -> Callable[[Rows], float | None]:
    """A layer's linear layers together: the peer's time over ours."""

    def total(rows: Rows, impl: str) -> float | None:
        times = {
            name: _one(rows, "median_ms", "lora_linear", impl, name=f"llama3-8b {name}", r=16, dropout=dropout)
            for name in LAYER
        }
        return None if None in times.values() else sum(times[name] * count for name, count in LAYER.items())

    def of(rows: Rows) -> float | None:
        theirs, ours = total(rows, peer), total(rows, "fastpeft")
        return None if theirs is None or ours is None else theirs / ours

    return of


def _kept_for_dropout(rows: Rows) -> float | None:
    """Bytes that dropout adds to what is kept for backward, for each number of x."""
    of = {"name": "llama3-8b q/o", "r": 16}
    kept = [_one(rows, "saved_bytes", "lora_linear", "fastpeft", **of, dropout=p) for p in (0.05, 0.0)]
    return None if None in kept else (kept[0] - kept[1]) / (8192 * 4096)


def _less_kept(rows: Rows) -> float | None:
    """GB that attention keeps less than HF peft's in 32 layers."""
    sizes = {"name": "llama3-8b", "S": 2048, "P": 30, "B": 8}
    kept = [_one(rows, "saved_bytes", "prefix_attention", impl, **sizes) for impl in ("peft", "fastpeft")]
    return None if None in kept else LAYERS * (kept[0] - kept[1]) / 1e9


def _tokens(**wanted) -> Callable[[Rows], float | None]:
    return lambda rows: _one(rows, "tokens_per_s", "step", "fastpeft", **wanted, dropout=0.0)


def _block(name: str) -> dict:
    """Layers that are one op, as `fastpeft.fuse` makes them."""
    return {"name": f"llama3-8b {name}", "M": 8192, "r": 16, "dropout": 0.0}


_QO = {"name": "llama3-8b q/o", "r": 16}
_GROUPED = {"name": "llama3-8b", "P": 30, "B": 8}
TARGETS = (
    Target("LoRA, q/o, r=16: over the floor", 0.11, _overhead("lora_linear", **_QO, dropout=0.0), stretch=0.09),
    Target("LoRA, q/o, r=16, dropout: over the floor", 0.13, _overhead("lora_linear", **_QO, dropout=0.05),
           stretch=0.11),
    Target("LoRA, q,k,v as one op, r=16: over the floor", 0.09, _overhead("lora_projections", **_block("q,k,v")),
           stretch=0.06),
    Target("LoRA, the MLP as one op, r=16: over the floor", 0.05, _overhead("lora_mlp", **_block("mlp")),
           stretch=0.025),
    Target("LoRA, a layer's linears: vs HF peft, same dtype", 1.20, _layer("peft", 0.0), True, "x", 1.25),
    Target("LoRA, a layer's linears, dropout: vs HF peft", 1.27, _layer("peft", 0.05), True, "x", 1.33),
    Target("LoRA, LoRAFusion's grid: vs HF peft", 1.24, _speedup("lora_linear", "peft", name=GRID), True, "x", 1.30),
    Target("LoRA, LoRAFusion's grid: vs LoRAFusion", 1.04, _speedup("lora_linear", "lorafusion", name=GRID), True, "x",
           1.08),
    Target("LoRA, kept for dropout, for each number of x", 0.125, _kept_for_dropout, unit="bytes", stretch=0.0),
    *(Target(f"prefix, S={length}: over the floor", share, _overhead("prefix_attention", **_GROUPED, S=length))
      for length, share in ((512, 0.30), (2048, 0.12), (8192, 0.04))),
    *(Target(f"prefix, S={length}: vs HF peft", 1.6, _speedup("prefix_attention", "peft", **_GROUPED, S=length),
             True, "x") for length in (512, 2048, 8192)),
    Target("prefix, 32 layers, B=8, S=2048: less kept than HF peft", 8.0, _less_kept, True, "GB"),
    Target("Llama-3-8B, LoRA on all linears, 2 x 4096: a step", 15_000.0,
           _tokens(name="llama3-8b lora", batch=2, seq=4096), True, "tok/s", 17_000.0),
)  # fmt: skip


def outcomes(document: dict) -> list[Outcome]:
    rows = [row for row in document["results"] if row["status"] == "ok"]
    return [Outcome(target, target.of(rows)) for target in TARGETS]


def gaps(found: Sequence[Outcome], count: int = 3) -> list[Outcome]:
    """Of the targets that were missed the furthest, the worst first."""
    missed = [outcome for outcome in found if outcome.gap is not None and outcome.gap > 0]
    return sorted(missed, key=lambda outcome: -outcome.gap)[:count]
