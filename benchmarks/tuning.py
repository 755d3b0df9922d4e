"""The course behind `fastpeft tune`: per bucket every variant is checked against float64, what is right is timed in
interleaved rounds, and what beats the predicted choice beyond the noise is written down.

Every second round names the candidate, the rounds between confirm it: the best of several equal variants looks good in
the rounds that it was chosen by, and only there. The table is written after each task, so that nothing is lost when the
time is up.
"""

import math
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from itertools import chain

import torch

from fastpeft import tables
from fastpeft.console import Console
from fastpeft.errors import BackendError, ConfigError
from fastpeft.table_file import Entry, Table, existing, write
from fastpeft.tune import Options

from . import report
from .harness import Budget, Call, Sample, interleave, paired_ratio, quantile, timer_for, warm_up
from .runner import DeviceLost, require_device
from .tuning_tasks import (
    PARTS,
    all_tasks,
    candidates,
    rehearsal_tasks,
    tasks_of_shape,
    tiles_asked,
    with_tiles,
)

LUCK = 0.001
MARGIN = 0.02  # a variant that is not this much faster is not worth leaving the predicted one
SPARE_S = 2.0
FIRST_S = {"cuda": 10.0, "cpu": 1.0}  # expected of the first task at least: most of it is compilation


@dataclass(frozen=True)
class Choice:
    """Of one part of a call. gain: the fraction of the predicted variant's time that is saved, 0 where it stays."""

    name: str
    predicted: str
    gain: float = 0.0


def choose(times: Mapping[str, Sequence[float]], predicted: str) -> Choice:
    """The predicted variant, unless another is faster beyond the noise; the best, if the predicted one has no times.

    `times[name][i]` is of round i. Even rounds name the candidate; in odd ones its time must be MARGIN below the
    predicted one's in the median, and below it so often that of equal variants it would be a luck of less than LUCK.
    """
    best = min(times, key=lambda name: quantile(times[name][::2], 0.5))
    if best == predicted or predicted not in times:
        return Choice(best, predicted)
    ours, theirs = times[best][1::2], times[predicted][1::2]
    gain = 1 - paired_ratio(ours, theirs).median
    if gain < MARGIN or by_luck(sum(a < b for a, b in zip(ours, theirs, strict=True)), len(ours)) > LUCK:
        return Choice(predicted, predicted)
    return Choice(best, predicted, gain)


def by_luck(wins: int, rounds: int) -> float:
    """The probability that one of two equal variants is faster in this many rounds, or in more (a sign test)."""
    return sum(math.comb(rounds, k) for k in range(wins, rounds + 1)) / 2**rounds


