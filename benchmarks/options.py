"""The options of `fastpeft bench`, and what of them makes no sense."""

import argparse
from collections.abc import Collection, Sequence
from pathlib import Path

from fastpeft.cost import PASSES
from fastpeft.errors import FastpeftError
from fastpeft.tune import seconds

from .benches import BENCHES, STEP
from .dtypes import DTYPES
from .geometry import GEOMETRIES, GRID, shape_of
from .request import Request

ALL = "all"
# Options that not every op has, and what a request calls them.
OF_SOME = {
    "rank": "ranks",
    "dropout": "dropouts",
    "prefix": "prefixes",
    "batch": "batches",
    "seq": "seqs",
    "per_head": "per_head",
}
OF_STEP = ("batch", "seq", "dropout")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def _probability(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no dropout probability: 0 <= p < 1 is wanted")
    return value


def parser(prog: str) -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(
        prog=prog,
        description="Time an op, or whole training steps, beside its peers: interleaved, and nothing without a check.",
    )
    out.add_argument("op", nargs="?", choices=(*BENCHES, STEP, ALL), default=ALL, help="default: all")
    _add_sizes(out.add_argument_group("what is measured (an option may be given more than once)"))
    how = out.add_argument_group("how")
    how.add_argument("--against", action="append", metavar="PEER", help="these peers alone; default: all")
    how.add_argument("--quick", action="store_true", help="one shape unless named, fewer rounds, no torch.compile")
    how.add_argument("--seconds", type=seconds, default=3600.0, metavar="S", help="begin nothing after that time")
    how.add_argument("--device", choices=("cuda", "cpu"), help="default: a GPU if there is one; a CPU has tiny shapes")
    how.add_argument("--predict", action="store_true", help="measure nothing: predict for known GPUs")
    left = out.add_argument_group("what is left of it")
    left.add_argument("--json", type=Path, metavar="FILE", help="JSON lines, written after every cell")
    left.add_argument("--plot", type=Path, metavar="FILE.png|svg", help="bars over the floor, lines over what varies")
    left.add_argument("--compare", type=Path, metavar="OLD.json", help="exit with 1 for what is slower than it was")
    return out


def _add_sizes(group) -> None:
    names = ", ".join([*GEOMETRIES, GRID])
    numbers = "; ".join(f"{name}: {bench.sizes}" for name, bench in BENCHES.items())
    group.add_argument(
        "--shape",
        type=shape_of,
        action="append",
        metavar="NAME|N,N,...",
        help=f"a model ({names}), or an op's numbers ({numbers})",
    )
    group.add_argument("--batch", type=_count, action="append", metavar="B", help="in place of the model's own")
    group.add_argument("--seq", type=_count, action="append", metavar="S", help="tokens of a sequence, likewise")
    group.add_argument("--rank", type=_count, action="append", metavar="R", help="lora: default 16")
    group.add_argument(
        "--dropout", type=_probability, action="append", metavar="P", help="lora, dora, step: default 0 and 0.05"
    )
    group.add_argument("--prefix", type=_count, action="append", metavar="N", help="virtual tokens: default 30 or 10")
    group.add_argument("--per-head", action="store_true", help="adapter: a gate for each head")
    group.add_argument("--dtype", choices=list(DTYPES), help="default bf16, on a CPU fp32")
    group.add_argument("--pass", dest="passes", choices=PASSES, action="append", help="default fwd+bwd")


def request_of(arguments: argparse.Namespace, tiny: bool) -> Request:
    given = {ours: getattr(arguments, theirs) for theirs, ours in OF_SOME.items()}
    given = {name: tuple(value or ()) if name != "per_head" else value for name, value in given.items()}
    shapes = tuple(arguments.shape or ())
    return Request(shapes=shapes, dtype=arguments.dtype, tiny=tiny, quick=arguments.quick, **given)


def refuse_options(arguments: argparse.Namespace, ops: Sequence[str]) -> None:
    """Raises FastpeftError for an option that none of the ops asked for has."""
    understands = {name: bench.understands for name, bench in BENCHES.items()} | {STEP: OF_STEP}
    for name in OF_SOME:
        if getattr(arguments, name) and not any(name in understands[op] for op in ops):
            owners = ", ".join(op for op, options in understands.items() if name in options)
            raise FastpeftError(f"--{name.replace('_', '-')} is for {owners}, and {arguments.op} has none")


def refuse_peers(against: Collection[str], known: Collection[str]) -> None:
    """Raises FastpeftError for a peer that nothing asked for has."""
    for name in against:
        if name not in known:
            raise FastpeftError(f"--against {name}: the peers here are {', '.join(sorted(known))}")


def refuse_files(*paths: Path | None) -> None:
    """Raises FastpeftError where a file could not be written after all the work."""
    for path in filter(None, paths):
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise FastpeftError(f"{path}: no file can be written there")
