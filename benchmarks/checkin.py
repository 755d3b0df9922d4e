"""One call on a GPU machine, within the minutes given: what is right, what is fast, and how far from the targets.

    python -m benchmarks.checkin --out DIR [--minutes 9] [--resume] [--smoke]

The steps, the most valuable first: the environment, the machine's ceilings, the CUDA tests, tuning, the first cells of
every bench, whole training steps, and what else the time allows. Each is on disk when it is over: DIR/checkin.json is
valid from the first second on (schema in report.py), DIR/checkin.jsonl has its results as JSON lines, DIR/table.txt the
tables, DIR/summary.txt the screen that is printed last, DIR/tuned the table of tuning, which the benches after it use.
--resume goes on in a folder, with the steps that were not finished. What crashes or hangs is named and left out.
--smoke takes the whole course on a CPU, on tiny shapes; no figure of it counts.

Exit status: 0; 1 if a test failed or an implementation raised or died; 2 for wrong usage; 3 if a result was wrong.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from . import bench_step, lines, report, summary
from .benches import BENCHES, BY_OP
from .cuda_tests import run_tests
from .harness import Budget
from .report import ROOT
from .request import Request
from .runner import cells_of, in_turns, key_of, key_of_row, plan_of
from .supervision import GRACE_S, end, start, supervise, work

TEST_WORKERS = 8
SUMMARY_S = 5.0
FIRST_TIERS = {"prefix": 2}  # of a bench in the step of its own; else 1
FIRST_CASES = 3  # of training steps, before the rest


@dataclass
class Course:
    """One call: where to, how long, and on what."""

    out: Path
    budget: Budget
    device: str
    tests: Path

    @property
    def path(self) -> Path:
        return self.out / "checkin.json"

    @property
    def smoke(self) -> bool:
        return self.device == "cpu"

    @property
    def environment(self) -> dict[str, str]:
        return {"FASTPEFT_CACHE": str(self.out / "tuned")}


def _environment(course: Course, budget: Budget) -> str:
    """The stamp is written before the first step: what is missing shows here."""
    stamp = report.load(course.path)["stamp"]
    absent = [name for name in ("triton", "transformers", "peft") if not stamp[name]]
    return f"missing: {', '.join(absent)}" if absent else ""


def _tests(course: Course, budget: Budget) -> str:
    workers = 0 if course.smoke else TEST_WORKERS
    found = run_tests(course.tests.resolve(), course.out, budget.left(), workers)
    document = report.load(course.path)
    document["tests"] = found
    report.save(document, course.path)
    print(report.tests_line(found), flush=True)
    return found["note"] if found["timed_out"] or found["passed"] is None else ""


def _tune(course: Course, budget: Budget) -> str:
    """`fastpeft tune` in a process of its own, which keeps to its seconds; the table is written after every choice."""
    package = __package__.partition(".")[0].replace("benchmarks", "fastpeft")
    command = [sys.executable, "-m", package, "tune", "--seconds", f"{max(5.0, budget.left() - 5):.0f}"]
    command += ["--smoke", "--op", "lora"] if course.smoke else []
    with (course.out / "tune.log").open("w") as log:
        process = start(command, course.environment, stdout=log, stderr=log)
        while process.poll() is None:
            time.sleep(0.1)
            if budget.left() < -GRACE_S:
                end(process)
                return "the time was up; see tune.log"
    # 1: nothing was faster than predicted or the time did not suffice for all; what was measured is in the table.
    return f"exit status {process.returncode}; see tune.log" if process.returncode not in (0, 1) else ""


def _measure(course: Course, budget: Budget, cells: Sequence, cases: Sequence = (), profile: bool = False) -> str:
    """Cells and training steps, by workers that know what ended those before them."""
    document = report.load(course.path)
    before = document["plan"]
    document["plan"] = plan_of(
        cells, course.device, budget_s=budget.left(), quick=course.smoke, passes=PASSES, profile=profile
    )
    document["plan"]["cases"] = [asdict(case) for case in cases]
    for op, names in before.get("without", {}).items():
        document["plan"]["without"].setdefault(op, {}).update(names)
    document["plan"]["skip"] |= before.get("skip", {})
    report.save(document, course.path)
    trouble = supervise(course.path, budget, environment=course.environment)
    document = report.load(course.path)
    _settle(document)
    report.save(document, course.path)
    if found := lines.of(document):
        lines.save(found, course.out / "checkin.jsonl")
    if trouble:
        return trouble
    left = sum(entry["impl"] is None for entry in document["unmeasured"])
    return f"{left} cells not reached" if left else ""


PASSES = ("fwd+bwd", "fwd", "bwd")


def _settle(document: dict) -> None:
    """What an earlier step named as not measured, and a later one measured, is not named any longer."""
    done = set(map(key_of_row, document["results"]))
    measured = {(bench.op, cell.id) for bench, cell in cells_of(document["plan"], BY_OP) if key_of(bench, cell) in done}
    measured |= {
        (bench_step.OP, case.id)
        for case in bench_step.cases_of(document["plan"])
        if (bench_step.OP, tuple(case.shape().values()), case.dropout, case.dtype) in done
    }
    document["unmeasured"] = [
        entry
        for entry in document["unmeasured"]
        if entry["impl"] is not None or (entry["op"], entry["cell"]) not in measured
    ]


def _ceilings(course: Course, budget: Budget) -> str:
    return _measure(course, budget, ())


def _bench(name: str) -> Callable[[Course, Budget], str]:
    def run(course: Course, budget: Budget) -> str:
        bench = BENCHES[name]
        tiers = bench.tiers(course.smoke)[: FIRST_TIERS.get(name, 1)]
        return _measure(course, budget, [(bench, cell) for tier in tiers for cell in tier])

    return run


def _cases(course: Course) -> list:
    return bench_step.cases(Request(shapes=("tiny",) if course.smoke else (), tiny=course.smoke))


def _step(course: Course, budget: Budget) -> str:
    return _measure(course, budget, (), _cases(course)[:FIRST_CASES])


def _rest(course: Course, budget: Budget) -> str:
    """Every other cell, in turns, then every other training step, then the kernels of the first cells."""
    cells = in_turns(list(BENCHES.values()), tiny=course.smoke)
    return _measure(course, budget, cells, _cases(course), profile=True)


# (name, the share of the time by which it is to be over, what it does), the most valuable first. What one does not use
# is the next one's.
STEPS: list[tuple[str, float, Callable[[Course, Budget], str]]] = [
    ("environment", 0.01, _environment),
    ("ceilings", 0.05, _ceilings),
    ("tests", 0.30, _tests),
    ("tune", 0.45, _tune),
    ("lora", 0.58, _bench("lora")),
    ("prefix", 0.70, _bench("prefix")),
    ("step", 0.84, _step),
    *((name, 0.84 + 0.03 * place, _bench(name)) for place, name in enumerate(list(BENCHES)[2:], 1)),
    ("rest", 1.0, _rest),
]


def run_steps(course: Course) -> None:
    """Every step that is not done yet, each recorded when it is over."""
    for name, share, run in STEPS:
        document = report.load(course.path)
        if any(step["name"] == name and step["status"] == "done" for step in document["steps"]):
            continue
        until = share * course.budget.seconds - course.budget.elapsed()
        begun = time.monotonic()
        if until <= 1.0:
            status, note = "skipped", "no time was left"
        else:
            print(f"[{course.budget.elapsed():.0f}/{course.budget.seconds:.0f} s] {name}, {until:.0f} s", flush=True)
            try:
                note = run(course, Budget(until))
                status = "partial" if note else "done"
            except OSError as error:
                status, note = "failed", f"{type(error).__name__}: {error}"
        entry = {"name": name, "status": status, "note": note, "budget_s": max(0.0, until)}
        document = report.load(course.path)
        document["steps"] = [step for step in document["steps"] if step["name"] != name]
        document["steps"].append(entry | {"seconds": time.monotonic() - begun})
        report.save(document, course.path)


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(prog="python -m benchmarks.checkin", description=__doc__.splitlines()[0])
    place = out.add_mutually_exclusive_group(required=True)
    place.add_argument("--out", type=Path, metavar="DIR")
    place.add_argument("--worker", type=Path, metavar="FILE", help=argparse.SUPPRESS)
    out.add_argument("--minutes", type=float, default=9.0, metavar="M", help="for everything (default 9)")
    out.add_argument("--resume", action="store_true", help="go on in DIR, with the steps that were not finished")
    out.add_argument("--smoke", action="store_true", help="on a CPU, tiny: the whole course, no figure counts")
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
    device = "cpu" if arguments.smoke else "cuda"
    budget = Budget(60 * arguments.minutes - GRACE_S - SUMMARY_S)
    course = Course(arguments.out.resolve(), budget, device, arguments.tests)
    if refusal := _refusal(arguments, course):
        print(f"checkin: {refusal}", file=sys.stderr)
        return 2
    if not arguments.resume:
        course.out.mkdir(parents=True, exist_ok=True)
        document = report.new_document(plan_of((), device, budget_s=0.0))
        document["stamp"] = report.stamp(device, arguments.commit)
        report.save(document, course.path)
    run_steps(course)
    document = report.load(course.path)
    (course.out / "table.txt").write_text(report.table(document))
    screen = summary.text(document, course.out)
    (course.out / "summary.txt").write_text(screen)
    print(screen, end="", flush=True)
    died = any(step["status"] == "failed" for step in document["steps"])
    return report.exit_code(document) or int(died)


def _refusal(arguments: argparse.Namespace, course: Course) -> str:
    import torch

    if course.budget.seconds <= 0:
        return f"--minutes {arguments.minutes:g} is too short for anything"
    if not course.smoke and not torch.cuda.is_available():
        return "torch sees no GPU (torch.cuda.is_available() is False). --smoke rehearses without one"
    if not arguments.resume:
        return f"{course.path} is there already: --resume goes on with it" if course.path.exists() else ""
    try:
        document = report.load(course.path)
    except (OSError, ValueError) as error:
        return f"nothing to resume in {course.out}: {error}"
    if problems := report.problems(document):
        return f"{course.path} cannot be resumed: {problems[0]}"
    now = report.stamp(course.device)
    for name in ("device", "source_sha256", "torch", "triton"):
        if document["stamp"][name] != now[name]:
            return (
                f"{course.path} has {name} {document['stamp'][name]}, here it is {now[name]}: begin in another folder"
            )
    return ""


if __name__ == "__main__":
    sys.exit(main())
