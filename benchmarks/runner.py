"""Works a benchmark's plan off: check, warm up, weigh, time; one cell after the other until the budget is spent.

A bench (`Bench`) says what a cell is and what runs in it; everything here is the same for every op.
"""

import time
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from typing import Any, Protocol

import torch

from fastpeft.cost import Work
from fastpeft.fallback import no_fallback

from .accuracy import Truth
from .baselines import Implementation, Missing
from .harness import (
    Budget,
    ceilings,
    interleave,
    kernel_profile,
    measure_memory,
    synchronize,
    timer_for,
    warm_up,
)
from .replay import COVERED, EAGER, GRAPH, captured
from .report import FLOOR, OURS
from .request import Request
from .rows import Prepared, progress, row_of

PROFILED_CELLS = 1  # of each op
PROFILE_RESERVE_S = 15.0
FIRST_S = {"cuda": 8.0, "cpu": 0.1}  # expected of an op's first cell: most of it is compilation
FIRST_COMPILED_S = {"cuda": 40.0, "cpu": 0.1}  # of torch.compile's


class DeviceLost(RuntimeError):
    """The device no longer answers after an implementation's error; this process can measure nothing more."""


class Cell(Protocol):
    """One shape with everything that is the same for all implementations. `compiled`: torch.compile runs here too.
    A cell may have `launches`, one of `replay`'s: how a GPU is given its kernels."""

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
    compiled: bool = True,
    profile: bool = False,
) -> dict:
    """Plain data, so that a process can be started on it, and started again. `without` names implementations, by op,
    that are not to be run and why, `skip` likewise cells by id. `against`: the peers wanted, None for all. `compiled`:
    whether torch.compile takes part: on a GPU, and not where all is `quick`. `profile`: whether the kernels of the
    first cells are listed, on a GPU."""
    compiled = compiled and device == "cuda" and not quick
    without: dict[str, dict[str, str]] = {}
    counts: dict[str, int] = {}
    entries = []
    for bench, cell in cells:
        without.setdefault(bench.op, {})
        taken = counts.get(bench.op, 0) if compiled else bench.compiled_cells
        counts[bench.op] = taken + 1
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
        "compiled": compiled,
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


def join_ratios(document: dict, rows: Sequence[dict], names: Collection[str]) -> None:
    """Ours in the results gets from our rows of later rounds the ratios to these names."""
    ours = {(key_of_row(row), row["pass"]): row["speedup_vs"] for row in rows if row["impl"] == OURS}
    for row in document["results"]:
        if row["impl"] == OURS:
            later = ours.get((key_of_row(row), row["pass"]), {})
            row["speedup_vs"] |= {peer: ratio for peer, ratio in later.items() if peer in names}


def launches_of(cell: Cell, device: torch.device) -> str:
    """How the cell's kernels are launched there; on a CPU there is one way."""
    return getattr(cell, "launches", COVERED) if device.type == "cuda" else COVERED


