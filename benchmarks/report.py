"""What a run leaves behind: one JSON file, stamped and valid at every moment, and a plain table.

    {"schema": 2,
     "stamp": {"device", "driver", "torch", "triton", "transformers", "peft", "numpy", "python", "platform", "commit",
               "dirty", "source_sha256", "date", "header", "ceilings": {"copy_gbps", "matmul_tflops"}},
     "tests": {"command", "rc", "seconds", "timed_out", "passed", "failed", "errors", "skipped",
               "failures": [{"test", "text"}], "note"},
     "results": [{"op", "impl", "label", "strategy", "adapter_dtype", "shape": {"name", the op's own numbers}, "dtype",
                  "dropout", "pass", "status", "median_ms", "p20_ms", "p80_ms", "rounds", "forward_ms", "host_ms",
                  "first_s", "overhead_over_floor", "overhead_p20", "overhead_p80", "speedup_vs": {impl: ratio},
                  "peak_bytes", "held_bytes", "saved_bytes", "gbps", "tflops", "tokens_per_s", "mfu",
                  "checked": {"rms_ratio", "gain", "tail_gain", "keep_rate", "problems"}, "note"}],
     "kernels": [{"op", "impl", "shape", "dropout", "launches", "kernels": [{"name", "us", "launches"}]}],
     "unmeasured": [{"op", "cell", "impl", "reason"}],
     "steps": [{"name", "status": "done" | "partial" | "wrong" | "failed" | "skipped", "seconds", "budget_s", "note"}],
     "plan": {...}, "running": {...} or null}

A result is of one implementation, one cell and one pass: "fwd" (with what backward needs being kept), "bwd", "fwd+bwd",
or "step" (of training, the optimizer included), which alone has `tokens_per_s` and `mfu`. `status` is "ok", "wrong"
(checked and not right: no times), "missing" (cannot be had here) or "failed" (raised). `overhead_over_floor` is a
fraction, 0.07 is 7 %; it and `speedup_vs` (above 1: faster than that one) are medians of ratios within a round. `gbps`
and `tflops` are the work that cannot be avoided over the median. A commit is null where the tree carries no history;
`source_sha256` identifies the measured sources in any case. An `impl` of null in `unmeasured` means the whole cell.
Numbers that are not finite are stored as null.
"""

import hashlib
import importlib.metadata
import json
import math
import os
import platform
import subprocess
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

SCHEMA = 2
STATUSES = ("ok", "wrong", "missing", "failed")
FLOOR = "frozen"  # the implementation that the others' overhead is counted from
OURS = "fastpeft"  # by its own choice of strategy and tiles
CPU_HEADER = "CPU fallback path: not a kernel benchmark"
ROOT = Path(__file__).resolve().parents[1]

NUMBER, TEXT = (int, float), (str,)
OPTIONAL_NUMBER, OPTIONAL_TEXT = (int, float, type(None)), (str, type(None))

_STAMP = {
    **dict.fromkeys(("device", "torch", "python", "platform", "date", "source_sha256", "header"), TEXT),
    **dict.fromkeys(("driver", "triton", "transformers", "peft", "numpy", "commit"), OPTIONAL_TEXT),
    "dirty": (bool, type(None)),
    "ceilings": {"copy_gbps": OPTIONAL_NUMBER, "matmul_tflops": OPTIONAL_NUMBER},
}
_TESTS = {
    "command": TEXT,
    **dict.fromkeys(("rc", "passed", "failed", "errors", "skipped"), (int, type(None))),
    "seconds": NUMBER,
    "timed_out": (bool,),
    "failures": [{"test": TEXT, "text": TEXT}],
    "note": TEXT,
}
OTHERS = "*"  # in a description: every other key
_SHAPE = {"name": TEXT, OTHERS: (int,)}
_TIMES = ("median_ms", "p20_ms", "p80_ms", "forward_ms", "overhead_over_floor", "gbps", "tflops", "tokens_per_s")
_RESULT = {
    **dict.fromkeys(("op", "impl", "label", "dtype", "pass", "status", "note"), TEXT),
    **dict.fromkeys(("strategy", "adapter_dtype"), OPTIONAL_TEXT),
    "shape": _SHAPE,
    "dropout": NUMBER,
    "rounds": (int,),
    **dict.fromkeys(_TIMES, OPTIONAL_NUMBER),
    **dict.fromkeys(("host_ms", "first_s", "overhead_p20", "overhead_p80", "mfu"), OPTIONAL_NUMBER),
    **dict.fromkeys(("peak_bytes", "held_bytes", "saved_bytes"), OPTIONAL_NUMBER),
    "speedup_vs": (dict,),
    "checked": (dict, type(None)),
}
_DOCUMENT = {
    "schema": (int,),
    "stamp": _STAMP,
    "tests": _TESTS,
    "results": [_RESULT],
    "kernels": [{"op": TEXT, "impl": TEXT, "shape": _SHAPE, "dropout": NUMBER, "launches": (int,), "kernels": (list,)}],
    "steps": [{"name": TEXT, "status": TEXT, "seconds": NUMBER, "budget_s": NUMBER, "note": TEXT}],
    "unmeasured": [{"op": TEXT, "cell": TEXT, "impl": OPTIONAL_TEXT, "reason": TEXT}],
    "plan": (dict,),
    "running": (dict, type(None)),
}


