"""One call on a GPU machine: the CUDA tests, the machine's ceilings, the benches. `--out DIR` receives everything.

DIR/checkin.json is valid from the first second on (schema in report.py), DIR/table.txt is the last thing printed too,
DIR/tests.log and DIR/tests.xml are pytest's. The benches run in a process of their own, the most important cells of
each first: a kernel that crashes it, or hangs, is named, left out, and the rest is measured by a fresh process that
goes on where that one stopped.

Exit status: 0; 1 if a test failed or an implementation raised or died; 2 for wrong usage; 3 if a result was wrong.
"""

import argparse
import contextlib
import functools
import importlib.util
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

from . import bench_lora_linear, bench_prefix_attention, report
from .harness import Budget
from .report import FLOOR, ROOT
from .runner import DeviceLost, Run, cells_of, in_turns, key_of, key_of_row, plan_of

BENCHES = (bench_lora_linear.BENCH, bench_prefix_attention.BENCH)
TEST_WORKERS = 8
STARTS = 4  # the first, and three more after crashes
STALL_S = 150.0  # longer than torch.compile's first compilation, the slowest single step
SPARE_S = 15.0  # for the table, and for a worker to finish the cell it is in
DEVICE_LOST_RC = 4


def run_tests(path: Path, out: Path, seconds: float, workers: int = 0) -> dict:
    """`pytest -m cuda path` in a process of its own; interrupted after `seconds`, so that it still reports. Most of the
    time goes into compiling kernels, so `workers` processes share the tests, where xdist is installed."""
    if not path.exists():
        return report.no_tests(f"{path} does not exist: tests come with a checkout")
    xml, log = out / "tests.xml", out / "tests.log"
    xml.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-m", "cuda", str(path), "-q", "--tb=short", "-p", "no:cacheprovider"]
    if workers and importlib.util.find_spec("xdist"):
        command += ["-n", str(workers), "--dist", "loadgroup"]
    start, timed_out = time.monotonic(), False
    with log.open("w") as stream:
        process = _start([*command, f"--junitxml={xml}"], stdout=stream, stderr=subprocess.STDOUT)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            timed_out = True
            _end(process, patience=20.0)
    tests = report.no_tests("") | _read_junit(xml)
    tests |= {"command": " ".join(command), "rc": process.returncode, "timed_out": timed_out}
    tests["seconds"] = time.monotonic() - start
    if timed_out:
        tests["note"] = f"Stopped after {seconds:.0f} s: not all of them ran."
    elif tests["passed"] is None:
        tests["note"] = "pytest left no report; its log: " + " ".join(log.read_text()[-500:].split())
    elif process.returncode == 5:
        tests["note"] = "No test is marked cuda."
    return tests


def _read_junit(xml: Path) -> dict:
    """Counts and failure texts; nothing where pytest was killed before it could report."""
    try:
        suite = ElementTree.parse(xml).getroot().find("testsuite")
    except (OSError, ElementTree.ParseError):
        return {}
    counts = {name: int(suite.get(key, 0)) for name, key in (("failed", "failures"), ("errors", "errors"))}
    counts["skipped"] = int(suite.get("skipped", 0))
    failures = []
    for case in suite.iter("testcase"):
        for outcome in (*case.findall("failure"), *case.findall("error")):
            name = f"{case.get('classname')}::{case.get('name')}"
            failures.append({"test": name, "text": (outcome.text or "")[-2000:]})
    return {**counts, "passed": int(suite.get("tests", 0)) - sum(counts.values()), "failures": failures[:20]}


def _start(command: list[str], **streams) -> subprocess.Popen:
    """In its own process group, so that compilers and other children end with it. A checkout is run from its root.

    A shell's background jobs ignore interrupts, and what they start inherits that; this must heed ours.
    """
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    folder = ROOT if __package__ == "benchmarks" else None
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, preexec_fn=heed, **streams)


def _end(process: subprocess.Popen, patience: float = 0.0) -> None:
    """Kill the group, after an interrupt and `patience` seconds for whoever can still write something down."""
    if patience:
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            return
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def watch(process: subprocess.Popen, heartbeat: Path, budget: Budget, stall_s: float = STALL_S) -> str:
    """Wait for the worker, which touches `heartbeat` at every step. Returns "" or why it ended too early."""
    while process.poll() is None:
        time.sleep(0.1)
        if time.time() - heartbeat.stat().st_mtime > stall_s:
            _end(process)
            return f"stood still for {stall_s:.0f} s"
        if budget.left() < 0:
            _end(process)
            return "the time was up"
    if process.returncode == DEVICE_LOST_RC:
        return "the device stopped answering"
    if process.returncode < 0:
        return f"ended by signal {-process.returncode}"
    return f"exit status {process.returncode}" if process.returncode else ""


