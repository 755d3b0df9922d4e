"""Run the whole support matrix (`make matrix`), fastpeft and Hugging Face peft through the same checks, print it and
write docs/support.md.

    python -m tests.matrix_report [--families llama,bert] [--jobs 2] [--out docs/support.md]
"""

import argparse
import concurrent.futures
import datetime
import multiprocessing
import re
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from tests.matrix import CHECKS, FAMILIES, METHODS, TASKS, Cell, attempt, cells, equals_peft, offers, ours, outcome
from tests.matrix import peft_s as theirs

OUT = Path(__file__).resolve().parents[1] / "docs" / "support.md"
LETTERS = {
    "defaults": "D",
    "trains": "T",
    "reloads": "R",
    "padding": "P",
    "checkpointing": "C",
    "answers": "A",
    "generates": "G",
}
TITLES = {
    "CAUSAL_LM": "Language modelling", "SEQ_2_SEQ_LM": "Sequence to sequence", "SEQ_CLS": "A class for a sequence",
    "TOKEN_CLS": "A class for each token", "QUESTION_ANS": "Answers to questions",
}  # fmt: skip


@dataclass
class Found:
    """What became of one cell: by library, check -> what went wrong, or ""; and whether the two compute the same."""

    cell: Cell
    ours: dict[str, str]
    peft: dict[str, str]
    equal: str


@dataclass
class Notes:
    """Numbered remarks below the tables, each once."""

    numbers: dict[str, int] = field(default_factory=dict)

    def of(self, words: str) -> str:
        return f"[{self.numbers.setdefault(words, len(self.numbers) + 1)}]"


def examined(cell: Cell) -> Found:
    """All checks of one cell, in both libraries."""
    found = []
    for library in (ours(), theirs()):
        results = {}
        for check in CHECKS:
            with tempfile.TemporaryDirectory() as folder:
                results[check] = outcome(library, cell, check, Path(folder))
        found.append(results)
    return Found(cell, *found, attempt(equals_peft, cell))


def _family(family: str) -> list[Found]:
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    return [examined(cell) for cell in cells() if cell.family == family]


def run(families: list[str], jobs: int) -> list[Found]:
    """The cells of these families, by that many processes, with a bar."""
    from rich.progress import Progress

    context = multiprocessing.get_context("spawn")
    found: dict[str, list[Found]] = {}
    with concurrent.futures.ProcessPoolExecutor(jobs, context) as pool, Progress() as progress:
        bar = progress.add_task("families", total=len(families))
        futures = {pool.submit(_family, family): family for family in families}
        for future in concurrent.futures.as_completed(futures):
            found[futures[future]] = future.result()
            progress.update(bar, advance=1, description=futures[future])
    return [each for family in families for each in found[family]]


def verdict(results: dict[str, str], notes: Notes) -> str:
    """yes; or the letters of the checks that failed; or no, where a model cannot even be made or trained, and why."""
    failed = {check: words for check, words in results.items() if words}
    reasons = {words for check, words in failed.items() if check != "defaults"}
    if "trains" in failed and "reloads" in failed and len(reasons) == 1:
        return f"no {notes.of(_plain(failed['trains']))}"
    return "".join(LETTERS[check] for check in failed) or "yes"


def _plain(words: str) -> str:
    """Without what differs between cells and means the same."""
    words = re.sub(r"\w+For(\w+) cannot", r"…For\1 cannot", words)
    words = re.sub(r"model type for adaption prompt: '.*?'", "model type for adaption prompt", words)
    words = re.sub(r"\s*\(\d+\)", "", words)
    return re.sub(r"(\w+)\( \(\w+\): .*", r"\1(…)", words)[:300]  # a module, in full


def table(task: str, found: list[Found], notes: Notes) -> list[str]:
    by_cell = {each.cell: each for each in found if each.cell.task == task}
    if not by_cell:
        return []
    lines = [
        f"## {TITLES[task]} ({task})",
        "",
        "| family | " + " | ".join(METHODS) + " |",
        "|---" * (len(METHODS) + 1) + "|",
    ]
    for family in dict.fromkeys(each.cell.family for each in found):
        if not offers(family, task):
            continue
        row = []
        for method in METHODS:
            each = by_cell[Cell(family, task, method)]
            equal = " =" if not each.equal else ""
            row.append(f"**{verdict(each.ours, notes)}** / {verdict(each.peft, notes)}{equal}")
        lines.append(f"| {family} | " + " | ".join(row) + " |")
    return [*lines, ""]


def versions() -> str:
    import peft
    import torch
    import transformers

    import fastpeft

    names = {"fastpeft": fastpeft, "peft": peft, "transformers": transformers, "torch": torch}
    return ", ".join(f"{name} {module.__version__}" for name, module in names.items())


def document(found: list[Found]) -> str:
    """docs/support.md."""
    notes, whole = Notes(), sum(not any(each.ours.values()) for each in found)
    theirs_whole = sum(not any(each.peft.values()) for each in found)
    equal = sum(not each.equal for each in found)
    tables = [line for task in TASKS for line in table(task, found, notes)]
    head = [
        "# What works where",
        "",
        f"Written by `make matrix` on {datetime.date.today()}, with {versions()}, on a CPU.",
        "Every cell was run, on tiny models with random weights. Before the stroke stands **fastpeft**, behind it",
        "Hugging Face peft.",
        "",
        f"Of {len(found)} cells all checks pass in {whole} for fastpeft and in {theirs_whole} for peft.",
        f"In {equal} the two compute the same logits (to 1e-5) and gradients (to 1e-4), marked `=`.",
        "",
        "| letter | a check that fails there |",
        "|---|---|",
        "| D | nothing need be said of the model; where peft asks (target_modules, sizes), it is told, and goes on |",
        "| T | three steps on one batch: the loss falls, everything trainable has a gradient, a head is trained |",
        "| R | a saved adapter, loaded on a fresh base, gives the same logits and a loss |",
        "| P | a row gives the same alone, behind more padding, and beside longer rows |",
        "| C | gradient checkpointing, of both kinds, changes no gradient |",
        "| A | answers are found where the labels have them, and segments are honoured |",
        "| G | greedy decoding = one argmax after the other, without a cache, with a static one, behind left padding |",
        "",
        "`no`: it cannot be made or trained at all, for the reason below. A way of decoding is asked for only where",
        "the base model knows it. Where transformers has no class for a task, there is no row.",
        "",
    ]
    remarks = [f"* [{number}] {words}" for words, number in notes.numbers.items()]
    return "\n".join([*head, *tables, "## Reasons", "", *remarks, ""])


def main(arguments: list[str] | None = None) -> int:
    """Prints and writes the table; 1 if a cell of fastpeft fails without a reason that is its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    found = run(options.families.split(","), options.jobs)
    text = document(found)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text)
    print(text)
    faults = [
        f"{each.cell}: {check}: {words}"
        for each in found
        for check, words in each.ours.items()
        if words and not words.startswith("TargetError")
    ]
    print(*faults, sep="\n", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
