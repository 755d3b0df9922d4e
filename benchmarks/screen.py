"""What a run shows on a terminal: a table for each op and pass, and in words what is not in it.

In a table every cell has a row for each implementation. What all cells have in common stands in the title; the words of
a cell run down its rows. Columns that nothing fills are left out, and a table that is too wide becomes two.
"""

import contextlib
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from fastpeft.console import Cell, Console

from . import lines
from .report import FLOOR, headline

WIDTH = 120  # where it is not known
GAP = 2  # between columns, and at both edges together
WIDEST = 24  # of words and names that are longer
COLUMN_OF_CELLS, COLUMN_OF_NAMES = "cell", "implementation"
BEST, WRONG, QUIET, NO_FIGURES = "bold", "red", "dim", "yellow"


class Column(NamedTuple):
    """`entry` tells what a row that is ok has there, "" for nothing. `steps`: of training steps, or of ops alone."""

    heading: str
    entry: Callable[[Mapping, str], str]  # of the row, and the best peer's name in its cell
    second: bool = False  # goes to a second table where one would be too wide
    steps: bool | None = None


def _digits(value: float) -> int:
    """Decimals that leave three figures, as far as there are any."""
    return 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3


def _figure(value: float) -> str:
    return f"{value:.{_digits(value)}f}"


def _times(row: Mapping, best_peer: str) -> str:
    digits = _digits(row["median_ms"])
    low, high = (f"{row[name]:.{digits}f}" for name in ("p20_ms", "p80_ms"))
    return f"{row['median_ms']:.{digits}f} ({low}-{high})"


def _over_floor(row: Mapping, best_peer: str) -> str:
    over = row["overhead_over_floor"]
    return "" if over is None else "floor" if row["impl"] == FLOOR else f"{100 * over:+.1f}%"


def _beside_peer(row: Mapping, best_peer: str) -> str:
    if row["impl"] == best_peer:
        return "best"
    ratio = row["speedup_vs"].get(best_peer)
    return "" if ratio is None else f"{ratio:.2f}x"


def _rate(name: str, ceiling: str, row: Mapping) -> str:
    """The rate, and its share of what the machine was found to reach."""
    if row[name] is None:
        return ""
    share = f" ({100 * row[name] / row[ceiling]:.0f}%)" if row[ceiling] else ""
    return _figure(row[name]) + share


def _size(name: str, unit: float) -> Callable[[Mapping, str], str]:
    return lambda row, best_peer: "" if row[name] is None else _figure(row[name] / unit)


def _tokens(row: Mapping, best_peer: str) -> str:
    return f"{row['tokens_per_s']:,.0f}" if row.get("tokens_per_s") is not None else ""


def _mfu(row: Mapping, best_peer: str) -> str:
    return f"{100 * row['mfu']:.1f}" if row.get("mfu") is not None else ""


def _check(row: Mapping, best_peer: str) -> str:
    """The largest error against float64, in errors of the plain formula in the same precision."""
    if row["checked"] is None:
        return ""
    ratios = [ratio for ratio in (row["checked"].get("rms_ratio") or {}).values() if ratio is not None]
    return f"{max(ratios):.2f}" if ratios else "right"


COLUMNS = (
    Column("ms (p20-p80)", _times),
    Column("over floor", _over_floor),
    Column("vs best", _beside_peer),
    Column("tokens/s", _tokens, steps=True),
    Column("MFU %", _mfu, steps=True),
    Column("GB/s", lambda row, peer: _rate("gbps", "copy_gbps", row), second=True, steps=False),
    Column("TFLOP/s", lambda row, peer: _rate("tflops", "matmul_tflops", row), second=True, steps=False),
    Column("saved MB", _size("saved_bytes", 1e6), second=True),
    Column("peak MB", _size("peak_bytes", 1e6), second=True, steps=False),
    Column("peak GB", _size("peak_bytes", 1e9), steps=True),
    Column("check", _check),
)
EXPLAINED = (
    "over floor: the median of ratios within a round. vs best: beside the cell's best peer, above 1 is faster. "
    "(%): of what a large copy and a large product reached in this run. saved: kept for backward, without parameters. "
    "check: the largest error against float64, in errors of the plain formula."
)


@contextlib.contextmanager
def progress(total: int, console: Console | None = None) -> Iterator[Callable[[int, str], None]]:
    """Yields advance(cells done so far, what runs now)."""
    console = console or Console()
    room = max(10, _width(console) - 80)  # what the bar, its counts and times leave
    with console.progress("cells", max(total, 1)) as advance:
        yield lambda done, note: advance(done, _short(note, room) if console.rich else note)


def show(document: Mapping, console: Console) -> None:
    """Everything that a run's document (report.py) holds for the eye."""
    _say(console, headline(document))
    if document["stamp"]["header"]:
        _say(console, document["stamp"]["header"], NO_FIGURES)
    results = document["results"]
    for op, passed in dict.fromkeys((row["op"], row["pass"]) for row in results):
        rows = [row for row in results if (row["op"], row["pass"]) == (op, passed)]
        _show_table(op, passed, rows, document["stamp"]["ceilings"], console)
    if results:
        console.line()
        for label in _labels(results):
            _say(console, label)
        _say(console, EXPLAINED, QUIET)
    for remark in remarks(document):
        _say(console, remark)


def _say(console: Console, text: str, style: str = "") -> None:
    """On a terminal broken between words."""
    for line in textwrap.wrap(text, _width(console), subsequent_indent="  ") if console.rich else [text]:
        console.line((line, style))


