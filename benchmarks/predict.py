"""What the arithmetic says that a GPU will take, before one has been asked. Predictions, never measurements: their keys
are called so, every line of their text says so, and no file of results takes them.

A kernel is as long as its operations or its bytes take, whichever is more, at a fixed share of the machine's peak;
kernels follow each other without a gap, and read a tensor once. So launches, short sequences' poor rates and the caches
are left out, and the overheads are those of large shapes at best.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from fastpeft import cost
from fastpeft.cost import MACHINES, PASSES, Machine, Work
from fastpeft.errors import FastpeftError

from . import designs
from .designs import DESIGNS, Design, Launch
from .replay import COVERED, EAGER

ITEMSIZE = {"bf16": 2, "fp16": 2}  # the peaks are those of products of these

# Shares of the data sheets' peaks, all from figures that others report of Hopper GPUs and that are carried over to the
# other machines: cuBLAS at 790 of 989 TFLOP/s and copies at 4.3 of 4.8 TB/s on an H200; Triton's products 5 % behind;
# cuDNN's and FlashAttention-3's causal kernels, head dimension 128, at half of the peak forward and two fifths
# backward; Triton's at 365 TFLOP/s forward (FlashAttention-3's paper, from 4096 tokens on) and 245 backward.
SHARES = {
    designs.PRODUCT: 0.80,
    designs.TRITON_PRODUCT: 0.76,
    designs.FLASH: 0.50,
    designs.FLASH_BACKWARD: 0.40,
    designs.TRITON_FLASH: 0.37,
    designs.TRITON_FLASH_BACKWARD: 0.25,
    designs.PASS: 0.80,
}
MEMORY_SHARE = 0.90
LINEARS = ("lora_linear", "dora_linear")  # their dropout is a size of theirs
LEAST = "least"  # everything in one kernel a pass, at the floor's rates: `fastpeft.cost`


def milliseconds(kind: str, work: Work, machine: Machine) -> float:
    """Of one kernel, at the shares above."""
    attained = Machine(machine.name, SHARES[kind] * machine.tflops, MEMORY_SHARE * machine.gbps)
    return cost.floor_ms(work, attained)


def _sum_ms(launches: Iterable[Launch], machine: Machine) -> float:
    return sum(milliseconds(launch.kind, launch.work, machine) for launch in launches)


def _of_pass(passed: str, both: Sequence[Any]) -> list:
    """What of [forward, backward] the pass has."""
    return {"fwd": both[:1], "bwd": both[1:], "fwd+bwd": both}[passed]


def _sizes(op: str, cell) -> dict:
    """The arguments of an op's design and of its cost. Raises FastpeftError for a type without a known peak."""
    if cell.dtype not in ITEMSIZE:
        raise FastpeftError(f"no prediction for {cell.dtype}: the peaks are of bf16 and fp16; choose --dtype bf16")
    shape = cell.shape()
    sizes = {name: shape[name] for name in DESIGNS[op].sizes} | {"itemsize": ITEMSIZE[cell.dtype]}
    if op in LINEARS:
        return sizes | {"dropout": cell.dropout}
    return sizes | {"causal": bool(shape["causal"])} if "causal" in shape else sizes


def _strategies(op: str, cell) -> tuple[str, ...]:
    """Those that serve the cell: ALiBi and attention's dropout are the kernels' own."""
    modified = op not in LINEARS and (cell.shape().get("alibi") or cell.dropout)
    return ("fused",) if modified else DESIGNS[op].strategies


def _times(op: str, cell, passed: str, machine: Machine) -> dict[str, float]:
    """{"frozen": ms, "least": ms, strategy: ms, ...}."""
    design: Design = DESIGNS[op]
    sizes = _sizes(op, cell)
    times = {}
    for strategy in ("frozen", *_strategies(op, cell)):
        times[strategy] = sum(_sum_ms(part, machine) for part in _of_pass(passed, design.launches(strategy, **sizes)))
    least = [Launch(LEAST, kind, getattr(cost, op)(each, **sizes)) for each, kind in zip(
        ("fwd", "bwd"), (design.forward, design.backward), strict=True
    )]  # fmt: skip
    return times | {LEAST: _sum_ms(_of_pass(passed, least), machine)}


