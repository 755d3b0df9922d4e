"""`fastpeft tune`: measure on this GPU which strategies and tiles serve which sizes best, and write it down where the
next run finds it.

What is measured stands in `benchmarks/tuning.py`, which only the command line knows.
"""

import argparse
import os
import sys
from dataclasses import dataclass, field

SIZES = ("M,K,N", "B,H,Hkv,S,P,D")


@dataclass(frozen=True)
class Options:
    """op: "lora", "prefix" or "all". shape: sizes as one of SIZES, in place of the usual buckets. out: the table, by
    default in the user's directory. smoke: a rehearsal in Triton's interpreter."""

    op: str = "all"
    seconds: float = 300.0
    out: str | None = None
    shape: list[tuple[int, ...]] = field(default_factory=list)
    smoke: bool = False


def _sizes(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    sizes = tuple(int(part) for part in parts if part.isdecimal())
    if len(sizes) != len(parts) or len(sizes) not in (3, 6) or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither {' nor '.join(SIZES)} of whole numbers from 1")
    if len(sizes) == 6 and sizes[1] % sizes[2]:
        raise argparse.ArgumentTypeError(f"{text!r}: H = {sizes[1]} is no multiple of Hkv = {sizes[2]}")
    return sizes


def seconds(text: str) -> float:
    """A time limit on a command line. Raises ArgumentTypeError."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no time: seconds above 0 are wanted")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", choices=("lora", "prefix", "all"), default="all")
    parser.add_argument("--seconds", type=seconds, default=300.0, metavar="S", help="at most (default 300)")
    parser.add_argument("--out", metavar="FILE", help="the table; by default in the user's cache, where it is found")
    parser.add_argument("--shape", type=_sizes, action="append", default=[], metavar="|".join(SIZES), help="these only")
    parser.add_argument("--smoke", action="store_true", help="rehearse on the CPU; the table is never used")


def options_of(arguments: argparse.Namespace) -> Options:
    """What was asked for; a rehearsal switches Triton's interpreter on, which must be before Triton is imported."""
    if arguments.smoke and "triton" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "1"
    return Options(arguments.op, arguments.seconds, arguments.out, arguments.shape, arguments.smoke)
