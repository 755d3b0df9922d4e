"""Works a benchmark's plan off: check, warm up, weigh, time; one cell after the other until the budget is spent.

A bench (`Bench`) says what a cell is and what runs in it; everything here is the same for every op.
"""

import time
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import zip_longest
from typing import Any, Protocol

import torch

from fastpeft.cost import Work

from .accuracy import Truth, Verdict
from .baselines import Implementation, Missing
from .harness import (
    Budget,
    Call,
    Memory,
    ceilings,
    interleave,
    kernel_profile,
    measure_memory,
    paired_ratio,
    summarise,
    synchronize,
    timer_for,
    warm_up,
)
from .report import FLOOR
from .request import Request

PROFILED_CELLS = 1  # of each op
PROFILE_RESERVE_S = 25.0


class DeviceLost(RuntimeError):
    """The device no longer answers after an implementation's error; this process can measure nothing more."""


class Cell(Protocol):
    """One shape with everything that is the same for all implementations. `compiled`: torch.compile runs here too."""

    dtype: str
    dropout: float
    compiled: bool

    @property
    def id(self) -> str: ...

    def shape(self) -> dict: ...

    def work(self, frozen: bool, passed: str) -> Work: ...


@dataclass(frozen=True, eq=False)
class Bench:
    """An op's benchmark: its cells (from the plan's entries), its tensors and truth, and who takes part.

    tiers: of all cells, or of tiny ones, the most important first; a check-in takes them in turns with other ops'.
    cells: those that a command line asks for. sizes: what a shape by numbers is. understands: which options the op has.
    compiled_cells: in how many cells, the first ones, torch.compile takes part: 10 to 30 s of compilation each.
    """

    op: str
    cell: Callable[..., Cell]
    inputs: Callable[[Any, torch.device], Any]
    truth: Callable[[Any], Truth]
    implementations: Sequence[Implementation]
    tiers: Callable[[bool], list[list[Cell]]]
    cells: Callable[[Request], list[Cell]]
    sizes: str
    understands: tuple[str, ...]
    compiled_cells: int = 1


def plan_of(
    cells: Sequence[tuple[Bench, Cell]],
    device: str,
    *,
    budget_s: float,
    quick: bool = False,
    passes: Sequence[str] = ("fwd+bwd",),
    against: Collection[str] | None = None,
    profile: bool = False,
) -> dict:
    """Plain data, so that a process can be started on it, and started again. `without` names implementations, by op,
    that are not to be run and why, `skip` likewise cells by id. `against`: the peers wanted, None for all. `profile`:
    whether the kernels of the first cells are listed, on a GPU."""
    without: dict[str, dict[str, str]] = {}
    compiled: dict[str, int] = {}
    entries = []
    for bench, cell in cells:
        without.setdefault(bench.op, {})
        taken = compiled.get(bench.op, 0) if device == "cuda" and not quick else bench.compiled_cells
        compiled[bench.op] = taken + 1
        entries.append({"op": bench.op, **asdict(replace(cell, compiled=taken < bench.compiled_cells))})
        if device == "cpu":
            for implementation in bench.implementations:
                if implementation.compiled:
                    without[bench.op][implementation.name] = "not compiled on the CPU path"
                elif implementation.needs_gpu:
                    without[bench.op][implementation.name] = "its kernels need a GPU"
    return {
        "device": device,
        "tiny": device == "cpu",
        "cells": entries,
        "budget_s": budget_s,
        "rounds": [3, 5] if quick else [10, 60],
        "seconds_per_cell": 2.5,
        "passes": list(passes),
        "against": None if against is None else sorted(against),
        "profile": profile,
        "without": without,
        "skip": {},
    }


def in_turns(benches: Sequence[Bench], *, tiny: bool = False) -> list[tuple[Bench, Cell]]:
    """All cells of several benches: the first tier of each, the second of each, and so on."""
    rounds = zip_longest(*(bench.tiers(tiny) for bench in benches), fillvalue=())
    return [(bench, cell) for tiers in rounds for bench, tier in zip(benches, tiers, strict=True) for cell in tier]


def cells_of(plan: dict, benches: Mapping[str, Bench]) -> list[tuple[Bench, Cell]]:
    """The cells of a plan, read back."""
    found = []
    for entry in plan["cells"]:
        bench = benches[entry["op"]]
        found.append((bench, bench.cell(**{name: value for name, value in entry.items() if name != "op"})))
    return found


def key_of(bench: Bench, cell: Cell) -> tuple:
    """What identifies a cell among results."""
    return bench.op, tuple(cell.shape().values()), cell.dropout, cell.dtype


def key_of_row(row: dict) -> tuple:
    return row["op"], tuple(row["shape"].values()), row["dropout"], row["dtype"]


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