def supervise(path: Path, budget: Budget, command: Sequence[str] | None = None) -> bool:
    """Run workers on the plan in `path` until it is worked off. False if any of them ended too early."""
    command = list(command or [sys.executable, "-m", f"{__package__}.checkin", "--worker", str(path)])
    clean = True
    for _ in range(STARTS):
        document = report.load(path)
        document["plan"]["budget_s"] = max(0.0, budget.left() - SPARE_S)
        report.save(document, path)
        reason = watch(_start(command), path, budget)
        if not reason:
            return clean
        clean = False
        document = report.load(path)
        print(f"the benchmark's process: {reason}, at {document['running']}", flush=True)
        go_on = budget.left() > SPARE_S and _avoid(document, reason)
        report.save(document, path)
        if not go_on:
            break
    document = report.load(path)
    _name_unmeasured(document, f"the benchmark's process did not get there ({reason})")
    report.save(document, path)
    return False


def _avoid(document: dict, reason: str) -> bool:
    """Change the plan so that what ended the process is not met again. False if nothing is left to measure then."""
    at, plan = document["running"], document["plan"]
    if at is None or at["stage"] in ("ceilings", "profile") or at["impl"] == FLOOR:
        return False
    if at["impl"] is None:
        plan["skip"][at["cell"]] = f"its timing ended the process: {reason}"
    else:
        plan["without"].setdefault(at["op"], {})[at["impl"]] = f"ended the process ({reason}) in {at['cell']}"
    return True


def _name_unmeasured(document: dict, reason: str) -> None:
    done = set(map(key_of_row, document["results"]))
    named = {(entry["op"], entry["cell"]) for entry in document["unmeasured"]}
    for bench, cell in cells_of(document["plan"], {bench.op: bench for bench in BENCHES}):
        if key_of(bench, cell) not in done and (bench.op, cell.id) not in named:
            document["unmeasured"].append({"op": bench.op, "cell": cell.id, "impl": None, "reason": reason})


def plan(device: str, *, tiny: bool = False, budget_s: float = 400.0) -> dict:
    """Everything that there is to measure, in the order in which it is wanted."""
    return plan_of(in_turns(BENCHES, tiny=tiny), device, budget_s=budget_s, quick=tiny)


def work(path: Path) -> int:
    """The worker: measures what the plan in `path` still lacks, into the same file."""
    document = report.load(path)
    try:
        Run(document, lambda: report.save(document, path), BENCHES).measure()
    except DeviceLost as error:
        print(f"device lost: {error}", file=sys.stderr)
        return DEVICE_LOST_RC
    return 0


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(prog="python -m benchmarks.checkin", description=__doc__.splitlines()[0])
    place = out.add_mutually_exclusive_group(required=True)
    place.add_argument("--out", type=Path, metavar="DIR")
    place.add_argument("--worker", type=Path, metavar="FILE", help=argparse.SUPPRESS)
    out.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    out.add_argument("--tiny", action="store_true", help="tiny shapes: the whole course in seconds, no figure counts")
    out.add_argument("--budget", type=float, default=520.0, metavar="S", help="seconds for everything (default 520)")
    out.add_argument("--tests-budget", type=float, default=180.0, metavar="S", help="of which for the tests")
    out.add_argument("--tests", type=Path, default=ROOT / "tests", metavar="PATH", help="which tests")
    out.add_argument("--commit", help="what to stamp where the tree carries no history")
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see the module's docstring for the exit status."""
    try:
        arguments = parser().parse_args(argv)
    except SystemExit as stop:  # argparse's own way out; callers want a number
        return int(stop.code or 0)
    if arguments.worker:
        return work(arguments.worker)
    budget = Budget(arguments.budget)
    if refusal := _refusal(arguments):
        print(f"checkin: {refusal}", file=sys.stderr)
        return 2
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    path = out / "checkin.json"
    document = report.new_document(plan(arguments.device, tiny=arguments.tiny))
    document["stamp"] = report.stamp(arguments.device, arguments.commit)
    report.save(document, path)
    if document["stamp"]["header"]:
        print(document["stamp"]["header"], flush=True)
    document["tests"] = run_tests(
        arguments.tests.resolve(), out, arguments.tests_budget, TEST_WORKERS if arguments.device == "cuda" else 0
    )
    report.save(document, path)
    print(f"[{budget.elapsed():.0f}/{budget.seconds:.0f} s] {report.tests_line(document['tests'])}", flush=True)
    clean = supervise(path, budget)
    document = report.load(path)
    table = report.table(document)
    (out / "table.txt").write_text(table)
    print(table, end="", flush=True)
    return report.exit_code(document) or (0 if clean else 1)


def _refusal(arguments: argparse.Namespace) -> str:
    import torch

    if arguments.device == "cpu" and not arguments.tiny:
        return "--device cpu takes hours on the real shapes; add --tiny"
    if arguments.device == "cuda" and not torch.cuda.is_available():
        return "torch sees no GPU (torch.cuda.is_available() is False). --device cpu --tiny rehearses without one"
    return ""


if __name__ == "__main__":
    sys.exit(main())
