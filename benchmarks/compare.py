"""`--compare OLD.json`: what became slower, larger or lost since the lines of another run on the same device.

Results are paired by op, implementation, shape, dtype, dropout and pass. Clocks and neighbours differ between two runs,
so where both have a floor, what is compared is the ratio to it, which was taken within rounds; the milliseconds
themselves are compared only where there is no floor. A difference is named beyond

    the root of (margin squared + (4 standard errors of the difference of both medians) squared)

in logarithms. The standard error comes from each run's p20, p80 and number of rounds, widened for few rounds. It knows
only the spread within a run, so the margin, by which two runs of the same code may differ, is a stated one (`MARGINS`).
Bytes are exact: there a difference is named beyond 1 % and 1 MiB. What was right and is not any more is lost.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastpeft.errors import FastpeftError

from . import lines
from .report import FLOOR

# (timed on a GPU, as a ratio to the floor): the least ratio of two runs that means anything. On a CPU two runs of the
# same code were up to 9 % apart, with others at work on the machine, in single cases more.
MARGINS = {(True, True): 1.05, (True, False): 1.10, (False, True): 1.10, (False, False): 1.25}
STANDARD_ERRORS = 4.0
# Of a median, in units of p80 - p20 over the root of the number of rounds, for a normal spread: 1.2533 / (2 * 0.8416).
OF_MEDIAN = 0.745
FEW_ROUNDS = 2.0  # p20 and p80 of n rounds are themselves uncertain: the standard error is taken 1 + 2/n times
BYTES, SHARE_OF_BYTES = 1 << 20, 0.01
COUNTED = ("saved_bytes", "peak_bytes")
TO_FLOOR, MILLISECONDS, STATUS = "ratio to the floor", "ms", "status"
VERSIONS = ("torch", "triton", "driver")


@dataclass(frozen=True)
class Change:
    """One thing that differs: `what` is TO_FLOOR, MILLISECONDS, a name of COUNTED or STATUS. `allowed`: the ratio, or
    the number of bytes, up to which nothing would have been said. `passed`: "" where it is the same for every pass."""

    op: str
    impl: str
    cell: str
    passed: str
    what: str
    old: float | str
    new: float | str
    allowed: float = 0.0

    @property
    def ours(self) -> bool:
        return lines.is_ours({"impl": self.impl})


@dataclass(frozen=True)
class Comparison:
    """`about`: the older run, and what else is different. only_old and only_new name results without a partner."""

    about: str
    pairs: int
    regressions: tuple[Change, ...]
    improvements: tuple[Change, ...]
    lost: tuple[Change, ...]
    only_old: tuple[str, ...]
    only_new: tuple[str, ...]

    @property
    def failed(self) -> bool:
        """Whether something of ours became worse; peers and the floor are others' code."""
        return any(change.ours for change in (*self.regressions, *self.lost))


def compare(old: Sequence[Mapping], new: Sequence[Mapping]) -> Comparison:
    """Lines of two runs (lines.py). Raises FastpeftError if they are of different devices."""
    _same_device(old, new)
    before, after = ({_key(line): line for line in found if _measured(line)} for found in (old, new))
    shared = [key for key in after if key in before]
    regressions: list[Change] = []
    improvements: list[Change] = []
    lost: dict[tuple, Change] = {}
    found: dict[tuple, list[Change]] = {}
    for key in shared:
        cell_of, first = key[:-1], key[:-1] not in found
        changes = found.setdefault(cell_of, [])
        was, now = before[key], after[key]
        if was["status"] == now["status"] == "ok":
            changes += [_time(was, now), *(_bytes(was, now, name) for name in COUNTED if first)]
        elif was["status"] == "ok":
            lost.setdefault(cell_of, _status(was, now))
        elif now["status"] == "ok" and first:
            changes.append(_status(was, now))
    for change in (change for changes in found.values() for change in changes if change is not None):
        worse = change.what != STATUS and change.new > change.old
        (regressions if worse else improvements).append(change)
    return Comparison(
        _about(old, new, [(before[key], after[key]) for key in shared]),
        len(shared),
        tuple(regressions),
        tuple(improvements),
        tuple(lost.values()),
        _without_partner(before, after, new),
        _without_partner(after, before, old),
    )


def _same_device(old: Sequence[Mapping], new: Sequence[Mapping]) -> None:
    devices = [sorted({line["stamp"]["gpu"] or line["stamp"]["device"] for line in found}) for found in (old, new)]
    if all(devices) and (devices[0] != devices[1] or len(devices[0]) > 1):
        then, now = (" and ".join(names) for names in devices)
        raise FastpeftError(
            f"times of {then} say nothing beside times of {now}: give --compare a file of one run on this very device"
        )


def _measured(line: Mapping) -> bool:
    return line["status"] != lines.UNMEASURED


def _key(line: Mapping) -> tuple:
    """The pass stands last: without it the key is that of an implementation in a cell."""
    return line["op"], line["impl"], *sorted(line["shape"].items()), line["dtype"], line["dropout"], line["pass"]


def _changed(was: Mapping, now: Mapping, what: str, old, new, allowed: float = 0.0, passed: str = "") -> Change:
    return Change(now["op"], now["impl"], lines.words(lines.cell_of(now)), passed, what, old, new, allowed)


def _status(was: Mapping, now: Mapping) -> Change:
    old, new = (f"{line['status']} ({line['note']})" if line["note"] else line["status"] for line in (was, now))
    return _changed(was, now, STATUS, old, new)


