"""What the benches' command lines have in common: options, the refusal without a GPU, a run and its table."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from . import report
from .runner import Bench, Cell, Run, plan_of

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--quick", action="store_true", help="one shape unless named, fewer rounds, no torch.compile")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny shapes unless named")


def whole_numbers(text: str, names: str) -> tuple[int, ...]:
    """The numbers of a shape given as N,N,...; `names` says which."""
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != names.count(",") + 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not {names}")
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: {names} must be at least 1")
    return numbers


def main(
    bench: Bench,
    parser: argparse.ArgumentParser,
    cells: Callable[[argparse.Namespace], list[Cell]],
    argv: Sequence[str] | None,
) -> int:
    """A bench's command line. Returns 0; 1 if something failed to run, 2 for wrong usage, 3 if a result was wrong."""
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as stop:  # argparse's own way out; callers want a number
        return int(stop.code or 0)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print(f"{parser.prog}: torch sees no GPU. --device cpu runs the torch backend on tiny shapes.", file=sys.stderr)
        return 2
    chosen = [(bench, cell) for cell in cells(arguments)]
    document = report.new_document(plan_of(chosen, arguments.device, budget_s=3600.0, quick=arguments.quick))
    document["stamp"] = report.stamp(arguments.device)
    Run(document, lambda: report.save(document, arguments.json) if arguments.json else None, [bench]).measure()
    print(report.table(document), end="")
    return report.exit_code(document)
