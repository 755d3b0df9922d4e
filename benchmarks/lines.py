"""JSON lines: what `--json FILE` writes, one object for each implementation, cell and pass.

    {"schema": 1, "op", "impl", "label", "shape": {"name", the op's own numbers}, "dtype", "dropout",
     "pass": "fwd" | "bwd" | "fwd+bwd" | "step", "status": "ok" | "wrong" | "missing" | "failed" | "unmeasured",
     "median", "p20", "p80", "rounds", "overhead_over_floor", "overhead_p20", "overhead_p80", "speedup": {impl: ratio},
     "peak_bytes", "saved_bytes", "held_bytes", "gbps", "tflops", "gbps_of_ceiling", "tflops_of_ceiling",
     "tokens_per_s", "mfu", "checked", "check": {"rms_ratio", "gain", ...}, "note",
     "stamp": {"gpu", "device", "driver", "torch", "triton", "transformers", "peft", "commit", "dirty",
               "source_sha256", "date", "header", "ceilings": {"copy_gbps", "matmul_tflops"}}}

`median`, `p20` and `p80` are milliseconds over `rounds` interleaved rounds. `overhead_over_floor` and its p20 and p80
are fractions, 0.07 is 7 %, and `speedup` (above 1: faster than that one) are ratios within a round. `gbps` (1e9 bytes)
and `tflops` (1e12) are the work that cannot be avoided over the median; `..._of_ceiling` are fractions of the copy and
of the product that the same run measured. `tokens_per_s` and `mfu` (a fraction) are those of whole training steps.
`checked`: whether the result was found right against float64, with the figures in `check`; null where there is nothing
to check (the floor) or nothing came to it. What is not known is null, also a number that is not finite. `gpu` is null
for a run on a CPU, whose `header` says that it timed no kernel.

What was not measured at all has a line too: `status` "unmeasured", the reason in `note`, the cells in shape's `name`,
and `impl` "*" where it is all of them. It has neither dtype nor pass ("").
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from fastpeft.errors import FastpeftError

from . import report
from .report import OPTIONAL_NUMBER, OPTIONAL_TEXT, OTHERS, TEXT

SCHEMA = 1
UNMEASURED, EVERY = "unmeasured", "*"
STATUSES = (*report.STATUSES, UNMEASURED)
OURS = "fastpeft"  # and, with a colon or a hyphen behind it, its variants

_TIMES = ("median", "p20", "p80", "overhead_over_floor", "overhead_p20", "overhead_p80")
_RATES = ("gbps", "tflops", "gbps_of_ceiling", "tflops_of_ceiling", "tokens_per_s", "mfu")
_BYTES = ("peak_bytes", "saved_bytes", "held_bytes")
_STAMPED = ("driver", "triton", "transformers", "peft", "commit")
_LINE = {
    "schema": (int,),
    **dict.fromkeys(("op", "impl", "label", "dtype", "pass", "status", "note"), TEXT),
    "shape": {"name": TEXT, OTHERS: (int,)},
    "dropout": OPTIONAL_NUMBER,
    "rounds": (int,),
    **dict.fromkeys((*_TIMES, *_RATES, *_BYTES), OPTIONAL_NUMBER),
    "speedup": {OTHERS: OPTIONAL_NUMBER},
    "checked": (bool, type(None)),
    "check": (dict, type(None)),
    "stamp": {
        **dict.fromkeys(("device", "torch", "source_sha256", "date", "header"), TEXT),
        **dict.fromkeys(("gpu", *_STAMPED), OPTIONAL_TEXT),
        "dirty": (bool, type(None)),
        "ceilings": {"copy_gbps": OPTIONAL_NUMBER, "matmul_tflops": OPTIONAL_NUMBER},
    },
}


def of(document: Mapping) -> list[dict]:
    """The lines of a run's document (report.py): its results, then what it did not measure."""
    stamp = _stamp(document)
    return [
        *(_of_row(row, stamp) for row in document["results"]),
        *(_left_out(entry, stamp) for entry in document["unmeasured"]),
    ]


def _stamp(document: Mapping) -> dict:
    about = document["stamp"]
    on_gpu = document["plan"].get("device") == "cuda" and not about["header"]
    kept = {name: about[name] for name in _LINE["stamp"] if name != "gpu"}
    return {"gpu": about["device"] if on_gpu else None, **kept}


def _of_row(row: Mapping, stamp: dict) -> dict:
    ceilings, check = stamp["ceilings"], row["checked"]
    right = None if check is None else not check.get("problems")
    return {
        "schema": SCHEMA,
        **{name: row[name] for name in ("op", "impl", "label", "shape", "dtype", "dropout", "pass", "status")},
        **{name: row[f"{name}_ms"] for name in ("median", "p20", "p80")},
        **{name: row[name] for name in ("rounds", *_TIMES[3:])},
        "speedup": row["speedup_vs"],
        **{name: row[name] for name in _BYTES},
        **{name: row[name] for name in ("gbps", "tflops")},
        "gbps_of_ceiling": _share(row["gbps"], ceilings["copy_gbps"]),
        "tflops_of_ceiling": _share(row["tflops"], ceilings["matmul_tflops"]),
        **{name: row.get(name) for name in ("tokens_per_s", "mfu")},
        "checked": False if row["status"] == "wrong" else right,
        "check": check,
        "note": row["note"],
        "stamp": stamp,
    }


