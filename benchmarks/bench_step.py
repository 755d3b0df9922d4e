"""Whole training steps of a model with random weights: forward, backward, AdamW; frozen, HF peft, hand-written LoRA and
ours, interleaved, and in one case, after all the others, HF peft under torch.compile.

    fastpeft bench step [--shape llama3-8b] ...    on a GPU the models of geometry.py in bf16, on a CPU small ones
    python -m benchmarks.bench_step [--method lora|dora|prefix|…] [--threads 2] [--rounds 12] [--clock cpu] [--profile]

The second line is the comparison on a CPU alone: a Llama of hidden 512 with LoRA or DoRA of rank 16 on every linear
layer, batch 4 of 256 tokens; one of hidden 256 with 30 virtual tokens, batch 2 of 1024 and 1 of 2048; fp32, and nothing
of kernels. On a machine that others use too, `--threads 1 --clock cpu` counts the seconds of the process itself.

The floor is the frozen model: forward, and backward down to its embeddings. No time is shown before loss and gradients
are right (step_check.py). What the host needs to issue a step is part of it, as in training: nothing covers it.

`tokens_per_s`: batch · seq over the median. `mfu`: `model_flops` (step_models.py) over the median, as a fraction of the
bf16 product that this run measured on this machine, not of a data sheet; null for fp32. Adapters' operations are not
counted, so among implementations it says what tokens a second say. `peak_bytes`: the most above what stood before the
step (weights, adapter, optimizer); `note` has the peak in all.
"""

import argparse
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from fastpeft.fallback import no_fallback

from . import report
from .baselines import Missing
from .harness import (
    Budget,
    CpuTimer,
    ceilings,
    interleave,
    measure_memory,
    timer_for,
    warm_up,
)
from .report import FLOOR
from .request import Request
from .runner import join_ratios, key_of_row, require_device, say_line
from .step_cases import METHODS, Case, cases, cases_of
from .step_check import Check, dtype_of, release
from .step_models import ALGEBRA, COMPILED, FUSED, LIGER, OURS, PEFT, build_base, model_flops
from .step_rows import OP, PEERS, Found, row_of, step_of, words

IMPLEMENTATIONS = (FLOOR, PEFT, ALGEBRA, OURS, FUSED, LIGER)  # and COMPILED in one case, after all the others
FIRST_S = {"cuda": 30.0, "cpu": 0.5}  # expected of the first case: a model is built, checked and compiled for
FIRST_COMPILED_S = 60.0  # of torch.compile's: a layer at two lengths, both ways
FIXED_SHARE = 0.5  # of a case's seconds, whatever its tokens are: models are built and checked
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
__all__ = ["IMPLEMENTATIONS", "OP", "PEERS", "Case", "Steps", "cases", "cases_of"]


