"""One call on a GPU machine, within the minutes given: what is right, what is fast, and how far from the targets.

    python -m benchmarks.checkin --out DIR [--minutes 9] [--resume] [--smoke]

The steps, the most valuable first: the environment, the machine's ceilings, the CUDA tests, tuning, the first cells of
LoRA (single layers, and those that are one op) and of attention over a prefix, whole training steps, the first cells of
every other bench, and what else the time allows, torch.compile last. Each is on disk when it is over: DIR/checkin.json
is valid from the first second on (schema in report.py), DIR/checkin.jsonl has its results as JSON lines, DIR/table.txt
the tables, DIR/summary.txt the screen that is printed last, DIR/tuned the table of tuning, which benches after it use,
DIR/overhead.txt what the ops' Python takes on this processor, measured beside the tests with the GPU hidden.
--resume goes on in a folder, with the steps that were not finished. What crashes or hangs is named and left out.
--smoke takes the whole course on a CPU, on tiny shapes; no figure of it counts.

Exit status: 0; 1 if a test failed or an implementation raised or died; 2 for wrong usage; 3 if a result was wrong.
"""

import argparse
import contextlib
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from . import bench_step, lines, report, summary
from .benches import BENCHES, BY_OP
from .cuda_tests import run_tests
from .harness import Budget
from .report import ROOT
from .request import Request
from .runner import cells_of, in_turns, key_of, key_of_row, plan_of
from .supervision import GRACE_S, Worker, end, serve, start, supervise

TEST_WORKERS = 8
SUMMARY_S = 5.0
FIRST_TIERS = {"lora": 2, "prefix": 2}  # of a bench before the rest; else 1
FIRST_CASES = 3  # of training steps, before the rest
STEP_ROUNDS = 5  # at least: a round of steps of eight billion parameters takes seconds
PASSES = ("fwd+bwd", "fwd", "bwd")
# Where tests for GPUs are: to collect all others takes longer than some of these.
TESTS = ("tests/cuda", *(f"tests/benchmarks/test_{name}.py" for name in (
    "accuracy", "harness", "replay", "bench_prefix_attention", "bench_gated_prompt_attention", "bench_prompt_embedding",
    "bench_lora_projections", "bench_dora_linear", "bench_expert_lora_linear", "bench_mixed_lora_linear",
)))  # fmt: skip


class Ended(NamedTuple):
    """How a step ended: "done", "partial", "wrong" or "failed", and what there is to say of it."""

    status: str
    note: str = ""


@dataclass
class Course:
    """One call: where to, how long, and on what."""

    out: Path
    budget: Budget
    device: str
    tests: tuple[Path, ...]

    @property
    def path(self) -> Path:
        return self.out / "checkin.json"

    @property
    def smoke(self) -> bool:
        return self.device == "cpu"

    @property
    def environment(self) -> dict[str, str]:
        # Steps of large models, ours and HF's in turns, would leave a cache of blocks that fit neither.
        return {"FASTPEFT_CACHE": str(self.out / "tuned"), "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}

    @cached_property
    def worker(self) -> Worker:
        return Worker(self.path, environment=self.environment)


def _environment(course: Course, budget: Budget) -> Ended:
    """The stamp is written before the first step: what is missing shows here."""
    stamp = report.load(course.path)["stamp"]
    absent = [name for name in ("triton", "transformers", "peft") if not stamp[name]]
    return Ended("done", f"missing: {', '.join(absent)}" if absent else "")


@contextlib.contextmanager
def _overhead(course: Course, budget: Budget) -> Iterator[None]:
    """`benchmarks.overhead` beside what is done within, and as long after it as there is time."""
    command = [sys.executable, "-m", f"{__package__}.overhead", "--calls", "10" if course.smoke else "400"]
    hidden = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    with (course.out / "overhead.txt").open("w") as stream:
        process = start(command, hidden, stdout=stream, stderr=stream)
        try:
            yield
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, budget.left()))
        finally:
            if process.poll() is None:
                end(process)