def _bytes(was: Mapping, now: Mapping, name: str) -> Change | None:
    old, new = was[name], now[name]
    if old is None or new is None:
        return None
    allowed = max(SHARE_OF_BYTES * old, BYTES)
    return _changed(was, now, name, old, new, allowed) if abs(new - old) > allowed else None


def _time(was: Mapping, now: Mapping) -> Change | None:
    """None if the two are as far apart as the same code may be."""
    to_floor = all(line["overhead_over_floor"] is not None for line in (was, now))
    (old, error_of_old), (new, error_of_new) = (_measure(line, to_floor) for line in (was, now))
    margin = MARGINS[now["stamp"]["gpu"] is not None, to_floor]
    errors = (STANDARD_ERRORS * error_of_old, STANDARD_ERRORS * error_of_new)
    allowed = math.exp(math.hypot(math.log(margin), *errors))
    if max(new / old, old / new) <= allowed:
        return None
    return _changed(was, now, TO_FLOOR if to_floor else MILLISECONDS, old, new, allowed, now["pass"])


def _measure(line: Mapping, to_floor: bool) -> tuple[float, float]:
    """The median, and its standard error as a logarithm."""
    if to_floor:
        shares = (line[name] for name in ("overhead_over_floor", "overhead_p20", "overhead_p80"))
        middle, low, high = (None if share is None else 1 + share for share in shares)
    else:
        middle, low, high = line["median"], line["p20"], line["p80"]
    rounds = max(line["rounds"], 1)
    spread = math.log((high or middle) / (low or middle))
    return middle, OF_MEDIAN * spread / math.sqrt(rounds) * (1 + FEW_ROUNDS / rounds)


def _without_partner(having: Mapping[tuple, Mapping], lacking: Mapping[tuple, Mapping], those: Sequence[Mapping]):
    """What only one run has, each implementation of a cell once, and why the other lacks it where that is known."""
    reasons = {(line["op"], line["impl"]): line["note"] for line in those if not _measured(line)}
    names = {}
    for key, line in having.items():
        if key not in lacking:
            name = f"{line['op']}: {line['impl']}: {lines.words(lines.cell_of(line))}"
            names.setdefault((name, reasons.get((line["op"], line["impl"]), "")), []).append(line["pass"])
    return tuple(
        f"{name} {', '.join(passes)}" + (f" ({reason})" if reason else "") for (name, reason), passes in names.items()
    )


def _about(old: Sequence[Mapping], new: Sequence[Mapping], shared: Sequence[tuple[Mapping, Mapping]]) -> str:
    if not old or not new:
        return "one of the runs has no results"
    then, now = old[0]["stamp"], new[0]["stamp"]
    source = f"commit {then['commit'][:12]}" if then["commit"] else f"source {then['source_sha256'][:12]}"
    parts = [source + " with changes" * bool(then["dirty"]) + f" of {then['date'][:16].replace('T', ' ')}"]
    parts += [f"{name} {then[name]}, now {now[name]}" for name in VERSIONS if then[name] != now[name]]
    floors = [
        after["median"] / before["median"]
        for before, after in shared
        if after["impl"] == FLOOR and before["median"] and after["median"]
    ]
    if floors:
        parts.append(f"the floor takes {statistics.median(floors):.2f} times as long")
    return "; ".join(parts)


def text(comparison: Comparison) -> str:
    """What changed, in lines: the worst first, what has no partner last."""
    verdict = "nothing of ours is worse beyond the noise"
    if comparison.failed:
        count = sum(change.ours for change in (*comparison.regressions, *comparison.lost))
        verdict = f"{count} {'figure' if count == 1 else 'figures'} of ours worse"
    out = [f"compared with {comparison.about}", f"{comparison.pairs} pairs of results: {verdict}"]
    out += [f"lost: {_said(change)}" for change in comparison.lost]
    out += [f"worse: {_said(change)}" for change in _largest_first(comparison.regressions)]
    out += [f"better: {_said(change)}" for change in _largest_first(comparison.improvements)]
    out += [f"only in the older run: {name}" for name in comparison.only_old]
    out += [f"only in this run: {name}" for name in comparison.only_new]
    return "\n".join(out) + "\n"


def _largest_first(changes: Sequence[Change]) -> list[Change]:
    def size(change: Change) -> float:
        if change.what == STATUS:
            return math.inf
        return max(change.new, change.old) / max(min(change.new, change.old), 1e-9)

    return sorted(changes, key=size, reverse=True)


def _said(change: Change) -> str:
    whose = "" if change.ours else " (not ours)"
    where = f"{change.op}: {change.impl}{whose}: {' '.join(filter(None, (change.cell, change.passed)))}"
    old, new = change.old, change.new
    if change.what == STATUS:
        return f"{where}: {old}, now {new}"
    if change.what in COUNTED:
        kind = change.what.removesuffix("_bytes")
        return f"{where}: {new / 1e6:.1f} MB {kind}, was {old / 1e6:.1f} MB"
    factor = f"{new / old:.2f} times as long" if new > old else f"{old / new:.2f} times as fast"
    unit = "times the floor" if change.what == TO_FLOOR else "ms"
    return f"{where}: {factor}, beyond the noise of {change.allowed:.2f}: {new:.3f} {unit}, was {old:.3f}"