def prepare(implementation: Implementation, inputs: Any, truth: Truth, device: torch.device) -> Prepared:
    """Build, run until compiled, check, and weigh one implementation."""
    try:
        call = implementation.build(inputs)
        first_s, host_ms = warm_up(call, device)
        verdict = truth.verify(call, implementation.rms_bound) if implementation.name != FLOOR else None
        if verdict is not None and verdict.problems:
            return Prepared(implementation, "wrong", "; ".join(verdict.problems), verdict=verdict)
        memory = measure_memory(call, device, count_saved=not implementation.compiled)
    except Missing as reason:
        return Prepared(implementation, "missing", str(reason))
    except Exception as error:  # a peer or a kernel may raise anything, and the others are still worth measuring
        traceback.print_exc()
        return Prepared(implementation, "failed", _in_words(error))
    return Prepared(implementation, "ok", "", call, verdict, memory, first_s, host_ms)


def _in_words(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def require_device(device: torch.device) -> None:
    """Raises DeviceLost if a kernel's fault has taken the process's device context with it."""
    try:
        torch.ones(1, device=device).add_(1)
        synchronize(device)
    except RuntimeError as error:
        raise DeviceLost(_in_words(error)) from error


def say_line(text: str) -> None:
    print(text, flush=True)


class Run:
    """One pass over document["plan"]. Rows go to document["results"]; `save` is called after every cell and before
    every step that could end the process, which document["running"] then names. `say` gets a line for each cell,
    `watch` the number of cells done and what runs now."""

    def __init__(
        self,
        document: dict,
        save: Callable[[], None],
        benches: Sequence[Bench],
        budget: Budget | None = None,
        *,
        say: Callable[[str], None] = say_line,
        watch: Callable[[int, str], None] = lambda done, note: None,
    ):
        self.document, self.save, self.say, self.watch = document, save, say, watch
        self.plan = document["plan"]
        self.budget = budget or Budget(self.plan["budget_s"])
        self.device = torch.device(self.plan["device"])
        self.cells = cells_of(self.plan, {bench.op: bench for bench in benches})
        self._done = 0

    def measure(self) -> None:
        """Every cell that has no results yet, in order. What the budget does not allow, and what the plan leaves out,
        is named in document["unmeasured"]."""
        if self.document["stamp"]["ceilings"]["copy_gbps"] is None:
            self._enter("", "-", None, "ceilings")
            self.document["stamp"]["ceilings"] = ceilings(self.device, torch.bfloat16, tiny=self.plan["tiny"])
        timer = timer_for(self.device)
        self._name_what_is_left_out()
        done = set(map(key_of_row, self.document["results"]))
        durations: dict[str, list[float]] = {}
        profiled = self.plan["profile"] and self.device.type == "cuda"
        reserve = PROFILE_RESERVE_S if profiled else 0.0
        for number, (bench, cell) in enumerate(self.cells):
            self._done = number
            if key_of(bench, cell) in done or cell.id in self.plan["skip"]:
                continue
            spent = durations.setdefault(bench.op, [])
            if not self.budget.allows(spent, reserve):
                self._leave_out(bench.op, cell.id, None, f"the budget of {self.budget.seconds:.0f} s was spent")
                continue
            start = self.budget.elapsed()
            rows = self._cell(bench, cell, timer)
            spent.append(self.budget.elapsed() - start)
            self.document["results"].extend(rows)
            self.save()
            self.say(progress(bench, cell, rows, self.budget))
        if profiled:
            try:
                self._profile()
            except Exception as error:  # the figures stand without it, and profilers fail for many reasons
                traceback.print_exc()
                self._leave_out("all ops", "kernel profile", None, _in_words(error))
        self.document["running"] = None
        self.save()

    def _enter(self, op: str, cell: str, implementation: str | None, stage: str) -> None:
        self.document["running"] = {"op": op, "cell": cell, "impl": implementation, "stage": stage}
        self.save()
        self.watch(self._done, " ".join(filter(None, (op, cell, implementation, stage))))

    def _leave_out(self, op: str, cell: str, implementation: str | None, reason: str) -> None:
        entry = {"op": op, "cell": cell, "impl": implementation, "reason": reason}
        if entry not in self.document["unmeasured"]:
            self.document["unmeasured"].append(entry)

    def _name_what_is_left_out(self) -> None:
        begun = {(row["op"], row["impl"]) for row in self.document["results"]}
        for op, names in self.plan["without"].items():
            for name, reason in names.items():
                self._leave_out(op, "later cells" if (op, name) in begun else "all cells", name, reason)
        for bench, cell in self.cells:
            if cell.id in self.plan["skip"]:
                self._leave_out(bench.op, cell.id, None, self.plan["skip"][cell.id])
        for bench in dict.fromkeys(bench for bench, _ in self.cells):
            compiled = [cell.compiled for owner, cell in self.cells if owner is bench]
            if not all(compiled):
                for implementation in (i for i in self._taking_part(bench) if i.compiled):
                    reason = f"compiled in {sum(compiled)} cells only"
                    self._leave_out(bench.op, "other cells", implementation.name, reason)

    def _taking_part(self, bench: Bench) -> list[Implementation]:
        without, against = self.plan["without"].get(bench.op, {}), self.plan["against"]
        taking_part = [i for i in bench.implementations if i.name not in without]
        if against is None:
            return taking_part
        return [i for i in taking_part if not i.peer or i.name == FLOOR or i.name in against]

    def _cell(self, bench: Bench, cell: Cell, timer) -> list[dict]:
        self._enter(bench.op, cell.id, None, "truth")
        try:
            inputs = bench.inputs(cell, self.device)
            truth = bench.truth(inputs)
        except torch.OutOfMemoryError as error:
            self._leave_out(bench.op, cell.id, None, f"no memory for its float64 truth: {_in_words(error)}")
            return []
        prepared = []
        for implementation in self._taking_part(bench):
            if implementation.compiled and not cell.compiled or not implementation.serves(inputs):
                continue
            self._enter(bench.op, cell.id, implementation.name, "check")
            prepared.append(prepare(implementation, inputs, truth, self.device))
            if prepared[-1].status == "failed":
                require_device(self.device)
        del truth
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self._enter(bench.op, cell.id, None, "timing")
        ready = {p.implementation.name: p for p in prepared if p.status == "ok"}
        samples = interleave(
            timer,
            {name: p.call for name, p in ready.items()},
            {name: p.host_ms for name, p in ready.items()},
            rounds=tuple(self.plan["rounds"]),
            seconds=self.plan["seconds_per_cell"],
        )
        return [row_of(bench, cell, p, samples, passed) for passed in self.plan["passes"] for p in prepared]

    def _profile(self) -> None:
        """Which kernels ran, and how long, for the first cells of each op: last of all, because a profiler leaves
        traces in the process that later timings would carry."""
        spent: list[float] = []
        right = {(key_of_row(row), row["impl"]) for row in self.document["results"] if row["status"] == "ok"}
        for bench in dict.fromkeys(bench for bench, _ in self.cells):
            for cell in [cell for owner, cell in self.cells if owner is bench][:PROFILED_CELLS]:
                inputs = bench.inputs(cell, self.device)
                for implementation in self._taking_part(bench):
                    known = (key_of(bench, cell), implementation.name) in right
                    if implementation.compiled or not known or not self.budget.allows(spent):
                        continue
                    self._enter(bench.op, cell.id, implementation.name, "profile")
                    start = time.monotonic()
                    kernels = kernel_profile(implementation.build(inputs), self.device)
                    spent.append(time.monotonic() - start)
                    self.document["kernels"].append(
                        {
                            "op": bench.op,
                            "impl": implementation.name,
                            "shape": cell.shape(),
                            "dropout": cell.dropout,
                            "launches": sum(kernel["launches"] for kernel in kernels),
                            "kernels": kernels,
                        }
                    )


# The milliseconds of a pass, of one sample.
PASS_MS = {
    "fwd": lambda sample: sample.forward_ms,
    "bwd": lambda sample: sample.total_ms - sample.forward_ms,
    "fwd+bwd": lambda sample: sample.total_ms,
}


def row_of(bench: Bench, cell: Cell, prepared: Prepared, samples: dict[str, list], passed: str = "fwd+bwd") -> dict:
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
    return row | _times(bench, cell, row["impl"], samples, passed) if prepared.status == "ok" else row


def _times(bench: Bench, cell: Cell, name: str, samples: dict[str, list], passed: str) -> dict:
    totals = {other: [PASS_MS[passed](sample) for sample in found] for other, found in samples.items()}
    summary = summarise(totals[name])
    frozen = name == FLOOR
    peers = [i.name for i in bench.implementations if i.peer and i.name in totals and i.name not in (FLOOR, name)]
    work = cell.work(frozen, passed)
    times = {
        "median_ms": summary.median,
        "p20_ms": summary.p20,
        "p80_ms": summary.p80,
        "rounds": summary.rounds,
        "forward_ms": summarise([sample.forward_ms for sample in samples[name]]).median,
        "gbps": work.bytes / summary.median / 1e6,
        "tflops": work.flops / summary.median / 1e9,
        "speedup_vs": {} if frozen else {peer: paired_ratio(totals[peer], totals[name]).median for peer in peers},
    }
    # Where the floor has nothing to do, as an embedding's backward, there is nothing to be over.
    if FLOOR in totals and any(cell.work(True, passed)):
        over = paired_ratio(totals[name], totals[FLOOR])
        times |= {"overhead_over_floor": over.median - 1, "overhead_p20": over.p20 - 1, "overhead_p80": over.p80 - 1}
    return times


def progress(bench: Bench, cell: Cell, rows: list[dict], budget: Budget) -> str:
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