def predictions(
    bench, cells: Iterable, passed: str = "fwd+bwd", machines: Iterable[str] = tuple(MACHINES)
) -> list[dict]:
    """One entry for each machine, cell and implementation: {"prediction": True, "machine", "peak_tflops", "peak_gbps",
    "op", "cell", "dtype", "dropout", "pass", "impl", "predicted_ms", "predicted_floor_ms", "predicted_overhead"}.

    The peaks are those of the data sheet. `predicted_overhead`: a fraction over the floor's prediction, or None
    where the floor has nothing to do. Raises FastpeftError for an op, a pass or a type that nothing is known of.
    """
    if bench.op not in DESIGNS:
        raise FastpeftError(f"no prediction for {bench.op}: choose one of {', '.join(DESIGNS)}")
    if passed not in PASSES:
        raise FastpeftError(f"no prediction for the pass {passed!r}: choose one of {', '.join(PASSES)}")
    found = []
    for cell in cells:
        if getattr(cell, "launches", COVERED) == EAGER:
            continue  # a host's time is not predicted
        for machine in (MACHINES[name] for name in machines):
            times = _times(bench.op, cell, passed, machine)
            floor = times.pop("frozen")
            for name, ms in times.items():
                found.append(
                    {
                        "prediction": True,
                        "machine": machine.name,
                        "peak_tflops": machine.tflops,
                        "peak_gbps": machine.gbps,
                        "op": bench.op,
                        "cell": cell.id,
                        "dtype": cell.dtype,
                        "dropout": cell.dropout,
                        "pass": passed,
                        "impl": name if name == LEAST else f"fastpeft:{name}",
                        "predicted_ms": ms,
                        "predicted_floor_ms": floor,
                        "predicted_overhead": ms / floor - 1 if floor else None,
                    }
                )
    return found


MARK = "prediction:"


def text(found: Sequence[dict]) -> str:
    """The figures that were assumed, then a line for each cell and machine; every line begins with "prediction:"."""
    lines = [*_assumptions(found)]
    for op in dict.fromkeys(entry["op"] for entry in found):
        entries = [entry for entry in found if entry["op"] == op]
        lines.append(f"{op}, {entries[0]['pass']}: overhead in % over the floor, none of it measured")
        lines += _aligned(_rows(entries))
    return "".join(f"{MARK} {line}\n" for line in lines)


def _assumptions(found: Sequence[dict]) -> Iterable[str]:
    machines = dict.fromkeys((entry["machine"], entry["peak_tflops"], entry["peak_gbps"]) for entry in found)
    peaks = "; ".join(f"{name} {tflops:.0f} TFLOP/s, {gbps / 1000:.2f} TB/s" for name, tflops, gbps in machines)
    yield f"peaks of the vendors' data sheets, dense bf16: {peaks}"
    shares = ", ".join(f"{kind} {100 * share:.0f} %" for kind, share in SHARES.items())
    yield f"assumed of the peak, from what others report of Hopper GPUs: {shares}, memory {100 * MEMORY_SHARE:.0f} %"
    yield "not counted: gaps between launches, short kernels' poor rates, caches, partial sums"
    yield f"{LEAST}: everything in one kernel a pass at the floor's rates, which no kernel here attempts"


def _rows(entries: Sequence[dict]) -> list[list[str]]:
    names = list(dict.fromkeys(entry["impl"] for entry in entries))
    rows: dict[tuple, dict[str, dict]] = {}
    for entry in entries:
        rows.setdefault((entry["cell"], entry["machine"]), {})[entry["impl"]] = entry
    out = [["cell", "machine", "floor ms", *names]]
    for (cell, machine), of in rows.items():
        floor = next(iter(of.values()))["predicted_floor_ms"]
        out.append([cell, machine, f"{floor:.3f}", *(_percent(of.get(name)) for name in names)])
    return out


def _percent(entry: dict | None) -> str:
    if entry is None:
        return "·"
    overhead = entry["predicted_overhead"]
    return f"{entry['predicted_ms']:.3f} ms" if overhead is None else f"{100 * overhead:+.1f}"


def _aligned(rows: list[list[str]]) -> list[str]:
    """Text to the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            word.ljust(width) if place < 2 else word.rjust(width)
            for place, (word, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