def problems(document: dict) -> list[str]:
    """What in `document` departs from the schema, in words; empty if nothing does."""
    found: list[str] = []
    walk(document, _DOCUMENT, "document", found)
    if found:
        return found
    if document["schema"] != SCHEMA:
        found.append(f"document.schema is {document['schema']}, this reads {SCHEMA}")
    for index, row in enumerate(document["results"]):
        if row["status"] not in STATUSES:
            found.append(f"document.results[{index}].status is {row['status']!r}, not one of {STATUSES}")
        if row["status"] == "ok" and row["median_ms"] is None:
            found.append(f"document.results[{index}] is ok and has no median_ms")
        timed = [name for name in (*_TIMES, "p20_ms") if row[name] is not None]
        if row["status"] != "ok" and (timed or row["speedup_vs"]):
            found.append(f"document.results[{index}] is {row['status']} and shows {timed or 'speedup_vs'}")
    return found


def walk(value, spec, where: str, found: list[str]) -> None:
    if isinstance(spec, dict):
        if not isinstance(value, dict):
            found.append(f"{where} is {type(value).__name__}, not an object")
            return
        known = {key: spec.get(key, spec.get(OTHERS)) for key in value}
        found.extend(f"{where}.{key} is missing" for key in sorted(spec.keys() - value.keys() - {OTHERS}))
        found.extend(f"{where}.{key} is unknown" for key in sorted(known) if known[key] is None)
        for key in (key for key in known if known[key] is not None):
            walk(value[key], known[key], f"{where}.{key}", found)
    elif isinstance(spec, list):
        if not isinstance(value, list):
            found.append(f"{where} is {type(value).__name__}, not a list")
            return
        for index, item in enumerate(value):
            walk(item, spec[0], f"{where}[{index}]", found)
    elif not isinstance(value, spec) or (isinstance(value, bool) and bool not in spec):
        found.append(f"{where} is {type(value).__name__}, not {' or '.join(t.__name__ for t in spec)}")


def new_document(plan: dict) -> dict:
    """A document that is valid from the start; `stamp` and `tests` are filled in as they become known."""
    return {
        "schema": SCHEMA,
        "stamp": {},
        "tests": no_tests("not run"),
        "results": [],
        "kernels": [],
        "unmeasured": [],
        "steps": [],
        "plan": plan,
        "running": None,
    }


def no_tests(note: str) -> dict:
    counts = dict.fromkeys(("rc", "passed", "failed", "errors", "skipped"))
    return {"command": "", **counts, "seconds": 0.0, "timed_out": False, "failures": [], "note": note}


def save(document: dict, path: Path) -> None:
    """Written beside and moved into place, so that whoever is killed at any moment leaves a whole file."""
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(json.dumps(finite(document), indent=1, allow_nan=False) + "\n")
    os.replace(temporary, path)


def load(path: Path) -> dict:
    return json.loads(path.read_text())


def finite(value):
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def stamp(device: str, commit: str | None = None) -> dict:
    """Where and of what the figures are. `device`: "cpu" or "cuda"; `commit` is for trees without history."""
    import torch

    on_gpu = device == "cuda"
    recorded, dirty = _git()
    return {
        "device": torch.cuda.get_device_name() if on_gpu else f"{_cpu()}, {torch.get_num_threads()} threads",
        "driver": _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]) if on_gpu else None,
        "torch": torch.__version__,
        **{name: _version(name) for name in ("triton", "transformers", "peft", "numpy")},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "commit": recorded or commit,
        "dirty": dirty,
        "source_sha256": source_digest(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "header": "" if on_gpu else CPU_HEADER,
        "ceilings": {"copy_gbps": None, "matmul_tflops": None},
    }


def source_digest() -> str:
    """One hash over the Python files that can influence a figure, names included."""
    digest = hashlib.sha256()
    checkout = [ROOT / name for name in ("kernels", "fastpeft", "benchmarks")]
    folders = checkout if checkout[1].is_dir() else [ROOT]
    for file in sorted(file for folder in folders for file in folder.rglob("*.py")):
        digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _git() -> tuple[str | None, bool | None]:
    commit = _output(["git", "rev-parse", "HEAD"])
    changes = _output(["git", "status", "--porcelain"])
    return commit, None if commit is None or changes is None else bool(changes)


