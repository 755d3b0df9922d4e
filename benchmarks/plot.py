"""`--plot FILE.png|svg`: the lines of a run (lines.py) as a picture.

For each op bars of the overhead over the floor, a field for each cell and a bar for each implementation, with the
figure written at it and p20 to p80 as a whisker; milliseconds where there is no floor, tokens per second and peak
memory for training steps. Where cells differ in one size alone, there are lines over that size too. Of several passes
the whole one is drawn. matplotlib is optional, and is imported when a picture is wanted.
"""

import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastpeft.errors import FastpeftError

from . import lines
from .lines import is_ours
from .report import FLOOR

SUFFIXES = (".png", ".svg")
# The first of these that an op has is drawn.
SPOKEN = {"fwd+bwd": "forward and backward", "step": "training step", "bwd": "backward", "fwd": "forward"}
COLUMNS = 4
LEAST_OF_A_SWEEP = 3  # values of one size
# Told apart without red and green, and by their brightness: ours strong and dark, others pale, the floor grey.
OURS = ("#0b5a8f", "#2b83ba", "#5aa7d6", "#0e7c86", "#46a6ac", "#28508c")
OTHERS = ("#d8a54a", "#c9825b", "#e3c98b", "#b58a6c", "#dcb7a0", "#a89a5c")
FLOOR_COLOUR, WRONG, QUIET, WHISKER, GRID = "#8a8f98", "#b3001b", "#555b66", "#20242b", "#e3e5e8"
MARKERS = "osD^vPX<>*"
LARGE, SMALL, SMALLER = 9, 8, 7
LINEAR = 10  # per cent, up to which a scale for wide ranges is linear
STAMPED = ("driver", "torch", "triton", "transformers", "peft")


def check_path(path: Path) -> None:
    """Before anything is measured. Raises FastpeftError where no picture could be written to `path`."""
    if path.suffix.lower() not in SUFFIXES:
        raise FastpeftError(f"--plot {path}: a picture is a PNG or an SVG; give FILE.png or FILE.svg")
    if not path.absolute().parent.is_dir():
        raise FastpeftError(f"--plot {path}: there is no folder {path.absolute().parent}; make it first")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise FastpeftError(f'--plot needs matplotlib ({error}): pip install "fastpeft[demo]"') from error


def save(found: Sequence[Mapping], path: Path) -> None:
    """Raises FastpeftError as `check_path` does, and where there is nothing to draw."""
    check_path(path)
    figure(found).savefig(path, dpi=150)


@dataclass(frozen=True)
class Quantity:
    """What an axis shows. `of`: a line's value, or None; `ends`: its p20 and p80; `written`: how the value is put."""

    label: str
    of: Callable[[Mapping], float | None]
    written: Callable[[float], str]
    ends: Callable[[Mapping], tuple[float | None, float | None]] = lambda line: (None, None)


def _percent(name: str) -> Callable[[Mapping], float | None]:
    return lambda line: None if line[name] is None else 100 * line[name]


def _tokens(line: Mapping, name: str) -> float | None:
    """Tokens per second, of a step of p20 or p80 milliseconds."""
    known = all(line[each] for each in ("tokens_per_s", "median", name))
    return line["tokens_per_s"] * line["median"] / line[name] if known else None


OVERHEAD = Quantity(
    "overhead over the floor, %",
    _percent("overhead_over_floor"),
    lambda value: f"{value:+.1f}" if abs(value) < 100 else f"{value:+.0f}",
    lambda line: (_percent("overhead_p20")(line), _percent("overhead_p80")(line)),
)
TIME = Quantity(
    "time, ms", lambda line: line["median"], lambda ms: f"{ms:.3g}", lambda line: (line["p20"], line["p80"])
)
TOKENS = Quantity(
    "tokens per second",
    lambda line: line["tokens_per_s"],
    lambda value: f"{value:,.0f}",
    lambda line: (_tokens(line, "p80"), _tokens(line, "p20")),
)
PEAK = Quantity(
    "peak memory, GB",
    lambda line: None if line["peak_bytes"] is None else line["peak_bytes"] / 1e9,
    lambda value: f"{value:.3g}",
)


@dataclass(frozen=True)
class Panel:
    """One field of the picture: bars of one cell, or, where `size` names one, lines over the cells of a sweep."""

    title: str
    quantity: Quantity
    rows: tuple[Mapping, ...]
    names: tuple[str, ...]  # all the op's implementations, from the top
    beside: tuple[Mapping, ...]  # what is drawn to the same scale
    size: str = ""


Band = list[Panel]  # panels side by side


