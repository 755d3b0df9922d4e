"""Fuzzing for as long as there is time: `make fuzz MINUTES=30`.

Every round gives every property of tests/fuzz some examples from a new random seed; after each the sum is printed. A
failure is printed with its smallest example, a line to paste above the property, and ends it with status 1.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tests.counting import COUNTS
from tests.fuzz.profiles import EXAMPLES, UNTIL

PASSED, FAILED, NO_TESTS = 0, 1, 5
ROUND = 50  # examples of each property


def counted(path: Path) -> Counter:
    """What `tests.counting.count` has written there."""
    total = Counter()
    for line in path.read_text(encoding="utf-8").splitlines():
        total.update(json.loads(line))
    return total


def one_round(seed: int, examples: int, until: float, selection: Sequence[str]) -> tuple[int, str, Counter]:
    """(pytest's status, its output, counts) of every selected property once, as far as time allows."""
    with tempfile.TemporaryDirectory() as folder:
        counts = Path(folder) / "counts"
        counts.touch()
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        environment |= {COUNTS: str(counts), EXAMPLES: str(examples), UNTIL: str(until)}
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "--no-header", "-m", "hypothesis"]
        command += ["-p", "no:cacheprovider", "--benchmark-disable", f"--hypothesis-seed={seed}", *selection]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        output = done.stdout if done.returncode in (PASSED, FAILED) else done.stdout + done.stderr
        return done.returncode, output, counted(counts)


def fuzz(minutes: float, examples: int, seed: int, selection: Sequence[str]) -> int:
    """0 if all held until the time was over, 1 if one did not, 2 if there was nothing to try."""
    begun, total, rounds = time.time(), Counter(), 0
    until = begun + 60 * minutes
    while rounds == 0 or time.time() < until:
        rounds, seed = rounds + 1, seed if rounds == 0 else random.Random(seed).randrange(2**32)
        status, output, counts = one_round(seed, examples, until, selection)
        total.update(counts)
        tried = ", ".join(f"{number} {what}" for what, number in sorted(counts.items())) or "nothing"
        sums = (
            ", ".join(f"{number} {what}" for what, number in sorted(total.items()) if what != "properties") or "nothing"
        )
        minutes_taken = (time.time() - begun) / 60
        print(f"round {rounds}, seed {seed}: {tried} held; {sums} in all, in {minutes_taken:.1f} minutes", flush=True)
        if status == NO_TESTS or status == PASSED and not counts["properties"]:
            print(output, "No property was tried.", sep="\n")
            return 2
        if status != PASSED:
            print(output)
            return 1
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.run", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--examples", type=int, default=ROUND, help="of each property in a round")
    parser.add_argument("--seed", type=int, default=None, help="of the first round, from which the others' follow")
    known, selection = parser.parse_known_args(arguments)
    seed = random.SystemRandom().randrange(2**32) if known.seed is None else known.seed
    return fuzz(known.minutes, known.examples, seed, selection or ["tests/fuzz"])


if __name__ == "__main__":
    sys.exit(main())