@dataclass
class Course:
    """One run over `tasks`. `entries` and `choices` (entry -> part -> Choice) are what came out, `wrong` names what did
    not compute what it should, `failed` what could not run, `unreached` what the budget did not allow."""

    device: torch.device
    tasks: Sequence
    budget: Budget
    timer: object
    rounds: tuple[int, int]
    seconds: float  # of timing, for each choice
    say: Callable[[str], None]
    save: Callable[[list[Entry]], None]
    entries: list[Entry] = field(default_factory=list)
    choices: list[dict[str, Choice]] = field(default_factory=list)
    wrong: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    unreached: list[str] = field(default_factory=list)
    spent: list[float] = field(default_factory=list)

    def run(self) -> None:
        """All tasks, in order, as far as the budget goes. Raises DeviceLost."""
        for number, task in enumerate(self.tasks, 1):
            # The shortest of the last ones: what they compiled is compiled, and a task that takes longer is given up.
            if not self.allows([min(self.spent[-3:], default=FIRST_S[self.device.type])]):
                self.unreached.append(task.id)
                continue
            start = self.budget.elapsed()
            self._task(task, f"[{number}/{len(self.tasks)}]")
            self.spent.append(self.budget.elapsed() - start)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def allows(self, durations: Sequence[float]) -> bool:
        return self.budget.allows(durations, SPARE_S)

    def _task(self, task, place: str) -> None:
        try:
            prepared = task.prepare(self.device)
            calls = {name: prepared.call(name, name) for name in prepared.strategies}
        except torch.OutOfMemoryError as error:
            self.failed[task.id] = f"no memory for it: {error}"
            return
        chosen = self._question(place, task.id, prepared.bucket, calls, prepared.problems, prepared.predicted)
        if chosen is None:
            return
        reads = self._reads(place, task, prepared, chosen) if prepared.reads else None
        self.save(self.entries)
        if task.tiles:
            forward, backward = ((chosen.get(part) or chosen["total"]).name for part in ("forward", "backward"))
            self._tiles(place, task, prepared, prepared.call(forward, backward, *filter(None, [reads])), forward)
            self.save(self.entries)

    def _reads(self, place: str, task, prepared, chosen: dict[str, Choice]) -> int | None:
        """How often dY is read for dB and T by the strategies chosen: into their entry, and returned."""
        strategies, (forward, backward) = self.entries.pop(), (chosen[part].name for part in ("forward", "backward"))
        calls = {f"{times} reads": prepared.call(forward, backward, times) for times in prepared.reads}
        found = self._question(
            place, f"reads of dY in {task.id}", prepared.bucket, calls,
            lambda call, _: prepared.problems(call, forward), {"backward": next(iter(calls))},
        )  # fmt: skip
        if found is None:
            self.entries.append(strategies)
            return None
        entry, reads = self.entries.pop(), int(found["backward"].name.split()[0])
        self.choices.pop()
        self.choices[-1]["reads"] = found["backward"]
        self.entries.append(
            strategies._replace(
                choice=strategies.choice | {"reads": reads},
                confirmed=strategies.confirmed and entry.confirmed,
                median_ms=strategies.median_ms | entry.median_ms,
                wrong=strategies.wrong | entry.wrong,
            )
        )
        return reads

    def _tiles(self, place: str, task, prepared, call: Call, forward: str) -> None:
        """Kernel after kernel of the call, each by the tiles that were chosen for those before it."""
        adopted: dict = {}
        with tiles_asked() as asked:
            call.run()
        known = {entry.bucket for entry in self.entries}
        for bucket in sorted(asked - known):
            numbers = candidates(bucket, self.device)
            if len(numbers) < 2:
                continue
            predicted = next(iter(numbers))
            calls = {name: with_tiles(call, self.device, {**adopted, bucket: n}) for name, n in numbers.items()}
            found = self._question(
                place, f"{bucket.kernel} in {task.id} by {forward}", bucket, calls,
                lambda call, name: prepared.problems(call, forward), {"total": predicted}, numbers,
            )  # fmt: skip
            if found is not None:
                adopted[bucket] = numbers[found["total"].name]

    def _question(self, place, label, bucket, calls, problems, predicted, numbers=None) -> dict[str, Choice] | None:
        """Check, time and choose among `calls`; the entry is added. None if the time was up or nothing was right."""
        ready, host_ms, wrong = {}, {}, {}
        durations: list[float] = []
        for name, call in calls.items():
            if not self.allows(durations):
                self.unreached.append(label)
                return None  # the variants that are left might have been faster
            start = self.budget.elapsed()
            try:
                _, host_ms[name] = warm_up(call, self.device, 2)
                found = "; ".join(problems(call, name))
                kind = self.wrong
            except Exception as error:  # a variant may fail to compile or to fit; the others are still to be measured
                traceback.print_exc()
                found, kind = " ".join(f"{type(error).__name__}: {error}".split())[:300], self.failed
                require_device(self.device)
            durations.append(self.budget.elapsed() - start)
            if found:
                kind[f"{label}: {name}"] = wrong[name] = found
            else:
                ready[name] = call
        if not ready:
            return None
        samples = interleave(self.timer, ready, host_ms, rounds=self.rounds, seconds=self.seconds)
        chosen = {part: choose(_of_part(samples, part), name) for part, name in predicted.items()}
        entry = _entry(bucket, chosen, samples, wrong, numbers)
        self.entries.append(entry)
        self.choices.append(chosen)
        self.say(f"{place} {self.budget.elapsed():.0f} s  {label}: {_said(chosen, entry)}")
        return chosen


def _of_part(samples: Mapping[str, list[Sample]], part: str) -> dict[str, list[float]]:
    return {name: [PARTS[part](sample) for sample in found] for name, found in samples.items()}


def _entry(bucket, chosen: dict[str, Choice], samples, wrong: dict[str, str], numbers) -> Entry:
    times = {
        name if part == "total" else f"{name} {part}": max(quantile(values, 0.5), 1e-6)
        for part in chosen
        for name, values in _of_part(samples, part).items()
    }
    if numbers is not None:
        choice = dict(numbers[chosen["total"].name])
    elif "total" in chosen:
        name = chosen["total"].name
        choice = {"forward": name, "backward": "fused" if name == "decode" else name}
    else:
        choice = {part: each.name for part, each in chosen.items()}
    confirmed = all(each.name == each.predicted for each in chosen.values())
    return Entry(bucket, choice, times, confirmed, today(), {name: text[:1000] for name, text in wrong.items()})