def figure(found: Sequence[Mapping]):
    """The lines as matplotlib's Figure. Raises FastpeftError where none of them was measured."""
    measured = [line for line in found if line["status"] != lines.UNMEASURED]
    if not measured:
        raise FastpeftError("there is nothing to draw: nothing was measured")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    titled = [each for op in dict.fromkeys(line["op"] for line in measured) for each in _bands(_of_op(measured, op))]
    heights = [_height(band, title) for title, band in titled]
    across = max(len(band) for _, band in titled)
    width = max(7.5, 2.3 + 3.1 * across)
    out = Figure(figsize=(width, 1.3 + sum(heights)), layout="constrained", facecolor="white")
    FigureCanvasAgg(out)
    out.get_layout_engine().set(h_pad=0.08, w_pad=0.05)
    parts = out.subfigures(len(titled), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, (title, band) in zip(parts, titled, strict=True):
        if title:
            part.suptitle(_fold(title, int(11 * width)), fontsize=LARGE, x=0.01, ha="left", fontweight="bold")
        _draw_band(part, band, across)
    out.suptitle(_heading(found, int(13.5 * width)), fontsize=LARGE, x=0.01, ha="left")
    _legend(out, measured)
    return out


def _of_op(measured: Sequence[Mapping], op: str) -> list[Mapping]:
    rows = [line for line in measured if line["op"] == op]
    passed = min((line["pass"] for line in rows), key=list(SPOKEN).index)
    return [line for line in rows if line["pass"] == passed]


def _height(band: Band, title: str) -> float:
    """In inches."""
    if band[0].size:
        return 3.2
    deepest = max(1 + _name(name).count("\n") for name in band[0].names)
    return (0.95 if title else 0.7) + len(band[0].names) * (0.12 + 0.12 * deepest)


def _bands(rows: Sequence[Mapping]) -> list[tuple[str, Band]]:
    """The op's panels, at most COLUMNS beside each other; the first band has the op's title, the others ""."""
    cells: dict[tuple, list[Mapping]] = {}
    for line in rows:
        cells.setdefault(lines.key_of(line), []).append(line)
    names = tuple(sorted(dict.fromkeys(line["impl"] for line in rows), key=_rank))
    common, own = lines.told_apart([lines.cell_of(group[0]) for group in cells.values()])
    named = list(zip(own, cells.values(), strict=True))
    bands: list[Band] = []
    if any(TOKENS.of(line) is not None for line in rows):
        kinds = [kind for kind in (TOKENS, PEAK) if any(kind.of(line) is not None for line in rows)]
        for kind in kinds:
            bands += _cut([Panel(title, kind, tuple(group), names, tuple(group)) for title, group in named])
    else:
        panels = [(title, _quantity(group), tuple(group)) for title, group in named]
        scaled = tuple(line for _, quantity, group in panels if quantity is OVERHEAD for line in group)
        bands += _cut([Panel(*each, names, scaled if each[1] is OVERHEAD else each[2]) for each in panels])
    sweeps = [
        Panel(title, _quantity(swept), tuple(swept), names, tuple(swept), size)
        for size, title, swept in _sweeps(cells.values())
    ]
    op, passed = rows[0]["op"], rows[0]["pass"]
    title = (op if passed == "step" else f"{op}, {SPOKEN[passed]}") + f": {common}" * bool(common)
    return [(title if place == 0 else "", band) for place, band in enumerate(bands + _cut(sweeps, COLUMNS - 1))]


def _cut(panels: Band, most: int = COLUMNS) -> list[Band]:
    """Bands of about equal length."""
    count = math.ceil(len(panels) / most)
    length = math.ceil(len(panels) / count) if count else 1
    return [panels[start : start + length] for start in range(0, len(panels), length)]


def _rank(name: str) -> tuple[int, int]:
    """The floor, ours, others; the plain name before its variants."""
    return (0 if name == FLOOR else 1 if is_ours({"impl": name}) else 2), 0 if name == lines.OURS else 1


def _quantity(rows: Sequence[Mapping]) -> Quantity:
    """The overhead where all that were measured have one."""
    known = all(OVERHEAD.of(line) is not None for line in rows if line["status"] == "ok")
    return OVERHEAD if known else TIME


def _sweeps(cells: Iterable[Sequence[Mapping]]) -> list[tuple[str, str, list[Mapping]]]:
    """Where cells differ in one size alone: (the size, what they share, their lines). Names follow from sizes."""
    groups: dict[tuple, dict[float, Sequence[Mapping]]] = {}
    for group in cells:
        cell = {key: value for key, value in lines.cell_of(group[0]).items() if key != "name"}
        for size, value in cell.items():
            if size not in ("dtype", "dropout"):
                others = tuple((key, each) for key, each in cell.items() if key != size)
                groups.setdefault((size, others), {})[value] = group
    found = []
    for (size, others), values in groups.items():
        if len(values) >= LEAST_OF_A_SWEEP and all(values):
            swept = [line for value in sorted(values) for line in values[value]]
            found.append((size, lines.words(dict(others)), swept))
    return found


def _colours(names: Sequence[str]) -> dict[str, str]:
    ours = [name for name in names if is_ours({"impl": name})]
    others = [name for name in names if name != FLOOR and name not in ours]
    return {
        FLOOR: FLOOR_COLOUR,
        **{name: OURS[place % len(OURS)] for place, name in enumerate(ours)},
        **{name: OTHERS[place % len(OTHERS)] for place, name in enumerate(others)},
    }


def _fold(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, width))