def _share(value: float | None, ceiling: float | None) -> float | None:
    return value / ceiling if value is not None and ceiling else None


def _left_out(entry: Mapping, stamp: dict) -> dict:
    impl = entry["impl"] or EVERY
    return {
        **dict.fromkeys(_LINE),
        "schema": SCHEMA,
        "op": entry["op"],
        "impl": impl,
        "label": impl,
        "shape": {"name": entry["cell"]},
        **dict.fromkeys(("dtype", "pass"), ""),
        "status": UNMEASURED,
        "rounds": 0,
        "speedup": {},
        "note": entry["reason"],
        "stamp": stamp,
    }


def problems(lines: Sequence[Mapping]) -> list[str]:
    """What in `lines` departs from the schema, in words that begin with the line's number; empty if nothing does."""
    return [f"line {number}: {what}" for number, line in enumerate(lines, 1) for what in _problems(line)]


def _problems(line: Mapping) -> list[str]:
    found: list[str] = []
    if isinstance(line, dict) and line.get("prediction"):
        return ["a prediction, and no result"]
    report.walk(line, _LINE, "it", found)
    if found:
        return found
    if line["schema"] != SCHEMA:
        found.append(f"schema {line['schema']}, this reads {SCHEMA}")
    if line["status"] not in STATUSES:
        found.append(f"status {line['status']!r}, not one of {', '.join(STATUSES)}")
    if line["status"] == "ok" and line["median"] is None:
        found.append("ok, and without a median")
    shown = [name for name in (*_TIMES, *_RATES, "speedup") if line[name] not in (None, {})]
    if line["status"] != "ok" and shown:
        found.append(f"{line['status']}, and shows {', '.join(shown)}")
    return found


def save(lines: Iterable[Mapping], path: Path) -> None:
    """Written beside and moved into place, so that whoever is killed at any moment leaves a whole file or none."""
    temporary = path.with_name(path.name + ".partial")
    text = "".join(json.dumps(report.finite(line), allow_nan=False) + "\n" for line in lines)
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def load(path: Path) -> list[dict]:
    """The lines of a file that `save` wrote. Raises FastpeftError, with the file and the line, for one that it did
    not write, that is no result, or that is damaged."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FastpeftError(f"{path} cannot be read: {error}; give a file that --json wrote") from error
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line, parse_constant=_no_number)
        except (ValueError, RecursionError) as error:
            raise FastpeftError(
                f"{path}, line {number} is not JSON ({error}): give a file that --json wrote, one object a line"
            ) from error
        if wrong := _problems(value):
            raise FastpeftError(f"{path}, line {number}: {wrong[0]}: give a file that --json wrote")
        found.append(value)
    if not found:
        raise FastpeftError(f"{path} holds no results: give a file that --json wrote")
    return found


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no JSON number")


# How lines, and a document's rows alike, are told apart in a table, a picture or a sentence.


def is_ours(line: Mapping) -> bool:
    return line["impl"] == OURS or line["impl"].startswith((f"{OURS}:", f"{OURS}-"))


def cell_of(line: Mapping) -> dict[str, object]:
    """What is the same for all implementations in a cell: its name, sizes, dropout and dtype."""
    return {**line["shape"], "dropout": line["dropout"], "dtype": line["dtype"]}


def key_of(line: Mapping) -> tuple:
    """A cell and the pass, to be looked up."""
    return line["op"], *cell_of(line).items(), line["pass"]


def words(cell: Mapping[str, object]) -> str:
    """`name M=8192 ... dropout=0.05 bf16`, without a dropout of 0."""
    bare = ("name", "dtype")
    shown = {key: value for key, value in cell.items() if value not in (None, "") and (key, value) != ("dropout", 0)}
    return " ".join(f"{value}" if key in bare else f"{key}={_number(value)}" for key, value in shown.items())


def _number(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else f"{value}"


def told_apart(cells: Sequence[Mapping[str, object]]) -> tuple[str, list[str]]:
    """What all the cells have in common, and for each what it alone has: its name at least."""
    keys = dict.fromkeys(key for cell in cells for key in cell)
    common = {key for key in keys if len({cell.get(key) for cell in cells}) == 1}
    several = len(cells) > 1 and len(common) < len(keys)
    own = [{key: cell[key] for key in cell if key not in common or (key == "name" and not several)} for cell in cells]
    shared = {key: value for key, value in cells[0].items() if key in common and (key != "name" or several)}
    return words(shared), [_own_words(part) for part in own]


def _own_words(part: Mapping[str, object]) -> str:
    """As `words`, but a dropout of 0 is said: other cells have another."""
    dropout = "dropout=0" if part.get("dropout") == 0 else ""
    return " ".join(filter(None, [words(part), dropout]))