def _said(chosen: dict[str, Choice], entry: Entry) -> str:
    times = ", ".join(f"{name} {ms:.3g}" for name, ms in entry.median_ms.items())
    parts = []
    for part, each in chosen.items():
        what = "" if part == "total" else f"{part} "
        if each.name == each.predicted:
            parts.append(f"{what}{each.name} confirmed")
        else:
            gain = f"{100 * each.gain:.1f} % faster than" if each.gain else "in place of"
            parts.append(f"{what}{each.name}, {gain} {each.predicted}")
    wrong = "".join(f"; {name} left out: {text}" for name, text in entry.wrong.items())
    return f"{'; '.join(parts)} (ms: {times}){wrong}"


def today() -> str:
    return datetime.now(timezone.utc).date().isoformat()


def stamped(device: torch.device, entries: Sequence[Entry]) -> Table:
    """The table of these entries for this machine and its software."""
    from fastpeft.kernels._tiles import family_of

    return Table(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else tables.INTERPRETER,
        family=family_of(device),
        triton=tables.triton_version(),
        kernels=tables.kernels_digest(),
        torch=torch.__version__,
        date=today(),
        commit=report.stamp(device.type)["commit"] or "",
        entries=tuple(entries),
    )


def run(options: Options, timer=None) -> int:
    """`fastpeft tune`. Returns 0; 1 if nothing could be measured or the device was lost, 3 if a variant was wrong."""
    device = _device(options)
    tables.use_none(device)
    budget = Budget(options.seconds)
    console = Console()
    stamp = stamped(device, ())
    out = options.out or f"{tables.user_directory()}/{tables.file_name(stamp.device)}"
    tasks = _tasks(options)
    existing(out, stamp.device)  # a file that may not be written to is better known now
    console.line(f"{stamp.device}: {len(tasks)} buckets, at most {options.seconds:g} s; the table goes to {out}")

    def save(entries: list[Entry]) -> None:
        write(out, Table(**{**vars(stamp), "entries": tuple(entries)}))

    rounds, seconds = ((2, 2), 0.0) if options.smoke else ((24, 80), 1.5)
    course = Course(device, tasks, budget, timer or timer_for(device), rounds, seconds, console.line, save)
    lost = ""
    try:
        course.run()
    except DeviceLost as error:
        lost = str(error)
    _print(console, course, out, lost)
    if course.wrong:
        return 3
    return 1 if lost or not course.entries else 0


def _device(options: Options) -> torch.device:
    """Where to measure. Raises BackendError where there is nothing to measure on."""
    from fastpeft.dispatch import interpreting, triton_unavailable

    if reason := triton_unavailable():
        raise BackendError(f"tune: there is nothing to measure: {reason}")
    if options.smoke:
        if not interpreting():
            raise BackendError("tune --smoke runs in Triton's interpreter: set TRITON_INTERPRET=1 in the environment")
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise BackendError(
            "tune: torch sees no GPU (torch.cuda.is_available() is False), and there is nothing to measure without "
            "one; --smoke rehearses on the CPU"
        )
    if interpreting():
        raise BackendError("tune: TRITON_INTERPRET=1 is for CPU tensors; unset it to measure a GPU")
    return torch.device("cuda", torch.cuda.current_device())


def _tasks(options: Options) -> list:
    """Raises ConfigError where the options contradict each other."""
    names = {"lora": "lora_linear", "prefix": "prefix_attention"}
    if options.shape and options.smoke:
        raise ConfigError("tune: --smoke has shapes of its own; leave out --shape")
    if options.shape:
        tasks = list(chain.from_iterable(tasks_of_shape(sizes) for sizes in options.shape))
    else:
        tasks = rehearsal_tasks() if options.smoke else all_tasks(options.op)
    chosen = [task for task in tasks if options.op == "all" or task.op == names[options.op]]
    if options.shape and len(chosen) < len(tasks):
        raise ConfigError(f"tune: --op {options.op} and a --shape of another op; leave out one of them")
    return chosen


def _print(console: Console, course: Course, out: str, lost: str) -> None:
    rows = []
    for entry, chosen in zip(course.entries, course.choices, strict=True):
        for part, each in chosen.items():
            if each.name != each.predicted:
                bucket = " ".join(str(value).removeprefix("torch.") for value in entry.bucket)
                gain = f"{100 * each.gain:.1f} %" if each.gain else "predicted left out"
                rows.append([f"{entry.op} {bucket}", part, each.predicted, each.name, gain])
    if rows:
        console.table(("bucket", "part", "predicted", "measured", "faster by"), rows, "what changed", figures=False)
    changed = len({row[0] for row in rows})
    console.line(f"{len(course.entries)} choices measured, {len(course.entries) - changed} as predicted -> {out}")
    for title, found in (("wrong", course.wrong), ("could not run", course.failed)):
        for name, text in found.items():
            console.line(f"{title}: {name}: {text}")
    if course.unreached:
        console.line(f"{len(course.unreached)} choices were not reached in {course.budget.seconds:g} s")
    if lost:
        print(f"device lost: {lost}", file=sys.stderr)