def _tests(course: Course, budget: Budget) -> Ended:
    course.worker.end()  # the device is theirs alone
    workers = 0 if course.smoke else TEST_WORKERS
    with _overhead(course, budget):
        found = run_tests([path.resolve() for path in course.tests], course.out, budget.left(), workers)
    document = report.load(course.path)
    document["tests"] = found
    report.save(document, course.path)
    print(report.tests_line(found), flush=True)
    return Ended("partial" if found["timed_out"] or found["passed"] is None else "done", found["note"])


def _tune(course: Course, budget: Budget) -> Ended:
    """`fastpeft tune` in a process of its own, which keeps to its seconds; the table is written after every choice."""
    course.worker.end()
    package = __package__.partition(".")[0].replace("benchmarks", "fastpeft")
    command = [sys.executable, "-m", package, "tune", "--seconds", f"{max(5.0, budget.left() - 5):.0f}"]
    command += ["--smoke", "--op", "lora"] if course.smoke else []
    with (course.out / "tune.log").open("w") as log:
        process = start(command, course.environment, stdout=log, stderr=log)
        while process.poll() is None:
            time.sleep(0.1)
            if budget.left() < -GRACE_S:
                end(process)
                return Ended("partial", "the time was up; see tune.log")
    status = {0: "done", 3: "wrong"}.get(process.returncode, "failed")
    return Ended(status, f"exit status {process.returncode}; see tune.log" if process.returncode else "")


def _measure(course: Course, budget: Budget, cells: Sequence, cases: Sequence = (), last: bool = False) -> Ended:
    """Cells and training steps, by workers that know what ended those before them. last: torch.compile takes part, and
    kernels are listed, for which nothing else is put off."""
    document = report.load(course.path)
    before = document["plan"]
    document["plan"] = plan_of(
        cells, course.device, budget_s=budget.left(), quick=course.smoke, passes=PASSES, compiled=last, profile=last
    )
    if cases:
        document["plan"]["cases"] = [asdict(case) for case in cases]
        document["plan"]["rounds"][0] = min(document["plan"]["rounds"][0], STEP_ROUNDS)
    for op, names in before.get("without", {}).items():
        document["plan"]["without"].setdefault(op, {}).update(names)
    document["plan"]["skip"] |= before.get("skip", {})
    report.save(document, course.path)
    trouble = supervise(course.worker, budget)
    document = report.load(course.path)
    _settle(document)
    report.save(document, course.path)
    if found := lines.of(document):
        lines.save(found, course.out / "checkin.jsonl")
    wanted = {(bench.op, cell.id) for bench, cell in cells} | {(bench_step.OP, case.id) for case in cases}
    left = sum(e["impl"] is None and (e["op"], e["cell"]) in wanted for e in document["unmeasured"])
    notes = [trouble, f"{left} of {len(wanted)} not reached" if left else ""]
    return Ended("partial" if any(notes) else "done", "; ".join(filter(None, notes)))


def _settle(document: dict) -> None:
    """What an earlier step named as not measured, and a later one measured, is not named any longer."""
    done = set(map(key_of_row, document["results"]))
    measured = {(bench.op, cell.id) for bench, cell in cells_of(document["plan"], BY_OP) if key_of(bench, cell) in done}
    measured |= {(bench_step.OP, case.id) for case in bench_step.cases_of(document["plan"]) if case.key in done}
    document["unmeasured"] = [
        entry
        for entry in document["unmeasured"]
        if entry["impl"] is not None or (entry["op"], entry["cell"]) not in measured
    ]


def _ceilings(course: Course, budget: Budget) -> Ended:
    return _measure(course, budget, ())