def _name(impl: str) -> str:
    return _fold(impl, 24)


def _draw_band(part, band: Band, across: int) -> None:
    sweep = bool(band[0].size)
    fields = part.subplots(1, max(across, len(band) + sweep), squeeze=False)[0]
    for axes, panel in zip(fields, band, strict=False):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=SMALL)
        axes.set_title(_fold(panel.title, 42), fontsize=SMALL, loc="left")
        axes.set_axisbelow(True)
        if sweep:
            _draw_lines(axes, panel)
        else:
            _draw_bars(axes, panel, named=axes is fields[0])
    if sweep:
        handles = {
            label: handle for axes in fields for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        fields[len(band)].axis("off")
        fields[len(band)].legend(handles.values(), map(_name, handles), loc="upper left", frameon=False, fontsize=SMALL)
    for axes in fields[len(band) + sweep :]:
        axes.remove()


def _draw_bars(axes, panel: Panel, named: bool) -> None:
    """Horizontal bars, so that names and figures can be read."""
    colours, quantity = _colours(panel.names), panel.quantity
    rows = {line["impl"]: line for line in panel.rows}
    _scale(axes, panel)
    axes.axvline(0, color=FLOOR_COLOUR, linewidth=1.6 if quantity is OVERHEAD else 0.8)
    for place, name in enumerate(panel.names):
        line = rows.get(name)
        value = quantity.of(line) if line else None
        if value is not None:
            axes.barh(place, value, 0.72, color=colours[name])
            _write(axes, panel, line, value, place)
            continue
        said = "not measured" if line is None or line["status"] == "ok" else line["status"]
        axes.annotate(
            said, (0, place), (4, 0), textcoords="offset points", va="center", fontsize=SMALLER,
            color=WRONG if said == "wrong" else QUIET, style="italic",
        )  # fmt: skip
    axes.set_yticks(range(len(panel.names)), [_name(name) for name in panel.names] if named else [])
    axes.set_ylim(len(panel.names) - 0.4, -0.6)
    for label, name in zip(axes.get_yticklabels(), panel.names, strict=False):
        label.set_fontweight("bold" if is_ours({"impl": name}) else "normal")
    axes.set_xlabel(_label(panel), fontsize=SMALL)
    axes.grid(axis="x", color=GRID, linewidth=0.6)


def _write(axes, panel: Panel, line: Mapping, value: float, place: int) -> None:
    """The whisker and the figure behind it; of the floor its milliseconds."""
    floor = panel.quantity is OVERHEAD and line["impl"] == FLOOR
    ends = [] if floor else _whisker(panel.quantity, line)
    if ends:
        axes.plot(ends, [place, place], color=WHISKER, linewidth=1.0, solid_capstyle="butt")
    right = value >= 0
    axes.annotate(
        f"floor: {line['median']:.3g} ms" if floor else panel.quantity.written(value),
        (max([value, *ends]) if right else min([value, *ends]), place), (4 if right else -4, 0),
        textcoords="offset points", va="center", ha="left" if right else "right", fontsize=SMALLER,
        fontweight="bold" if is_ours(line) else "normal",
    )  # fmt: skip


def _whisker(quantity: Quantity, line: Mapping) -> list[float]:
    ends = quantity.ends(line)
    return [] if None in ends else list(ends)


def _is_wide(panel: Panel) -> bool:
    """Whether ours would be slivers beside the slowest."""
    if panel.quantity is not OVERHEAD:
        return False
    known = [line for line in panel.beside if OVERHEAD.of(line) is not None]
    ours = [abs(OVERHEAD.of(line)) for line in known if is_ours(line)]
    return bool(ours) and max(abs(OVERHEAD.of(line)) for line in known) > max(50.0, 8 * max(ours))


def _scale(axes, panel: Panel) -> None:
    """Limits that leave room for the figures behind the bars."""
    drawn = [line for line in panel.beside if panel.quantity.of(line) is not None and line["impl"] != FLOOR]
    values = [value for line in drawn for value in (panel.quantity.of(line), *_whisker(panel.quantity, line))]
    if panel.quantity is not OVERHEAD:
        values += [value for value in map(panel.quantity.of, panel.beside) if value is not None]
    low, high = min([0.0, *values]), max([0.0, *values])
    if _is_wide(panel):
        axes.set_xscale("symlog", linthresh=LINEAR)
        _plain_numbers(axes.xaxis)
        axes.set_xlim(5 * min(low, -LINEAR) if low < 0 else 0, 7 * max(high, LINEAR))
    else:
        room = 0.45 * (high - low or 1.0)
        axes.set_xlim(low - room if low < 0 else 0, high + room if high > 0 or low == high else 0)


def _plain_numbers(axis) -> None:
    from matplotlib.ticker import FuncFormatter, NullLocator

    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))


