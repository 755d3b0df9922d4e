"""The table of error texts: it has all that the sources can say, each is raised by a test, and each is of help.

That the tests raise what the table says is checked at the end of a whole run, by tests/error_recording.py.
"""

import json
import os
import pickle
import re
import subprocess
import sys
import textwrap

import pytest
import torch

from fastpeft.errors import OpError
from fastpeft.tuners.mixed import WrongRows
from tests import error_recording, error_texts
from tests.counting import count
from tests.error_recording import LONGEST
from tests.error_texts import HOW, NOBODY, ROOT, UNREACHED, Row, Text

ROWS = error_texts.read_table()
MOST_UNREACHED = 12
MOST_CHARACTERS = 400

# What is needed, or what to do: a clause behind a semicolon, a second sentence, or one of these words.
ADVICE = re.compile(
    r"; |\. [A-Z`]|: \{\}\.?$|\b(must|needs?|needed|wanted|expected|at least|at most|the most is|limit|only"
    r"|known (is|are)|come as|is for|use|choose|give|set|leave|load|save|call|pass|make|name|simplify|exclude)\b"
)
# Something that a reader can find: a value, an option, a function, or the part of the call that the text begins with.
SUBJECT = re.compile(r"\{\}|\w_\w|\w=|^\w+: ")
EXCEPTIONS = {
    "{}": "another error's text, in which the op's name alone is changed",
    "{} is {}.": "what it is in place of a safetensors file has the advice: tests/test_files_hostile.py",
    "{}, a {} of {}, {}": "the library's entry says why not, and what to do",
    "modules_to_save={} is not in the model{}": "the last place is what may have been meant",
}


def ids(rows):
    """`file::function-number`, counted in each function."""
    seen: dict[str, int] = {}
    for row in rows:
        seen[row.text.place] = seen.get(row.text.place, -1) + 1
        yield f"{row.text.place}-{seen[row.text.place]}"


def of_no_help(text: Text) -> list[str]:
    """The rules that a text breaks."""
    said = text.template
    sentences = re.search(r"\. [A-Z`]", said) or text.kind in ("AdapterFileError", "_Undecidable")
    return [
        rule
        for rule, kept in {
            "it names no value, option or place": SUBJECT.search(said) or said.startswith("its weight is"),
            "it says neither what is needed nor what to do": ADVICE.search(said) or said in EXCEPTIONS,
            "it ends as a sentence, and is a clause": sentences or not said.endswith("."),
            f"it has more than {MOST_CHARACTERS} characters": len(said) <= MOST_CHARACTERS,
            "a space stands at an end, or two together": said == said.strip() and "  " not in said,
        }.items()
        if not kept
    ]


def test_every_text_of_the_sources_is_in_the_table_and_nothing_else():
    texts = error_texts.all_texts()
    assert len(texts) > 450
    known = [row.text for row in ROWS]
    new = [text for text in texts if text not in known]
    gone = [text for text in known if text not in texts]
    assert not new and not gone, f"texts without a row: {new}\nrows without a text: {gone}\n{HOW}"
    assert sorted(ROWS) == ROWS
    count("error texts", len(ROWS))


@pytest.mark.parametrize("row", ROWS, ids=list(ids(ROWS)))
def test_a_text_has_a_test_and_is_of_help(row):
    assert row.test != NOBODY, f"no test raises it. {HOW}"
    if not row.test.startswith(UNREACHED):
        assert error_texts.is_test(row.test), f"{row.test} is no test. {HOW}"
    assert of_no_help(row.text) == []


def test_few_texts_are_beyond_the_tests():
    unreached = [row for row in ROWS if row.test.startswith(UNREACHED)]
    assert len(unreached) <= MOST_UNREACHED
    assert all(len(row.test) > len(UNREACHED) + 10 for row in unreached)


def test_exceptions_are_of_texts_that_need_one():
    templates = {row.text.template for row in ROWS}
    assert not [said for said in EXCEPTIONS if said not in templates or ADVICE.search(said)]


BAD = {
    "it names no value, option or place": "this cannot be done; use another",
    "it says neither what is needed nor what to do": "{} has {} rows",
    "it ends as a sentence, and is a clause": "{} has {} rows; 3 are needed.",
    f"it has more than {MOST_CHARACTERS} characters": "{} is needed" * 40,
    "a space stands at an end, or two together": "{}  is needed",
}


@pytest.mark.parametrize("rule", BAD)
def test_a_text_of_no_help_is_found(rule):
    assert of_no_help(Text("fastpeft/a.py::f", "OpError", BAD[rule])) == [rule]