def _benches(*names: str) -> Callable[[Course, Budget], Ended]:
    """The first cells of these benches."""

    def run(course: Course, budget: Budget) -> Ended:
        chosen = [(BENCHES[name], BENCHES[name].tiers(course.smoke)[: FIRST_TIERS.get(name, 1)]) for name in names]
        return _measure(course, budget, [(bench, cell) for bench, tiers in chosen for tier in tiers for cell in tier])

    return run


def _cases(course: Course) -> list:
    return bench_step.cases(Request(shapes=("tiny",) if course.smoke else (), tiny=course.smoke))


def _step(course: Course, budget: Budget) -> Ended:
    return _measure(course, budget, (), _cases(course)[:FIRST_CASES])


def _more_steps(course: Course, budget: Budget) -> Ended:
    return _measure(course, budget, (), _cases(course))


def _compiled_steps(course: Course, budget: Budget) -> Ended:
    """Beside the cases that are measured already, HF peft's under torch.compile: a minute and more of compilation."""
    return _measure(course, budget, (), _cases(course), last=True)


def _rest(course: Course, budget: Budget) -> Ended:
    """Every other cell, in turns, then torch.compile, then the kernels of the first cells."""
    return _measure(course, budget, in_turns(list(BENCHES.values()), tiny=course.smoke), last=True)


# (name, the share of the time by which it is to be over, what it does), the most valuable first. What one does not use
# is the next one's.
STEPS: list[tuple[str, float, Callable[[Course, Budget], Ended]]] = [
    ("environment", 0.01, _environment),
    ("ceilings", 0.05, _ceilings),
    ("tests", 0.27, _tests),
    ("tune", 0.38, _tune),
    ("lora", 0.55, _benches("lora", "projections", "mlp")),
    ("prefix", 0.65, _benches("prefix")),
    ("step", 0.84, _step),
    ("others", 0.90, _benches("adapter", "prompt", "mixed", "experts", "dora")),
    ("more steps", 0.93, _more_steps),
    ("compiled steps", 0.93, _compiled_steps),
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
            ended = Ended("skipped", "no time was left")
        else:
            print(f"[{course.budget.elapsed():.0f}/{course.budget.seconds:.0f} s] {name}, {until:.0f} s", flush=True)
            try:
                ended = run(course, Budget(until))
            except Exception as error:  # whatever it is, the other steps are still worth their time
                traceback.print_exc()
                ended = Ended("failed", f"{type(error).__name__}: {error}")
        entry = {"name": name, **ended._asdict(), "budget_s": max(0.0, until)}
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
    out.add_argument("--tests", type=Path, action="append", metavar="PATH", help="in place of all tests for GPUs")
    out.add_argument("--commit", help="what to stamp where the tree carries no history")
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see the module's docstring for the exit status."""
    try:
        arguments = parser().parse_args(argv)
    except SystemExit as stop:  # argparse's own way out; callers want a number
        return int(stop.code or 0)
    if arguments.worker:
        return serve(arguments.worker)
    device = "cpu" if arguments.smoke else "cuda"
    budget = Budget(60 * arguments.minutes - GRACE_S - SUMMARY_S)
    tests = tuple(arguments.tests or (ROOT / path for path in TESTS))
    course = Course(arguments.out.resolve(), budget, device, tests)
    if refusal := _refusal(arguments, course):
        print(f"checkin: {refusal}", file=sys.stderr)
        return 2
    if not arguments.resume:
        course.out.mkdir(parents=True, exist_ok=True)
        document = report.new_document(plan_of((), device, budget_s=0.0))
        document["stamp"] = report.stamp(device, arguments.commit)
        report.save(document, course.path)
    try:
        run_steps(course)
    finally:
        course.worker.end()
    document = report.load(course.path)
    (course.out / "table.txt").write_text(report.table(document))
    screen = summary.text(document, course.out)
    (course.out / "summary.txt").write_text(screen)
    print(screen, end="", flush=True)
    ends = {step["status"] for step in document["steps"]}
    return 3 if "wrong" in ends else report.exit_code(document) or int("failed" in ends)


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
