"""`fastpeft bench`, or `python -m benchmarks` in a checkout: what is asked for, a run, and what is left of it.

Exit status: 0; 1 if something raised, or is slower than --compare's file says beyond the noise; 2 for wrong usage; 3 if
a result was wrong.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch

from fastpeft.console import Console
from fastpeft.errors import FastpeftError

from . import bench_step, compare, lines, plot, predict, report, screen
from .benches import BENCHES, STEP
from .harness import Budget
from .options import ALL, parser, refuse_files, refuse_options, refuse_peers, request_of
from .report import FLOOR
from .request import Request
from .runner import Bench, Cell, Run, plan_of

Chosen = list[tuple[Bench, Cell]]


def main(argv: Sequence[str] | None = None, prog: str = "python -m benchmarks") -> int:
    """The command line. Returns the exit status."""
    try:
        arguments = parser(prog).parse_args(argv)
    except SystemExit as stop:  # argparse's own way out; callers want a number
        return int(stop.code or 0)
    try:
        return _run(arguments)
    except FastpeftError as error:
        print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _run(arguments: argparse.Namespace) -> int:
    ops = [*BENCHES, STEP] if arguments.op == ALL else [arguments.op]
    refuse_options(arguments, ops)
    benches = [BENCHES[op] for op in ops if op != STEP]
    peers = {i.name for bench in benches for i in bench.implementations if i.peer} - {FLOOR}
    refuse_peers(arguments.against or (), peers | (set(bench_step.PEERS) if STEP in ops else set()))
    refuse_files(arguments.json, arguments.plot)
    if arguments.predict:
        return _predict(arguments, ops)
    device = _device(arguments.device)
    if arguments.plot:
        plot.check_path(arguments.plot)
    old = lines.load(arguments.compare) if arguments.compare else None
    chosen, steps, refused = _chosen(ops, request_of(arguments, tiny=device == "cpu"))
    document = _measure(arguments, device, chosen, steps, refused)
    return _finish(document, arguments, old)


def _device(wanted: str | None) -> str:
    """Raises FastpeftError where a GPU is asked for and torch sees none."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise FastpeftError("torch sees no GPU. --device cpu runs the torch backend on tiny shapes")
    return wanted or ("cuda" if torch.cuda.is_available() else "cpu")


def _chosen(ops: Sequence[str], request: Request) -> tuple[Chosen, list, dict[str, str]]:
    """(cells of the ops, cases of steps, what has no such shape and why). Raises FastpeftError if nothing is left."""
    chosen: Chosen = []
    steps: list = []
    refused: dict[str, str] = {}
    for op in ops:
        try:
            if op == STEP:
                steps = bench_step.cases(request)
            else:
                chosen += [(BENCHES[op], cell) for cell in BENCHES[op].cells(request)]
        except FastpeftError as error:
            refused[op if op == STEP else BENCHES[op].op] = str(error)
    if not chosen and not steps:
        raise FastpeftError("; ".join(refused.values()) or "nothing of that shape is there to measure")
    return chosen, steps, refused


def _predict(arguments: argparse.Namespace, ops: Sequence[str]) -> int:
    if ops == [STEP]:
        raise FastpeftError("no prediction for whole steps: choose one of " + ", ".join(BENCHES))
    chosen, _, refused = _chosen([op for op in ops if op != STEP], request_of(arguments, tiny=False))
    for op, reason in refused.items():
        print(f"{predict.MARK} none for {op}: {reason}")
    found, asked = [], list(dict.fromkeys(bench for bench, _ in chosen))
    known = [bench for bench in asked if bench.op in predict.DESIGNS] or asked
    for bench in asked:
        if bench not in known:
            print(f"{predict.MARK} none for {bench.op}: no ledger says what it launches")
    for passed in arguments.passes or ("fwd+bwd",):
        for bench in known:
            some = predict.predictions(bench, [cell for owner, cell in chosen if owner is bench], passed)
            print(predict.text(some), end="")
            found += some
    if arguments.json:
        arguments.json.write_text("".join(json.dumps(entry) + "\n" for entry in found))
    return 0


def _measure(arguments, device: str, chosen: Chosen, steps: list, refused: dict[str, str]) -> dict:
    """The document of a run, its JSON lines rewritten after every cell."""
    plan = plan_of(
        chosen,
        device,
        budget_s=arguments.seconds,
        quick=arguments.quick,
        passes=list(dict.fromkeys(arguments.passes or ["fwd+bwd"])),
        against=arguments.against,
    )
    document = report.new_document(plan)
    document["stamp"] = report.stamp(device)
    document["unmeasured"] += [
        {"op": op, "cell": "all cells", "impl": None, "reason": reason} for op, reason in refused.items()
    ]

    def save() -> None:
        if arguments.json and document["results"]:
            lines.save(lines.of(document), arguments.json)

    console, budget = Console(), Budget(arguments.seconds)
    total = len(chosen) + len(steps)
    bar = screen.progress(total, console) if console.rich else contextlib.nullcontext(lambda done, note: None)
    with bar as advance:
        benches = list(dict.fromkeys(bench for bench, _ in chosen))
        Run(document, save, benches, budget, say=console.line, watch=advance).measure()
        if steps:
            watch = partial(_after, len(chosen), advance)
            bench_step.Steps(document, steps, save, budget, console.line, watch=watch).measure()
    return document


def _after(before: int, advance: Callable[[int, str], None], done: int, note: str) -> None:
    """Progress of what comes after `before` others."""
    advance(before + done, note)


def _finish(document: dict, arguments: argparse.Namespace, old: list[dict] | None) -> int:
    """Shown, written, drawn, compared; the exit status."""
    found = lines.of(document)
    screen.show(document, Console())
    if arguments.json:
        lines.save(found, arguments.json)
        print(f"JSON lines: {arguments.json}")
    status = report.exit_code(document)
    if arguments.plot and any(row["status"] == "ok" for row in document["results"]):
        plot.save(found, arguments.plot)
        print(f"plot: {arguments.plot}")
    elif arguments.plot:
        print("no plot: nothing was measured")
    if old is None:
        return status
    comparison = compare.compare(old, found)
    print(compare.text(comparison), end="")
    return status or int(comparison.failed)
