"""The CUDA tests as a step of the check-in: pytest in a process of its own, with a limit."""

import importlib.util
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

from . import report
from .supervision import end, start


def run_tests(paths: Sequence[Path], out: Path, seconds: float, workers: int = 0) -> dict:
    """`pytest -m cuda` on files or folders, in a process of its own; interrupted after `seconds`, so that it still
    reports. Most of the time goes into compiling kernels, so `workers` processes share the tests, where xdist is
    installed."""
    for path in paths:
        if not path.exists():
            return report.no_tests(f"{path} does not exist: tests come with a checkout")
    xml, log = out / "tests.xml", out / "tests.log"
    xml.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-m", "cuda", *map(str, paths), "-v", "--tb=short"]
    command += ["-p", "no:cacheprovider", "--continue-on-collection-errors"]
    if workers and importlib.util.find_spec("xdist"):
        command += ["-n", str(workers), "--dist", "loadgroup"]
    begun, timed_out = time.monotonic(), False
    with log.open("w") as stream:
        process = start([*command, f"--junitxml={xml}"], stdout=stream, stderr=subprocess.STDOUT)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            timed_out = True
            end(process, patience=20.0)
    tests = report.no_tests("") | _read_junit(xml)
    tests |= {"command": " ".join(command), "rc": process.returncode, "timed_out": timed_out}
    tests["seconds"] = time.monotonic() - begun
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
    if suite is None:
        return {}
    counts = {name: int(suite.get(key, 0)) for name, key in (("failed", "failures"), ("errors", "errors"))}
    counts["skipped"] = int(suite.get("skipped", 0))
    failures = []
    for case in suite.iter("testcase"):
        for outcome in (*case.findall("failure"), *case.findall("error")):
            name = f"{case.get('classname')}::{case.get('name')}"
            failures.append({"test": name, "text": (outcome.text or "")[-2000:]})
    return {**counts, "passed": int(suite.get("tests", 0)) - sum(counts.values()), "failures": failures[:20]}
