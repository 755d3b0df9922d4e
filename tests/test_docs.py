"""The documents: docs/api.md is what the docstrings say, and every file, name and target that a document mentions is
there."""

import dataclasses
import importlib
import importlib.util
import inspect
import re
from pathlib import Path

import pytest

import fastpeft

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "examples/README.md",
    "docs/api.md",
    "docs/distributed.md",
    "docs/files.md",
    "docs/support.md",
]
OP = "lora_linear"  # in place of <op>
FOLDERS = "kernels|fastpeft|tests|benchmarks|examples|docs"
PATH = re.compile(rf"(?<![\w./~$-])(?:{FOLDERS})/[\w./<>*-]*[\w/>*]")
NAME = re.compile(r"(?<![\w./@-])(?:fastpeft|benchmarks|tests)(?:\.[A-Za-z_]\w*)+(?![\w/-])")
FILE_ENDINGS = (".py", ".md", ".json", ".png", ".txt", ".toml", ".safetensors")


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs/generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def page(generate):
    return generate.page()


def test_the_reference_is_up_to_date(page):
    assert page == (ROOT / "docs/api.md").read_text("utf-8"), "run `make docs`"


def test_the_reference_has_every_public_name(page):
    for prefix, module in (("fastpeft", fastpeft), ("fastpeft.ops", fastpeft.ops)):
        for name in set(module.__all__) - {"ops"}:
            assert f"# `{prefix}.{name}`\n" in page, f"{prefix}.{name}"
    for name in ("Trainer", "DPOTrainer", "AdaLoraCallback", "model.save_pretrained", "fastpeft.quantised.register"):
        assert f"### `{name}`\n" in page, name


PUBLIC = [
    pytest.param(prefix, name, id=f"{prefix}.{name}")
    for prefix, module in (("fastpeft", fastpeft), ("fastpeft.ops", fastpeft.ops))
    for name in module.__all__
]


@pytest.mark.parametrize(("prefix", "name"), PUBLIC)
def test_its_signatures_are_what_python_sees(prefix, name, generate):
    """It reads sources."""
    thing = getattr(importlib.import_module(prefix), name)
    if inspect.isfunction(thing):
        shown = generate.signature(generate.find(prefix, name).node, name).split(") ->")[0]
        given = re.findall(r"(?:\(|, |\n    )\*{0,2}(\w+)(?=[:=,)])", shown)
        assert given == list(inspect.signature(thing).parameters)
    elif dataclasses.is_dataclass(thing):
        fields = [each[0] for each in generate.fields(generate.find(prefix, name))]
        assert fields == [each.name for each in dataclasses.fields(thing)]
    else:
        assert not inspect.isroutine(thing)


DOCSTRING = """What a * b is.

Args:
    x, y: (M, K)
        or more.
    z: `a_b * c`.

Raises:
    OpError: no.
    The rest.
"""
MARKDOWN = """What a \\* b is.

**Args**

- `x, y`: (M, K)
  or more.
- `z`: `a_b * c`.

**Raises**

- `OpError`: no.

The rest."""


def test_a_docstring_becomes_markdown(generate):
    assert generate.prose(DOCSTRING, {"x", "y", "z"}) == MARKDOWN
    plain = "One of KINDS.\n\n    code = 1 * 2\n\nAnd: more."
    assert generate.prose(plain, set()) == plain


def test_every_public_docstring_says_what_it_raises_and_where_methods_are_from():
    for name in fastpeft.__all__:
        thing = getattr(fastpeft, name)
        if inspect.isfunction(thing):
            assert re.search(r"Raises|raises", thing.__doc__), name
    for name, config in fastpeft.PEFT_TYPE_TO_CONFIG_MAPPING.items():
        assert "arXiv" in config.__doc__, name
    for name in fastpeft.ops.__all__:
        thing = getattr(fastpeft.ops, name)
        assert "arXiv" in inspect.getmodule(thing).__doc__, name
        if not name.endswith(("_reference", "_mask")):
            assert "Raises:" in thing.__doc__ and "Returns:" in thing.__doc__, name


def mentioned(pattern: re.Pattern, text: str) -> set[str]:
    return {found.replace("<op>", OP).rstrip(".") for found in pattern.findall(text)}


def missing_files(text: str, folder: Path) -> list[str]:
    """Of links, which count from the folder of the document, and of paths, which count from the root."""
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)[^)]*\)", text)
    missing = [link for link in links if not folder.joinpath(link).exists()]
    paths = sorted(path for path in mentioned(PATH, text) if "<" not in path)
    return missing + [path for path in paths if not any(ROOT.glob(path.rstrip("/")))]


def missing_names(text: str) -> list[str]:
    return sorted(name for name in mentioned(NAME, text) if not name.endswith(FILE_ENDINGS) and not is_there(name))


def test_what_is_missing_is_found():
    text = (
        "[a](no.md) [b](README.md) `fastpeft/ops/<op>.py`, `kernels/no_op.py`, fastpeft/no/; tests/*.py and docs/*.rs."
    )
    assert missing_files(text, ROOT) == ["no.md", "docs/*.rs", "fastpeft/no/", "kernels/no_op.py"]
    text = "`fastpeft.patch(model)`, `fastpeft.pach`, fastpeft.integrations.trainer.Trainer; `-m benchmarks.nothing`"
    assert missing_names(text) == ["benchmarks.nothing", "fastpeft.pach"]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_and_names_that_a_document_mentions_are_there(document):
    path = ROOT / document
    assert not missing_files(path.read_text("utf-8"), path.parent)
    assert not missing_names(path.read_text("utf-8"))


def is_there(name: str) -> bool:
    """Whether a dotted name is a module of the project, or something in one."""
    module, *rest = name.split(".")
    found = importlib.import_module(module) if module == "fastpeft" else None
    for position, part in enumerate(rest):
        if hasattr(found, part):
            found = getattr(found, part)
            continue
        path = ".".join([module, *rest[: position + 1]])
        if not importlib.util.find_spec(path):
            return False
        found = importlib.import_module(path) if module == "fastpeft" else found
    return True


@pytest.mark.parametrize("document", DOCUMENTS)
def test_targets_that_a_document_mentions_are_there(document):
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text("utf-8"), re.M)
    code = re.findall(r"`[^`]*`|^(?:    )?\w+='[^']*' make .*$|^make .*$", (ROOT / document).read_text("utf-8"), re.M)
    named = {name for span in code for name in re.findall(r"\bmake (\w+)", span)}
    assert named <= {*targets}


def test_all_documents_are_looked_at():
    found = {
        path.relative_to(ROOT).as_posix()
        for folder in ("", "docs", "examples")
        for path in (ROOT / folder).glob("*.md")
    }
    assert found == set(DOCUMENTS)