def _width(console: Console) -> int:
    return console.rich.width if console.rich else WIDTH


def _labels(results: Sequence[Mapping]) -> list[str]:
    """What the names stand for; with the ops where a name stands for several things."""
    found: dict[str, dict[str, list[str]]] = {}
    for row in results:
        ops = found.setdefault(row["impl"], {}).setdefault(row["label"], [])
        ops += [row["op"]] * (row["op"] not in ops)
    return [
        f"{name}: {label}" + f" ({', '.join(ops)})" * (len(labels) > 1)
        for name, labels in found.items()
        for label, ops in labels.items()
        if label != name
    ]


def _short(text: str, room: int = WIDEST) -> str:
    return text if len(text) <= room else f"{text[: room - 1]}…"


def _show_table(op: str, passed: str, rows: Sequence[Mapping], ceilings: Mapping, console: Console) -> None:
    groups: dict[tuple, list[Mapping]] = {}
    for row in rows:
        groups.setdefault(lines.key_of(row), []).append({**row, **ceilings})
    common, cells = lines.told_apart([lines.cell_of(group[0]) for group in groups.values()])
    title = ", ".join(filter(None, (op, "" if passed == "step" else passed, common)))
    names = max(len(COLUMN_OF_NAMES), *(len(_short(row["impl"])) for row in rows))
    longest_word = min(WIDEST, max(map(len, [COLUMN_OF_CELLS, *" ".join(cells).split()])))
    columns = _columns(groups.values(), of_steps=passed == "step")
    for part in _fitting(columns, _width(console) - longest_word - names - 2 * GAP):
        shown = [column for column, _ in part]
        left = _width(console) - names - 2 * GAP - _taken(part)
        room = max(longest_word, min(left, WIDEST))
        body: list[list[Cell]] = []
        for words, group in zip(cells, groups.values(), strict=True):
            body += [*_group(textwrap.wrap(words, room), group, shown), []]
        headings = [COLUMN_OF_CELLS, COLUMN_OF_NAMES, *(column.heading for column in shown)]
        console.table(headings, body[:-1], title)


Measured = list[tuple[Column, int]]  # a column and its width


def _columns(groups: Iterable[Sequence[Mapping]], of_steps: bool) -> Measured:
    """Those that something fills, and the first."""
    found: Measured = []
    right = [(row, _best_peer(group)) for group in groups for row in group if row["status"] == "ok"]
    for column in COLUMNS:
        entries = [column.entry(row, peer) for row, peer in right] if column.steps in (None, of_steps) else []
        if any(entries) or column is COLUMNS[0]:
            found.append((column, max(map(len, (column.heading, *entries)))))
    return found


def _taken(columns: Measured) -> int:
    return sum(width + GAP for _, width in columns)


def _fitting(columns: Measured, room: int) -> list[Measured]:
    """One table, or two where that is too wide."""
    parts = [[each for each in columns if each[0].second is second] for second in (False, True)]
    return parts if _taken(columns) > room and all(parts) else [columns]


def _best_peer(group: Sequence[Mapping]) -> str:
    """The fastest of those that others are compared with."""
    peers = {peer for row in group for peer in row["speedup_vs"]}
    times = {row["impl"]: row["median_ms"] for row in group if row["impl"] in peers and row["status"] == "ok"}
    return min(times, key=times.get, default="")


def _group(words: Sequence[str], group: Sequence[Mapping], columns: Sequence[Column]) -> list[list[Cell]]:
    """The rows of one cell, its words down the first column."""
    ours = [row for row in group if lines.is_ours(row) and row["status"] == "ok"]
    best = min(ours, key=lambda row: row["median_ms"], default=None)
    peer = _best_peer(group)
    found = []
    for row in group:
        if row["status"] == "ok":
            style = BEST if row is best else ""
            entries = [column.entry(row, peer) for column in columns]
        else:
            style = WRONG if row["status"] == "wrong" else NO_FIGURES
            entries = [row["status"], *[""] * (len(columns) - 1)]
        found.append([(_short(row["impl"]), style), *((entry, style) for entry in entries)])
    empty = [("", "")] * (len(columns) + 1)
    found += [empty] * (len(words) - len(found))
    return [[words[place] if place < len(words) else "", *entries] for place, entries in enumerate(found)]


def remarks(document: Mapping) -> list[str]:
    """Why entries are not figures, and what has none: each reason once, with all that it is the reason for."""
    reasons: dict[tuple[str, str, str], dict[str, int]] = {}
    for row in document["results"]:
        if row["status"] != "ok" and row["pass"] == _first_pass(document, row["op"]):
            names = reasons.setdefault((row["op"], row["status"], row["note"]), {})
            names[row["impl"]] = names.get(row["impl"], 0) + 1
    found = [
        f"{op}: {', '.join(f'{n} ({c} cells)' if c > 1 else n for n, c in names.items())}: {status}: {reason}"
        for (op, status, reason), names in reasons.items()
    ]
    gaps: dict[tuple[str, str, str], dict[str, None]] = {}
    for entry in document["unmeasured"]:
        whose = "" if entry["impl"] else "every implementation"
        name = entry["impl"] or entry["cell"]
        gaps.setdefault((entry["op"], whose or entry["cell"], entry["reason"]), {})[name] = None
    for (op, where, reason), names in gaps.items():
        found.append(f"not measured: {op}: {where}: {', '.join(names)}: {reason}")
    return found


def _first_pass(document: Mapping, op: str) -> str:
    """A row's status is that of all its passes."""
    return next(row["pass"] for row in document["results"] if row["op"] == op)
