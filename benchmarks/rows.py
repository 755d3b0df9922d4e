"""What a cell's samples become: a row for each implementation and pass, and a line of words."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from .accuracy import Verdict
from .baselines import Implementation
from .harness import Budget, Call, Memory, Sample, paired_ratio, summarise
from .report import FLOOR


@dataclass
class Prepared:
    """An implementation that has passed its check, or the reason why it has no figures."""

    implementation: Implementation
    status: str
    note: str = ""
    call: Call | None = None
    verdict: Verdict | None = None
    memory: Memory = field(default_factory=lambda: Memory(None, None, None))
    first_s: float | None = None
    host_ms: float | None = None


# The milliseconds of a pass, of one sample.
PASS_MS = {
    "fwd": lambda sample: sample.forward_ms,
    "bwd": lambda sample: sample.total_ms - sample.forward_ms,
    "fwd+bwd": lambda sample: sample.total_ms,
}


def row_of(bench, cell, prepared: Prepared, samples: dict[str, list], passed: str = "fwd+bwd") -> dict:
    """One entry of the results, without any time unless the implementation was found right."""
    implementation, memory = prepared.implementation, prepared.memory
    adapter = None if implementation.name == FLOOR else cell.dtype
    row = {
        "op": bench.op,
        "impl": implementation.name,
        "label": implementation.label,
        "strategy": implementation.strategy,
        "adapter_dtype": "fp32" if implementation.adapter_dtype == torch.float32 else adapter,
        "shape": cell.shape(),
        "dtype": cell.dtype,
        "dropout": cell.dropout,
        "pass": passed,
        "status": prepared.status,
        **dict.fromkeys(("median_ms", "p20_ms", "p80_ms", "forward_ms", "gbps", "tflops", "tokens_per_s", "mfu")),
        **dict.fromkeys(("overhead_over_floor", "overhead_p20", "overhead_p80")),
        "rounds": 0,
        "speedup_vs": {},
        "host_ms": prepared.host_ms,
        "first_s": prepared.first_s,
        "peak_bytes": memory.peak,
        "held_bytes": memory.held,
        "saved_bytes": memory.saved,
        "checked": prepared.verdict.as_json() if prepared.verdict else None,
        "note": prepared.note,
    }
    return row | _times(bench, cell, implementation, samples, passed) if prepared.status == "ok" else row


def _times(bench, cell, implementation: Implementation, samples: dict[str, list], passed: str) -> dict:
    name = implementation.name
    work = implementation.work(cell, passed) if implementation.work else cell.work(name == FLOOR, passed)
    # Where the floor has nothing to do, as an embedding's backward, there is nothing to be over.
    peers = [implementation.name for implementation in bench.implementations if implementation.peer]
    times = times_of(name, samples, PASS_MS[passed], peers, over_floor=any(cell.work(True, passed)))
    milliseconds = times["median_ms"]
    return times | {"gbps": work.bytes / milliseconds / 1e6, "tflops": work.flops / milliseconds / 1e9}


def times_of(
    name: str,
    samples: Mapping[str, Sequence[Sample]],
    milliseconds: Callable[[Sample], float],
    peers: Sequence[str],
    over_floor: bool = True,
) -> dict:
    """What a row says of one implementation's time, by `milliseconds` of a sample, and beside the others of its rounds:
    the peers, unless it is the floor, and the floor."""
    totals = {other: [milliseconds(sample) for sample in found] for other, found in samples.items()}
    summary = summarise(totals[name])
    beside = [peer for peer in peers if peer in totals and FLOOR not in (name, peer) and peer != name]
    times = {
        "median_ms": summary.median,
        "p20_ms": summary.p20,
        "p80_ms": summary.p80,
        "rounds": summary.rounds,
        "forward_ms": summarise([sample.forward_ms for sample in samples[name]]).median,
        "speedup_vs": {peer: paired_ratio(totals[peer], totals[name]).median for peer in beside},
    }
    if FLOOR in totals and over_floor:
        over = paired_ratio(totals[name], totals[FLOOR])
        times |= {"overhead_over_floor": over.median - 1, "overhead_p20": over.p20 - 1, "overhead_p80": over.p80 - 1}
    return times


def progress(bench, cell, rows: list[dict], budget: Budget) -> str:
    """`[elapsed/budget s] op: cell: floor ms, implementation +overhead %, ...`"""
    parts = []
    for row in (row for row in rows if row["pass"] == rows[-1]["pass"]):
        if row["status"] != "ok":
            parts.append(f"{row['impl']} {row['status']}")
        elif row["impl"] == FLOOR or row["overhead_over_floor"] is None:
            parts.append(f"{row['impl']} {row['median_ms']:.3f} ms")
        else:
            parts.append(f"{row['impl']} {100 * row['overhead_over_floor']:+.1f}%")
    return f"[{budget.elapsed():.0f}/{budget.seconds:.0f} s] {bench.op}: {cell.id}: {', '.join(parts)}"