def prepare(
    implementation: Implementation, inputs: Any, truth: Truth, device: torch.device, launches: str = COVERED
) -> Prepared:
    """Build, run until compiled, check, and weigh one implementation; what is replayed is checked as a replay."""
    try:
        call = plain = implementation.build(inputs)
        first_s, host_ms = warm_up(plain, device)
        if launches == GRAPH:
            call = captured(plain)
            _, host_ms = warm_up(call, device)
        verdict = truth.verify(call, implementation.rms_bound) if implementation.name != FLOOR else None
        if verdict is not None and verdict.problems:
            return Prepared(implementation, "wrong", "; ".join(verdict.problems), verdict=verdict)
        memory = measure_memory(plain, device, count_saved=not implementation.compiled)
    except Missing as reason:
        return Prepared(implementation, "missing", str(reason))
    except Exception as error:  # a peer or a kernel may raise anything, and the others are still worth measuring
        traceback.print_exc()
        return Prepared(implementation, "failed", _in_words(error))
    return Prepared(implementation, "ok", implementation.said(inputs), call, verdict, memory, first_s, host_ms)


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
        profiled = self.plan["profile"] and self.device.type == "cuda"
        reserve = PROFILE_RESERVE_S if profiled else 0.0
        self._uncompiled(timer, reserve)
        self._compiled(timer, reserve)
        if profiled:
            try:
                self._profile()
            except Exception as error:  # the figures stand without it, and profilers fail for many reasons
                traceback.print_exc()
                self._leave_out("all ops", "kernel profile", None, _in_words(error))
        self.document["running"] = None
        self.save()

    def _uncompiled(self, timer, reserve: float) -> None:
        done = set(map(key_of_row, self.document["results"]))
        durations: dict[str, list[float]] = {}
        for number, (bench, cell) in enumerate(self.cells):
            self._done = number
            if key_of(bench, cell) in done or cell.id in self.plan["skip"]:
                continue
            spent = durations.setdefault(bench.op, [])
            if not self.budget.allows(spent or [FIRST_S[self.device.type]], reserve):
                self._leave_out(bench.op, cell.id, None, f"the budget of {self.budget.seconds:.0f} s was spent")
                continue
            start = self.budget.elapsed()
            rows = self._cell(bench, cell, timer, [i for i in self._taking_part(bench) if not i.compiled])
            spent.append(self.budget.elapsed() - start)
            self.document["results"].extend(rows)
            self.save()
            self.say(progress(bench, cell, rows, self.budget))

    def _compiled(self, timer, reserve: float) -> None:
        """torch.compile's, when all the others are measured: beside the floor and ours once more, since ratios are
        taken within rounds. Of those rounds ours gets the ratios to the compiled ones alone."""
        spent: list[float] = []
        known = {(key_of_row(row), row["impl"]) for row in self.document["results"]}
        for bench, cell in self.cells:
            compiled = [
                i for i in self._taking_part(bench) if i.compiled and (key_of(bench, cell), i.name) not in known
            ]
            if not (cell.compiled and compiled and (key_of(bench, cell), FLOOR) in known):
                continue
            if not self.budget.allows(spent or [FIRST_COMPILED_S[self.device.type]], reserve):
                for implementation in compiled:
                    self._leave_out(bench.op, cell.id, implementation.name, "no time was left to compile it")
                continue
            beside = [i for i in self._taking_part(bench) if i.name in (FLOOR, OURS)]
            start = self.budget.elapsed()
            rows = self._cell(bench, cell, timer, [*beside, *compiled])
            spent.append(self.budget.elapsed() - start)
            names = {implementation.name for implementation in compiled}
            added = [row for row in rows if row["impl"] in names]
            join_ratios(self.document, rows, names)
            self.document["results"].extend(added)
            self.save()
            if added:
                self.say(progress(bench, cell, added, self.budget))

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
            if any(compiled) and not all(compiled):
                for implementation in (i for i in self._taking_part(bench) if i.compiled):
                    reason = f"compiled in {sum(compiled)} cells only"
                    self._leave_out(bench.op, "other cells", implementation.name, reason)

    def _taking_part(self, bench: Bench) -> list[Implementation]:
        without, against = self.plan["without"].get(bench.op, {}), self.plan["against"]
        taking_part = [i for i in bench.implementations if i.name not in without]
        if against is None:
            return taking_part
        return [i for i in taking_part if not i.peer or i.name == FLOOR or i.name in against]

    @no_fallback()
    def _cell(self, bench: Bench, cell: Cell, timer, members: Sequence[Implementation]) -> list[dict]:
        self._enter(bench.op, cell.id, None, "truth")
        try:
            inputs = bench.inputs(cell, self.device)
            truth = bench.truth(inputs)
        except torch.OutOfMemoryError as error:
            self._leave_out(bench.op, cell.id, None, f"no memory for its float64 truth: {_in_words(error)}")
            return []
        prepared, launches = [], launches_of(cell, self.device)
        for implementation in members:
            if not implementation.serves(inputs):
                continue
            self._enter(bench.op, cell.id, implementation.name, "check")
            prepared.append(prepare(implementation, inputs, truth, self.device, launches))
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
            {} if launches == EAGER else {name: p.host_ms for name, p in ready.items()},
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