SOURCES = {
    "fastpeft/errors.py": "class FastpeftError(ValueError): pass\nclass OpError(FastpeftError): pass",
    "fastpeft/a.py": """
        WORDS = "b is needed"

        class Rows(OpError):
            def __init__(self, layer, what):
                super().__init__(what)

        def refuse(name, value, why):
            raise OpError(f"{name}={value}: {why}")

        class A:
            def f(self, a):
                advice = "use b"
                if a:
                    advice = f"use {a!r}"
                raise OpError(f"{a:.3g} is no b; " + advice)

        def g(a):
            def inner():
                raise Rows(a, WORDS if a else f"{_why(a)}.")
            refuse("a", a, "must be b")
            refuse(f"a[{a}]", a, a.why)

        def _why(a):
            return f"{a} is {{c}}"
    """,
}


def test_texts_are_found_in_all_their_forms(tmp_path):
    for path, source in SOURCES.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(textwrap.dedent(source))
    assert error_texts.error_classes(tmp_path) == {"FastpeftError", "OpError", "Rows"}
    found = [text for site in error_texts.sites("fastpeft/a.py", tmp_path) for text in site.texts]
    assert sorted(found) == [
        ("fastpeft/a.py::A.f", "OpError", "{} is no b; use b"),
        ("fastpeft/a.py::A.f", "OpError", "{} is no b; use {}"),
        ("fastpeft/a.py::g", "ConfigError", "a={}: must be b"),
        ("fastpeft/a.py::g", "ConfigError", "a[{}]={}: {}"),
        ("fastpeft/a.py::g.inner", "Rows", "b is needed"),
        ("fastpeft/a.py::g.inner", "Rows", "{} is {c}."),
    ]


@pytest.mark.parametrize(
    ("template", "said", "found"),
    [
        ("{}={}: use {}", "a=3: use b", True),
        ("use {}", "a=3: use b", True),
        ("{} is {}", "a is", False),
        ("use {}={}", "a=3: use b", False),
        ("{", "{'a': 1}", True),
    ],
)
def test_a_text_is_of_its_template(template, said, found):
    assert error_texts.says(template, said) is found


def test_the_table_reads_as_it_was_written(tmp_path):
    rows = [Row(Text("a.py::f", "OpError", "a\tb \\n {}\n"), "tests/test_a.py::test_a")]
    error_texts.write_table(rows, tmp_path / "table.tsv")
    assert error_texts.read_table(tmp_path / "table.tsv") == rows


HERE = "tests/test_error_texts.py::test_the_table_reads_as_it_was_written"
OTHER = "tests/test_error_texts.py::test_a_test_that_is_named_stays_while_it_raises_its_text"


@pytest.mark.parametrize(
    ("named", "raised", "chosen"),
    [
        (NOBODY, set(), NOBODY),
        (NOBODY, {OTHER, HERE, "tests/test_gone.py::test_gone"}, OTHER),
        (HERE, {OTHER, HERE}, HERE),
        (HERE, {OTHER}, OTHER),
        (HERE, set(), HERE),
        ("tests/test_gone.py::test_gone", set(), NOBODY),
        (f"{UNREACHED}needs a GPU", set(), f"{UNREACHED}needs a GPU"),
        (f"{UNREACHED}needs a GPU", {HERE}, HERE),
    ],
)
def test_a_test_that_is_named_stays_while_it_raises_its_text(named, raised, chosen):
    text = error_texts.all_texts()[0]
    rows = error_texts.updated([Row(text, named)], {text: raised})
    assert rows[0] == Row(text, chosen)
    assert all(row.test == NOBODY for row in rows[1:])


def test_recordings_make_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(error_texts, "TABLE", tmp_path / "table.tsv")
    first, *others = error_texts.all_texts()
    lines = [json.dumps([*text, HERE, "what was said"]) for text in others]
    (tmp_path / "one").write_text("\n".join(lines[:9]))
    (tmp_path / "two").write_text("\n".join(lines[9:]))
    assert error_texts.main([str(tmp_path / "one"), str(tmp_path / "two")]) == 1
    assert capsys.readouterr().out.startswith("\t".join(first))
    assert error_texts.read_table() == [Row(first, NOBODY), *(Row(text, HERE) for text in others)]
    (tmp_path / "one").write_text(json.dumps([*first, OTHER, "what was said"]))
    assert error_texts.main([str(tmp_path / "one")]) == 0
    assert error_texts.read_table()[0] == Row(first, OTHER)