def exit_code(document: dict) -> int:
    """3: something measured was wrong; 1: something raised, died, or a test failed; 0 otherwise."""
    statuses = {row["status"] for row in document["results"]}
    if "wrong" in statuses:
        return 3
    died = "failed" in statuses or document["running"] is not None
    return 1 if died or document["tests"]["rc"] not in (None, 0) else 0


def headline(document: dict) -> str:
    """One line on the machine and its ceilings."""
    about = document["stamp"]
    parts = [about["device"], f"torch {about['torch']}", f"triton {about['triton']}", f"peft {about['peft']}"]
    copy, matmul = about["ceilings"]["copy_gbps"], about["ceilings"]["matmul_tflops"]
    if copy is not None:
        parts.append(f"copy {copy:.0f} GB/s, matmul {matmul:.{0 if matmul > 10 else 2}f} TFLOP/s")
    source = f"commit {about['commit'][:12]}" if about["commit"] else f"source {about['source_sha256'][:12]}"
    parts.append(source + (" with changes" if about["dirty"] else ""))
    return ", ".join(parts)


def table(document: dict) -> str:
    """For each op its overhead over the floor in %, a line per cell and a column per implementation, and what is kept
    for backward; then what is missing."""
    out = [headline(document)]
    if document["stamp"]["header"]:
        out.append(document["stamp"]["header"])
    out.append(tests_line(document["tests"]))
    for op in dict.fromkeys(row["op"] for row in document["results"]):
        rows = [row for row in document["results"] if row["op"] == op]
        floor = next((row["label"] for row in rows if row["impl"] == FLOOR), "no floor")
        passes = {passed: [row for row in rows if row["pass"] == passed] for passed in [row["pass"] for row in rows]}
        for passed, found in passes.items():
            out.append(f"{op}, {passed}: overhead in % over the floor ({floor})")
            out.extend(_aligned(_lines(found, "floor ms", _milliseconds, _overhead)))
        out.append(f"{op}: MB kept for backward, without parameters")
        out.extend(_aligned(_lines(next(iter(passes.values())), "floor", _kept, _kept)))
    return "\n".join([*out, *_remarks(document)]) + "\n"


Entry = Callable[[dict], str]  # what a table says of a row that is ok


def _lines(rows: list[dict], heading: str, of_floor: Entry, of_others: Entry) -> list[list[str]]:
    """One op's table: its headings, then a line per cell."""
    names = list(dict.fromkeys(row["impl"] for row in rows if row["impl"] != FLOOR))
    cells: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        key = (*row["shape"].values(), row["dropout"], row["dtype"])
        cells.setdefault(key, {})[row["impl"]] = row
    lines = [[*rows[0]["shape"], "p", "dtype", heading, *names]]
    for key, found in cells.items():
        entries = [_said(found.get(name), of_floor if name == FLOOR else of_others) for name in (FLOOR, *names)]
        lines.append([*map(str, key), *entries])
    return lines


def _said(row: dict | None, entry: Entry) -> str:
    if row is None:
        return "·"
    return entry(row) if row["status"] == "ok" else row["status"]


def _milliseconds(row: dict) -> str:
    return f"{row['median_ms']:.3f}"


def _overhead(row: dict) -> str:
    overhead = row["overhead_over_floor"]
    return f"{row['median_ms']:.3f} ms" if overhead is None else f"{100 * overhead:.1f}"


def _kept(row: dict) -> str:
    return "-" if row["saved_bytes"] is None else f"{row['saved_bytes'] / 1e6:.1f}"


def _aligned(lines: list[list[str]]) -> list[str]:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return ["  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def tests_line(tests: dict) -> str:
    if tests["rc"] is None:
        return f"Tests: {tests['note']}"
    counts = ", ".join(f"{tests[name]} {name}" for name in ("passed", "failed", "errors", "skipped") if tests[name])
    return f"Tests (rc {tests['rc']}, {tests['seconds']:.0f} s): {counts or 'none'}. {tests['note']}".rstrip()


def _remarks(document: dict) -> list[str]:
    """Why entries are not numbers, each reason once."""
    reasons: dict[str, int] = {}
    for row in document["results"]:
        if row["status"] != "ok":
            text = f"{row['op']}: {row['impl']}: {row['status']}: {row['note']}"
            reasons[text] = reasons.get(text, 0) + 1
    lines = [text if count == 1 else f"{text} ({count} cells)" for text, count in reasons.items()]
    for entry in document["unmeasured"]:
        who = f" {entry['impl']}" if entry["impl"] else ""
        lines.append(f"not measured: {entry['op']}: {entry['cell']}{who}: {entry['reason']}")
    return lines
