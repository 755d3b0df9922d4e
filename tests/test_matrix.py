"""A part of the support matrix (tests/matrix.py): every method on every family, with the tasks in turn, so that each
method meets each task too. `make matrix` runs all of it."""

import itertools

import pytest

import fastpeft
from tests.matrix import CHECKS, FAMILIES, METHODS, TASKS, Cell, cells, equals_peft, offers, ours, outcome, peft_runs
from tests.matrix_report import Found, document, verdict

# Virtual tokens stand in front of tokens: of sounds and pictures there are none.
WITHOUT_TOKENS = [
    Cell(family, task, method)
    for family, task in (("whisper", "SEQ_2_SEQ_LM"), ("whisper", "SEQ_CLS"), ("vit", "SEQ_CLS"))
    for method in ("p-tuning", "prompt")
]


def chosen() -> list[Cell]:
    """One task for each pair of a family and a method."""
    out = []
    for (row, family), (column, method) in itertools.product(enumerate(FAMILIES), enumerate(METHODS)):
        tasks = [task for task in TASKS if offers(family, task)]
        out.append(Cell(family, tasks[(row + column) % len(tasks)], method))
    return [cell for cell in out if cell not in WITHOUT_TOKENS]


@pytest.mark.parametrize("cell", chosen(), ids=str)
def test_a_cell(cell, tmp_path):
    for check in CHECKS:
        if check == "defaults":
            continue  # which of ours is the call that every other check begins with
        (tmp_path / check).mkdir()
        assert outcome(ours(), cell, check, tmp_path / check) == "", check
    if peft_runs(cell):
        equals_peft(cell)


def test_every_method_meets_every_task():
    met = {(cell.method, cell.task) for cell in chosen()}
    assert met == set(itertools.product(METHODS, TASKS))
    assert len(cells()) > 500 and set(WITHOUT_TOKENS) < set(cells())


@pytest.mark.parametrize("cell", WITHOUT_TOKENS, ids=str)
def test_where_there_are_no_tokens_the_refusal_says_so(cell):
    with pytest.raises(fastpeft.TargetError, match="its input goes through a .*, not through an embedding of tokens"):
        ours().wrap(cell.base(), cell)


def test_the_table_says_what_failed():
    good, bad = dict.fromkeys(CHECKS, ""), dict.fromkeys(CHECKS, "ValueError: no")
    one = {**good, "generates": "static cache: KeyError: 'x'"}
    found = [Found(Cell("llama", "CAUSAL_LM", method), good, good, "") for method in METHODS]
    found[1] = Found(found[1].cell, one, bad, "ValueError: no")
    lines = document(found).splitlines()
    (row,) = [line for line in lines if line.startswith("| llama |")]
    assert row.startswith("| llama | **yes** / yes = | **G** / no [1] | **yes**")
    assert "* [1] ValueError: no" in lines
    from tests.matrix_report import Notes

    assert verdict({**good, "trains": "a", "padding": "b"}, Notes()) == "TP"
