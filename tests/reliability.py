"""`make reliability`: all that is promised of it, as much of it as is promised, and the counts. A part that fails fails
the whole; nothing is counted before it is shown.

    python -m tests.reliability [part ...]
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.counting import COUNTS, FULL

ROOT = Path(__file__).resolve().parents[1]
PARTS = {  # what it shows -> the tests that show it
    "fuzz": ["tests/fuzz"],
    "numerics": ["tests/ops/test_numerical_faults.py", "tests/ops/test_determinism.py", "tests/ops/test_offsets.py"],
    "files": ["tests/test_hostile_adapters.py", "tests/test_files_hostile.py"],
    "crashes": [
        *("tests/test_files_crash.py", "tests/test_saving_processes.py", "tests/test_journal.py"),
        "tests/test_kill_and_resume.py",
    ],
    "concurrency": [
        *("tests/test_concurrency.py", "tests/test_exceptions_leave_nothing.py"),
        "tests/test_interrupted_peft.py",
    ],
    "long runs": ["tests/test_long_runs.py"],
    "contracts": ["tests/test_contracts.py", "tests/test_supply.py"],
    "failing kernels": ["tests/test_fallback.py"],
    "planted faults": sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("tests/ops/test_*_mutants.py")),
    "error texts": [
        *("tests/test_error_texts.py", "tests/test_error_lengths.py"),
        *("tests/test_error_triggers.py", "tests/test_error_triggers_layers.py"),
    ],
}


def run(part: str, counts: str) -> tuple[int, float]:
    """(pytest's exit status, seconds) of a part's tests, on two processes."""
    environment = {**os.environ, FULL: "1", COUNTS: counts, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "worksteal", *PARTS[part]]
    start = time.monotonic()
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        print(done.stdout[-8000:])
    return done.returncode, time.monotonic() - start


def counted(path: str) -> Counter:
    """The sums of what tests have counted."""
    total: Counter = Counter()
    with open(path, encoding="utf-8") as file:
        for line in file:
            total.update(json.loads(line))
    return total


def main(parts: list[str]) -> int:
    if unknown := set(parts) - PARTS.keys():
        print(f"no part {sorted(unknown)[0]!r}; there are {', '.join(PARTS)}")
        return 2
    failed = []
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as file:
        for number, part in enumerate(parts := parts or list(PARTS), 1):
            print(f"[{number}/{len(parts)}] {part} ...", end=" ", flush=True)
            status, seconds = run(part, file.name)
            print(f"{'ok' if status == 0 else 'FAILED'}, {seconds:.0f} s", flush=True)
            failed += [part] * (status != 0)
        total = counted(file.name)
    width = max(map(len, total), default=0)
    print()
    for what, number in sorted(total.items()):
        print(f"{what:{width}}  {number:9,}")
    print(f"{'parts that failed':{width}}  {len(failed):9,}  {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