class Steps:
    """One pass over cases, as runner.Run makes it over an op's cells: rows go to document["results"], `save` is called
    before every stage that could end the process, which document["running"] then names. `timer`: in place of the
    device's own."""

    def __init__(
        self,
        document: dict,
        wanted: Sequence[Case],
        save: Callable[[], None],
        budget: Budget,
        say: Callable[[str], None] = say_line,
        device: torch.device | None = None,
        watch: Callable[[int, str], None] = lambda done, note: None,
        timer=None,
    ):
        self.document, self.cases, self.save = document, list(wanted), save
        self.budget, self.say, self.watch = budget, say, watch
        self.plan = document["plan"]
        self.device = device or torch.device(self.plan["device"])
        self.timer = timer
        self._base: tuple[tuple[str, str], nn.Module] | None = None
        self._done = 0

    def measure(self) -> None:
        """Every case that has no results yet, in order; what is left out is named in document["unmeasured"]."""
        measured = self.document["stamp"]["ceilings"]
        if measured["matmul_tflops"] is None:
            self._enter("-", None, "ceilings")
            measured.update(ceilings(self.device, torch.bfloat16, tiny=self.device.type == "cpu"))
        self.timer = self.timer or timer_for(self.device)
        for name, reason in self.plan["without"].get(OP, {}).items():
            self._leave_out("all cells", name, reason)
        self._uncompiled()
        self._compiled()
        self._base = None
        release(self.device)
        self.document["running"] = None
        self.save()

    def _uncompiled(self) -> None:
        done = self._measured(*IMPLEMENTATIONS)
        spent: list[tuple[float, int]] = []
        for number, case in enumerate(self.cases):
            self._done = number
            if case.key in done:
                continue
            if case.id in self.plan["skip"]:
                self._leave_out(case.id, None, self.plan["skip"][case.id])
                continue
            if not self.budget.allows(_expected(case, spent) or [FIRST_S[self.device.type]]):
                self._leave_out(case.id, None, f"the budget of {self.budget.seconds:.0f} s was spent")
                continue
            start = self.budget.elapsed()
            rows = self._case(case, self._taking_part(IMPLEMENTATIONS))
            spent.append((self.budget.elapsed() - start, case.tokens))
            self.document["results"].extend(rows)
            self.save()
            self._say(case, rows)

    def _compiled(self) -> None:
        """torch.compile's, in the first case of LoRA, when all cases are measured: beside the floor and ours once more.
        Of those rounds ours gets the ratio to it alone."""
        taking_part = self._taking_part((FLOOR, OURS, COMPILED))
        if COMPILED not in [each.name for each in taking_part]:
            return
        if not self.plan.get("compiled"):
            if self.device.type == "cpu":
                self._leave_out("all cells", COMPILED, "not compiled on the CPU path")
            return
        case = next((case for case in self.cases if case.method == "lora"), None)
        if case is None or case.key in self._measured(COMPILED):
            return
        self._leave_out("other cells", COMPILED, "compiled in one cell only")
        if case.key not in self._measured(FLOOR) or not self.budget.allows([FIRST_COMPILED_S]):
            self._leave_out(case.id, COMPILED, "no time was left to compile it")
            return
        torch._dynamo.reset()  # what other models compiled counts among the eight times after which dynamo gives up
        rows = self._case(case, taking_part)
        join_ratios(self.document, rows, [COMPILED])
        self.document["results"] += [row for row in rows if row["impl"] == COMPILED]
        self.save()
        self._say(case, rows)

    def _measured(self, *names: str) -> set[tuple]:
        """What identifies the cases that have a row of one of them."""
        return {key_of_row(row) for row in self.document["results"] if row["op"] == OP and row["impl"] in names}

    def _say(self, case: Case, rows: list[dict]) -> None:
        self.say(f"[{self.budget.elapsed():.0f}/{self.budget.seconds:.0f} s] {words(case, rows)}")

    def _enter(self, case: str, name: str | None, stage: str) -> None:
        self.document["running"] = {"op": OP, "cell": case, "impl": name, "stage": stage}
        self.save()
        self.watch(self._done, " ".join(filter(None, (case, name, stage))))

    def _leave_out(self, case: str, name: str | None, reason: str) -> None:
        entry = {"op": OP, "cell": case, "impl": name, "reason": reason}
        if entry not in self.document["unmeasured"]:
            self.document["unmeasured"].append(entry)

    def _taking_part(self, names: Sequence[str]) -> list[Found]:
        without, against = self.plan["without"].get(OP, {}), self.plan.get("against")
        wanted = [name for name in names if name not in without]
        return [Found(name) for name in wanted if name not in PEERS or against is None or name in against]

    @no_fallback()
    def _case(self, case: Case, found: list[Found]) -> list[dict]:
        self._enter(case.id, None, "base")
        try:
            base = self._base_of(case)
        except torch.OutOfMemoryError as error:
            self._leave_out(case.id, None, f"no memory for the model: {_in_words(error)}")
            return []
        self._check(case, base, [each for each in found if each.name != FLOOR])
        for each in found:
            if each.status == "ok":
                self._enter(case.id, each.name, "warm-up")
                self._attempt(each, self._prepare, each, case, base)
        self._enter(case.id, None, "timing")
        ready = {each.name: each.step for each in found if each.status == "ok"}
        rounds, seconds = tuple(self.plan["rounds"]), self.plan["seconds_per_cell"]
        samples = {}
        try:
            samples = interleave(self.timer, ready, {}, rounds=rounds, seconds=seconds) if ready else {}
        except torch.OutOfMemoryError as error:
            for each in found:
                if each.status == "ok":
                    each.status, each.note = "failed", f"no memory for steps in turns: {_in_words(error)}"
        flops = model_flops(base, case)
        ceiling = self.document["stamp"]["ceilings"]["matmul_tflops"] if case.dtype != "fp32" else None
        rows = [row_of(case, each, samples, flops, ceiling) for each in found]
        del ready, found
        release(self.device)
        return rows

    def _base_of(self, case: Case) -> nn.Module:
        """The last case's if it is the same; the old one is gone before a new one is made."""
        key = case.model, case.dtype
        if self._base is None or self._base[0] != key:
            self._base = None
            release(self.device)
            self._base = key, build_base(*key, self.device)
        return self._base[1]

    def _check(self, case: Case, base: nn.Module, found: list[Found]) -> None:
        """Verdicts for all of them, and of what they were judged by nothing is left."""
        self._enter(case.id, None, "truth")
        truth = Found("truth")
        check = self._attempt(truth, Check, case, base, self.device)
        for each in found:
            if check is None:
                each.status, each.note = truth.status, f"there is nothing to check it by: {truth.note}"
                continue
            self._enter(case.id, each.name, "check")
            each.checked = self._attempt(each, check.verify, each.name)
            if each.checked and each.checked["problems"]:
                each.status, each.note = "wrong", "; ".join(each.checked["problems"])[:1000]
        del check
        release(self.device)

    def _attempt(self, each: Found, work: Callable, *given):
        """What `work` returns; or None, and `each` says why."""
        result = None
        try:
            result = work(*given)
        except Missing as reason:
            each.status, each.note = "missing", str(reason)
        except torch.OutOfMemoryError as error:
            each.status, each.note = "failed", f"out of memory: {_in_words(error)}"
        except Exception as error:  # a peer or a kernel may raise anything, and the others are still worth measuring
            traceback.print_exc()
            each.status, each.note = "failed", _in_words(error)
        if each.status == "failed":
            each.step = None
            release(self.device)
            require_device(self.device)
        return result

    def _prepare(self, each: Found, case: Case, base: nn.Module) -> None:
        """Built, run until compiled, and weighed."""
        each.step = step_of(each.name, base, case, self.device)
        each.adapter_dtype = None if each.name == FLOOR else dtype_of(each.step.model)
        each.first_s, each.host_ms = warm_up(each.step, self.device)
        each.memory = measure_memory(each.step, self.device, count_saved=each.name != COMPILED)
        if each.memory.peak is not None:
            weights = sum(p.nbytes for p in base.parameters())
            total = weights + each.step.own_bytes() + each.memory.peak
            each.note = f"{total / 1e9:.2f} GB at the peak, of which the frozen weights {weights / 1e9:.2f}"