def _label(panel: Panel) -> str:
    return panel.quantity.label + f"\n(logarithmic beyond ±{LINEAR})" * _is_wide(panel)


def _draw_lines(axes, panel: Panel) -> None:
    """One line for each implementation over the sweep's size."""
    colours, quantity = _colours(panel.names), panel.quantity
    for place, name in enumerate(panel.names):
        found = [line for line in panel.rows if line["impl"] == name and quantity.of(line) is not None]
        if not found or (name == FLOOR and quantity is OVERHEAD):
            continue
        values = [quantity.of(line) for line in found]
        ends = [_whisker(quantity, line) or [value, value] for line, value in zip(found, values, strict=True)]
        reach = [[abs(value - end[side]) for value, end in zip(values, ends, strict=True)] for side in (0, 1)]
        ours = is_ours({"impl": name})
        axes.errorbar(
            [line["shape"][panel.size] for line in found], values, reach, label=name, color=colours[name],
            marker=MARKERS[place % len(MARKERS)], markersize=5, linewidth=2.0 if ours else 1.2,
            linestyle="-" if ours else "--", elinewidth=1.0, zorder=3 if ours else 2,
        )  # fmt: skip
    if quantity is OVERHEAD:
        axes.axhline(0, color=FLOOR_COLOUR, linewidth=1.6, label=FLOOR)
    sizes = sorted({line["shape"][panel.size] for line in panel.rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{size}" for size in sizes])
    axes.minorticks_off()
    axes.set_xlabel(f"{panel.size} (logarithmic)", fontsize=SMALL)
    if _is_wide(panel):
        axes.set_yscale("symlog", linthresh=LINEAR)
        _plain_numbers(axes.yaxis)
        axes.margins(y=0.08)
    elif quantity is TIME:
        axes.set_ylim(bottom=0)
    axes.set_ylabel(_label(panel), fontsize=SMALL)
    axes.grid(color=GRID, linewidth=0.6)


def _heading(found: Sequence[Mapping], width: int) -> str:
    about = found[0]["stamp"]
    versions = [f"{name} {about[name]}" for name in STAMPED if about[name]]
    source = f"commit {about['commit'][:12]}" if about["commit"] else f"source {about['source_sha256'][:12]}"
    parts = [about["device"], *versions, source + " with changes" * bool(about["dirty"]), about["date"][:10]]
    out = ["fastpeft benchmarks", *([about["header"]] if about["header"] else []), _fold(", ".join(parts), width)]
    left_out = (line["impl"] for line in found if line["status"] == lines.UNMEASURED)
    missing = dict.fromkeys(impl for impl in left_out if impl != lines.EVERY)
    if missing:
        out.append(_fold("not measured, or not everywhere: " + ", ".join(missing), width))
    return "\n".join(out)


def _legend(out, measured: Sequence[Mapping]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    there = {_rank(line["impl"])[0] for line in measured}
    kinds = {1: ("fastpeft", OURS[0]), 2: ("others", OTHERS[0]), 0: ("floor: no adapter", FLOOR_COLOUR)}
    shown = [Patch(color=colour, label=name) for rank, (name, colour) in kinds.items() if rank in there]
    shown.append(Line2D([], [], color=WHISKER, linewidth=1.0, label="p20 to p80 of the rounds"))
    out.legend(handles=shown, loc="outside lower left", ncols=len(shown), frameon=False, fontsize=SMALL)
