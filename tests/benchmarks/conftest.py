"""What the benchmarks' tests share: a whole run on tiny cells."""

import pytest

from benchmarks import report
from benchmarks.bench_lora_linear import BENCH, IMPLEMENTATIONS, Cell
from benchmarks.runner import Bench, Run, plan_of

PLAIN = Cell("tiny", 128, 128, 96, 16, 0.0, "bf16")


@pytest.fixture
def named():
    """Implementations of the table, by name, in the table's order."""
    return lambda *names: [i for i in IMPLEMENTATIONS if i.name in names]


@pytest.fixture
def run():
    """A whole run on the CPU, as the check-in's worker makes it; returns the document."""

    def runs(implementations, cells=(PLAIN,), budget=None, document=None, bench=BENCH) -> dict:
        chosen = Bench(**{**vars(bench), "implementations": tuple(implementations)})
        plan = plan_of([(chosen, cell) for cell in cells], "cpu", budget_s=100.0, quick=True)
        document = document or report.new_document(plan)
        document["stamp"] = document["stamp"] or report.stamp("cpu")
        Run(document, lambda: None, [chosen], budget).measure()
        return document

    return runs