def _expected(case: Case, spent: Sequence[tuple[float, int]]) -> list[float]:
    """Seconds that the case would have taken like each that took (seconds, of so many tokens)."""
    return [seconds * (FIXED_SHARE + (1 - FIXED_SHARE) * min(1.0, case.tokens / tokens)) for seconds, tokens in spent]


def _in_words(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def profile(case: Case, repeats: int = 5) -> list[tuple[str, dict[str, tuple[float, float]]]]:
    """(operator, (its own milliseconds, its calls) in a step by implementation) on a CPU; what ours adds most first."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as recorder

    device = torch.device("cpu")
    base = build_base(case.model, case.dtype, device)
    spent: dict[str, dict[str, tuple[float, float]]] = {}
    for name in (FLOOR, PEFT, OURS):
        step = step_of(name, base, case, device)
        warm_up(step, device)
        with recorder(activities=[ProfilerActivity.CPU]) as recorded:
            for _ in range(repeats):
                step.run()
        for event in recorded.key_averages():
            milliseconds = event.self_cpu_time_total / 1e3 / repeats
            spent.setdefault(event.key, {})[name] = milliseconds, event.count / repeats
    nothing = (0.0, 0.0)
    return sorted(spent.items(), key=lambda item: item[1].get(FLOOR, nothing)[0] - item[1].get(OURS, nothing)[0])


def _say_profile(case: Case, lines: int = 25) -> None:
    print(f"{case.id}: ms (calls) in a step")
    for key, spent in profile(case)[:lines]:
        shares = [f"{name} {milliseconds:.2f} ({calls:g})" for name, (milliseconds, calls) in spent.items()]
        print(f"  {key[:70]}: {', '.join(shares)}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The comparison on a CPU. Returns the exit status of report.py; argparse leaves with 2 for wrong usage."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_step", description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=list(METHODS), default="lora")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--json", type=Path, help="write the whole document there (report.py)")
    parser.add_argument("--profile", action="store_true", help="instead: which operators a step spends its time in")
    chosen = parser.parse_args(argv)
    torch.set_num_threads(chosen.threads)
    wanted = cases(Request(tiny=True), [chosen.method])
    if chosen.profile:
        for case in wanted:
            _say_profile(case)
        return 0
    plan = {
        "device": "cpu",
        "clock": chosen.clock,
        "cases": [asdict(case) for case in wanted],
        "rounds": [chosen.rounds, chosen.rounds],
        "seconds_per_cell": 0.0,
        "without": {},
        "skip": {},
    }
    document = report.new_document(plan)
    document["stamp"] = report.stamp("cpu")
    print(report.CPU_HEADER, flush=True)
    timer = CpuTimer(CLOCKS[chosen.clock])
    Steps(document, cases_of(plan), lambda: None, Budget(float("inf")), timer=timer).measure()
    if chosen.json:
        report.save(document, chosen.json)
    return report.exit_code(document)


if __name__ == "__main__":
    raise SystemExit(main())
