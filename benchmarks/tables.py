"""README's performance tables, made from what GPUs measured: `make tables`, or `python -m benchmarks.tables [--check]`.

Read are the files committed under benchmarks/results: check-in documents (*.json, see report.py) and JSON lines
(*.jsonl, see lines.py). Of each GPU and op the newest run is shown, whole, with its stamp. What ran on a CPU is left
out, for it timed no kernel; a prediction, or a file that is neither kind, is an error.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from . import report
from .report import FLOOR, ROOT

RESULTS, README = ROOT / "benchmarks" / "results", ROOT / "README.md"
BEGIN, END = "<!-- performance: written by `make tables`, not by hand -->", "<!-- end of performance -->"
NONE = (
    "No GPU figures are published yet: the kernels are proven in Triton's interpreter and compiled ahead of time for\n"
    "four targets, but no GPU has timed them.\n"
)
STAMPED = ("driver", "torch", "triton", "transformers", "peft")


class BadResults(ValueError):
    """A file under results/, or README, is not what it must be; the message names it."""


class Result(NamedTuple):
    """What a table says of one implementation in one cell."""

    gpu: str
    date: str
    stamp: str
    op: str
    cell: tuple[str, ...]  # shape, dtype, dropout, pass
    impl: str
    status: str
    ms: float | None
    overhead: float | None


def _stamp(stamp: dict, gpu: str) -> str:
    """The machine, the versions, the commit and the day, in one line."""
    versions = [f"{name} {stamp[name]}" for name in STAMPED if stamp.get(name)]
    source = f"commit {stamp['commit'][:12]}" if stamp.get("commit") else "no commit"
    return ", ".join([gpu, *versions, source + " with changes" * bool(stamp.get("dirty")), stamp["date"][:10]])


def _shape(shape) -> str:
    """`name key=value ...`; text as it is."""
    if isinstance(shape, str):
        return shape
    return " ".join(str(value) if key == "name" else f"{key}={value}" for key, value in shape.items())


def _result(row: dict, stamp: dict, gpu: str, ms: float | None) -> Result:
    cell = _shape(row["shape"]), row["dtype"], f"{row.get('dropout') or 0:g}", row["pass"]
    overhead = row["overhead_over_floor"]
    return Result(gpu, stamp["date"], _stamp(stamp, gpu), row["op"], cell, row["impl"], row["status"], ms, overhead)


def of_document(document: dict) -> list[Result]:
    """A check-in's results, none if it ran on a CPU. Raises BadResults."""
    if problems := report.problems(document):
        raise BadResults(problems[0])
    stamp = document["stamp"]
    if document["plan"].get("device") != "cuda" or stamp["header"]:
        return []
    return [_result(row, stamp, stamp["device"], row["median_ms"]) for row in document["results"]]


def of_lines(lines: Iterable[dict]) -> list[Result]:
    """The results among JSON lines whose stamp names a GPU. Raises BadResults."""
    found = []
    for number, line in enumerate(lines, 1):
        if line.get("prediction"):
            raise BadResults(f"line {number} is a prediction, and no result")
        try:
            stamp = line["stamp"]
            gpu = stamp.get("gpu")
            if gpu and line["status"] != "unmeasured":
                found.append(_result(line, stamp, gpu, line["median"]))
        except (KeyError, TypeError, AttributeError) as error:
            raise BadResults(f"line {number} lacks {error}") from error
    return found


def read(folder: Path) -> list[Result]:
    """All results of the folder's files. Raises BadResults with the file's name."""
    found: list[Result] = []
    for path in sorted([*folder.glob("*.json"), *folder.glob("*.jsonl")]):
        try:
            text = path.read_text(encoding="utf-8")
            if path.suffix == ".json":
                found += of_document(json.loads(text))
            else:
                found += of_lines(json.loads(line) for line in text.splitlines() if line.strip())
        except ValueError as error:  # also JSON's own, and text that is no UTF-8
            raise BadResults(f"{path}: {error}") from error
    return found


def newest(results: Sequence[Result]) -> list[list[Result]]:
    """Of each GPU and op the results with the latest stamp, GPUs and ops in alphabetical order."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.gpu, result.op), []).append(result)
    out = []
    for _, group in sorted(groups.items()):
        latest = max(result.date for result in group)
        out.append([result for result in group if result.date == latest])
    return out


def text(results: Sequence[Result]) -> str:
    """What stands between README's markers."""
    if not results:
        return NONE
    parts = [
        "Overhead in % over the floor, the same layer without an adapter, whose milliseconds are given; medians of\n"
        "interleaved rounds, every result and gradient checked first.\n"
    ]
    for group in newest(results):
        parts.append(f"**{group[0].op}**: {group[0].stamp}\n")
        parts.append("".join(f"| {' | '.join(row)} |\n" for row in _rows(group)))
    return "\n".join(parts)


def _rows(group: Sequence[Result]) -> list[list[str]]:
    """A table of Markdown: its headings, the rule under them, a row for each cell."""
    names = list(dict.fromkeys(result.impl for result in group if result.impl != FLOOR))
    cells: dict[tuple[str, ...], dict[str, Result]] = {}
    for result in group:
        cells.setdefault(result.cell, {})[result.impl] = result
    headings = ["shape", "dtype", "dropout", "pass", "floor, ms", *names]
    rows = [headings, ["---"] * 4 + ["---:"] * (len(headings) - 4)]
    for cell, found in cells.items():
        rows.append([*cell, *(_said(found.get(name), name) for name in (FLOOR, *names))])
    return rows


def _said(result: Result | None, name: str) -> str:
    """The floor's milliseconds, another's overhead, or why there is neither."""
    if result is None:
        return ""
    if result.status != "ok":
        return result.status
    if name == FLOOR:
        return f"{result.ms:.3f}"
    return f"{result.ms:.3f} ms" if result.overhead is None else f"{100 * result.overhead:+.1f}"


def put(readme: str, between: str) -> str:
    """README with `between` between its markers. Raises BadResults unless each stands there once, in order."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise BadResults(f"README.md must hold once, and in this order, {BEGIN} and {END}")
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{between}{END}{rest.split(END)[1]}"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; 1 if --check found README out of date; 2 for a file that cannot be read."""
    parser = argparse.ArgumentParser(prog="tables", description="Write README's performance tables from the results.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if README is out of date")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--readme", type=Path, default=README, metavar="FILE")
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as stop:  # argparse's own way out; callers want a number
        return int(stop.code or 0)
    try:
        old = arguments.readme.read_text(encoding="utf-8")
        new = put(old, text(read(arguments.results)))
    except (BadResults, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    if new == old:
        return 0
    if arguments.check:
        print(
            f"{arguments.readme}: its tables are not those of {arguments.results}: run `make tables`", file=sys.stderr
        )
        return 1
    arguments.readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
