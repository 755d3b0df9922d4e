"""The one screen that a check-in ends with: what ran, what is right, which targets are met, and what to look at."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from . import report, targets
from .targets import Outcome

LINES, COLUMNS = 60, 120


def figure(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.1f} %" if unit == "%" else f"{value:.{0 if value > 1000 else 2}f} {unit}"


def text(document: dict, out: Path) -> str:
    """At most LINES lines of at most COLUMNS columns."""
    found = targets.outcomes(document)
    parts = [report.headline(document)]
    if document["stamp"]["header"]:
        parts.append(document["stamp"]["header"])
    parts += [report.tests_line(document["tests"]), *_steps(document["steps"])]
    if any(outcome.measured is not None for outcome in found):
        parts += _targets(found)
    else:
        parts.append("targets: none of them was measured")
    parts += _troubles(document)
    parts.append(f"tables: {out / 'table.txt'}; results: {out / 'checkin.json'}, {out / 'checkin.jsonl'}")
    lines = [line for part in parts for line in textwrap.wrap(part, COLUMNS, subsequent_indent="  ")]
    return "".join(f"{line}\n" for line in lines[:LINES])


def _steps(steps: Sequence[dict]) -> list[str]:
    """A line for what is not done, one for all that is."""
    done = [f"{step['name']} {step['seconds']:.0f} s" for step in steps if step["status"] == "done"]
    others = [f"{step['name']}: {step['status']}: {step['note']}" for step in steps if step["status"] != "done"]
    return [f"done: {', '.join(done) or 'nothing'}", *others]


def _targets(found: Sequence[Outcome]) -> list[str]:
    rows = [["target", "wanted", "stretch", "measured", ""]]
    for outcome in found:
        target = outcome.target
        wanted = f"{'>=' if target.at_least else '<='} {figure(target.wanted, target.unit)}"
        verdict = {None: "not measured", True: "met", False: f"missed by {100 * (outcome.gap or 0):.1f} %"}[outcome.met]
        verdict = "met, and its stretch" if outcome.stretched else verdict
        figures = (figure(value, target.unit) for value in (target.stretch, outcome.measured))
        rows.append([target.name, wanted, *figures, verdict])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    out = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    worst = targets.gaps(found)
    if worst:
        out.append("largest gaps: " + "; ".join(outcome.target.name for outcome in worst))
    return out


def _troubles(document: dict) -> list[str]:
    """What is wrong or failed, each implementation once."""
    seen: dict[tuple, str] = {}
    for row in document["results"]:
        if row["status"] in ("wrong", "failed"):
            seen.setdefault((row["op"], row["impl"], row["status"]), row["note"])
    return [f"{status}: {op}, {impl}: {note}" for (op, impl, status), note in seen.items()]