def test_only_what_a_run_could_have_raised_is_missed(monkeypatch):
    texts = [Text("a.py::f", "OpError", f"{number}") for number in range(5)]
    tests = ["t.py::a", "t.py::b", "t.py::c", "u.py::d", f"{UNREACHED}needs a GPU"]
    monkeypatch.setattr(error_texts, "read_table", lambda: list(map(Row, texts, tests)))
    assert [row.test for row in error_recording.lacking({texts[0]}, {"t.py::b", "u.py"})] == ["t.py::c"]


RUN = {
    "conftest.py": """
        from pathlib import Path
        from tests import error_texts
        error_texts.TABLE = Path(__file__).with_name("table.tsv")
    """,
    "test_one.py": """
        import pytest
        from fastpeft import LoraConfig
        from fastpeft.errors import ConfigError

        def test_raises():
            with pytest.raises(ConfigError):
                LoraConfig(r=0).validate()

        @pytest.mark.parametrize("number", range(3))
        def test_raises_nothing(number):
            pass
    """,
}


@pytest.mark.slow
def test_a_whole_run_that_misses_a_text_fails_and_names_it(tmp_path):
    for path, source in RUN.items():
        (tmp_path / path).write_text(textwrap.dedent(source))
    rank = next(row.text for row in ROWS if row.text.template == "r={}: the rank must be an int of at least 1")
    missed = Text("fastpeft/a.py::f", "OpError", "no test raises {}")
    error_texts.write_table([Row(rank, "t.py::a"), Row(missed, "t.py::b")], tmp_path / "table.tsv")
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "FASTPEFT_"))}
    command = [sys.executable, "-m", "pytest", "-q", "-n", "1", "-p", "tests.error_recording", "--rootdir", tmp_path]
    done = subprocess.run(
        [*command, "-c", os.devnull, tmp_path],
        env={**env, "FASTPEFT_WHOLE_RUN": "1", "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "4 passed" in done.stdout
    assert "not raised: fastpeft/a.py::f: OpError: no test raises {} (t.py::b)" in done.stdout
    assert "config_lora.py" not in done.stdout


def test_a_text_with_a_value_that_nobody_can_read_is_found(tmp_path):
    texts = [["a.py::f", "OpError", "{}", "t.py::a", "x" * length] for length in (10, LONGEST, LONGEST + 1)]
    (tmp_path / "recording").write_text("\n".join(map(json.dumps, texts)))
    (found,) = error_recording.overlong(str(tmp_path / "recording"))
    assert found.startswith("a.py::f: xxx") and found.endswith("(t.py::a)")


def test_a_recording_has_the_text_the_test_and_what_was_said(tmp_path, monkeypatch):
    from fastpeft import LoraConfig

    monkeypatch.setenv(error_recording.RECORDING, str(tmp_path / "recording"))
    monkeypatch.setattr(error_recording, "_seen", set())
    monkeypatch.setattr(error_recording.FastpeftError, "__init__", error_recording._recording_init)
    for rank in (0, -1):
        with pytest.raises(ValueError, match="the rank"):
            LoraConfig(r=rank).validate()
    (line,) = (tmp_path / "recording").read_text().splitlines()
    place, kind, template, test, said = json.loads(line)
    assert (place, kind) == ("fastpeft/config_lora.py::LoraConfig.validate", "ConfigError")
    assert (template, said) == (
        "r={}: the rank must be an int of at least 1",
        "r=0: the rank must be an int of at least 1",
    )
    assert test == "tests/test_error_texts.py::test_a_recording_has_the_text_the_test_and_what_was_said"


def test_recording_changes_neither_errors_nor_what_torch_compiles(tmp_path, monkeypatch):
    monkeypatch.setenv(error_recording.RECORDING, str(tmp_path / "recording"))
    monkeypatch.setattr(error_recording.FastpeftError, "__init__", error_recording._recording_init)

    def falls_back(x):
        try:
            raise OpError(f"x has {x.ndim}")
        except OpError:
            return x + 1

    assert torch.compile(falls_back, backend="eager", fullgraph=True)(torch.zeros(1)).tolist() == [1]
    torch._dynamo.reset()
    error = WrongRows("a layer", "an input")
    assert (str(error), error.args, error.layer) == ("an input", ("an input",), "a layer")
    copied = pickle.loads(pickle.dumps(OpError("x", 3)))
    assert type(copied) is OpError and copied.args == ("x", 3)
    assert not (tmp_path / "recording").exists(), "none of them is made by fastpeft"
