"""Every text with which fastpeft refuses something, read from the sources, and the table of which test raises which.

A text has a row for each place in the sources that makes it: `file::function`, the class of the error, the template
with {} where a value stands, and a test that raises it. The table is tests/error_texts.tsv; HOW says how it is written.
"""

import ast
import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "tests/error_texts.tsv"
FOLDERS = ("fastpeft", "kernels")
# Functions that raise an error with words that they are given, which their callers have. What they put in front: {0} is
# their first argument.
HELPERS = {"refuse": ("ConfigError", "{0}={{}}: "), "_refuse": ("PatchError", "add_weighted_adapter: ")}
HOW = """Write a test that raises the new text, run it with FASTPEFT_ERROR_TEXTS=FILE in the environment (FILE takes
what is raised, a line each, of as many runs as you like), and then `python -m tests.error_texts FILE`: it brings
tests/error_texts.tsv up to the sources."""
UNREACHED = "unreached: "  # in place of a test, with the reason
NOBODY = ""  # in place of a test where there is none yet
EMPTY = ast.Module([], [])


class Text(NamedTuple):
    place: str  # file::function
    kind: str  # class of the error
    template: str


class Site(NamedTuple):
    """A call that makes an error: the lines it stands on, and what it can say."""

    first: int
    last: int
    texts: tuple[Text, ...]


class Row(NamedTuple):
    text: Text
    test: str  # file::function, or UNREACHED with a reason


def sources(root: Path = ROOT) -> list[str]:
    """The paths, relative to the root, of all files that are shipped and could refuse something."""
    found = (path for folder in FOLDERS for path in (root / folder).rglob("*.py"))
    return sorted(path.relative_to(root).as_posix() for path in found)


@cache
def error_classes(root: Path = ROOT) -> frozenset[str]:
    """The names of FastpeftError and all that is derived from it."""
    bases = {}
    for path in sources(root):
        if not re.search(r"\bclass\s+\w+\s*\(", _source(root / path)):
            continue
        for node in _statements(_parsed(root / path)):
            if isinstance(node, ast.ClassDef):
                bases[node.name] = {ast.unparse(base) for base in node.bases}
    known = {"FastpeftError"}
    while more := {name for name, of in bases.items() if of & known} - known:
        known |= more
    return frozenset(known)


@cache
def _source(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(_source(path))


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """All statements inside, which is where classes are: expressions, most of a tree, are left out."""
    for field in ("body", "orelse", "finalbody", "handlers", "cases"):
        for child in getattr(node, field, ()):
            yield child
            yield from _statements(child)


@cache
def sites(path: str, root: Path = ROOT) -> tuple[Site, ...]:
    """Where a file makes errors, the narrowest first."""
    makers = {**{name: (name, "") for name in error_classes(root)}, **HELPERS}
    if not any(name in _source(root / path) for name in makers):
        return ()
    tree = _parsed(root / path)
    found = []
    for names, function, call in _calls(tree, [], None):
        if maker := makers.get(getattr(call.func, "id", getattr(call.func, "attr", None))):
            kind, front = maker
            first, words = (templates(each, function, tree) for each in (call.args[0], call.args[-1]))
            said = [front.format(name) + text for name, text in itertools.product(first if front else [""], words)]
            texts = tuple(Text(f"{path}::{'.'.join(names)}", kind, template) for template in said)
            found.append(Site(call.lineno, call.end_lineno, texts))
    return tuple(sorted(found, key=lambda site: site.last - site.first))


def _calls(node: ast.AST, names: list[str], function) -> Iterator[tuple[list[str], ast.AST, ast.Call]]:
    """Each call with arguments, the names of the classes and functions around it, and the innermost function; those
    inside the helpers have no words of their own."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        if node.name in HELPERS:
            return
        names = [*names, node.name]
        function = function if isinstance(node, ast.ClassDef) else node
    if isinstance(node, ast.Call) and node.args:
        yield names, function, node
    for child in ast.iter_child_nodes(node):
        yield from _calls(child, names, function)


def templates(node: ast.AST, function, tree: ast.Module) -> list[str]:
    """What an expression can say, {} for each value: strings, sums, choices, names bound to them, and calls of
    functions of the same file that say why."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.JoinedStr):
        parts = [_part(each, function, tree) for each in node.values]
        return ["".join(words) for words in itertools.product(*parts)]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        both = templates(node.left, function, tree), templates(node.right, function, tree)
        return ["".join(words) for words in itertools.product(*both)]
    if isinstance(node, ast.IfExp):
        return templates(node.body, function, tree) + templates(node.orelse, function, tree)
    if isinstance(node, ast.Name):
        return _bound(node.id, function, tree) or ["{}"]
    if isinstance(node, ast.Call):
        return _returned(node, tree) or ["{}"]
    return ["{}"]


def _part(node: ast.AST, function, tree: ast.Module) -> list[str]:
    if isinstance(node, ast.Constant):
        return [node.value]
    return (_returned(node.value, tree) if isinstance(node.value, ast.Call) else []) or ["{}"]


def _bound(name: str, function, tree: ast.Module) -> list[str]:
    """The strings that a name is bound to in the function, or else in the file; none if to something else too."""
    for scope in (function, tree):
        values = [value for node in _within(scope) for value in _assigned(node, name)]
        if values:
            inner = None if scope is tree else function
            said = [templates(each, None if _mentions(each, name) else inner, EMPTY) for each in values]
            return [] if ["{}"] in said else [text for these in said for text in these]
    return []


def _within(scope) -> Iterable[ast.AST]:
    if isinstance(scope, ast.Module):
        return scope.body
    return ast.walk(scope) if scope else ()


def _assigned(node: ast.AST, name: str) -> list[ast.AST]:
    if isinstance(node, ast.Assign) and any(isinstance(to, ast.Name) and to.id == name for to in node.targets):
        return [node.value]
    if isinstance(node, ast.AugAssign) and ast.unparse(node.target) == name:
        return [ast.BinOp(node.target, node.op, node.value)]
    return []


def _mentions(node: ast.AST, name: str) -> bool:
    return any(isinstance(each, ast.Name) and each.id == name for each in ast.walk(node))


def _returned(call: ast.Call, tree: ast.Module) -> list[str]:
    """The texts that a function of this file, which says why, returns."""
    name = ast.unparse(call.func).split(".")[-1]
    for node in ast.walk(tree) if re.match(r"_?(why|differs)", name) else ():
        if isinstance(node, ast.FunctionDef) and node.name == name:
            values = [each.value for each in ast.walk(node) if isinstance(each, ast.Return) and each.value]
            return [said for value in values for said in templates(value, node, tree)]
    return []


def all_texts() -> list[Text]:
    return sorted({text for path in sources() for site in sites(path) for text in site.texts})


def says(template: str, said: str) -> bool:
    """Whether a text is of this template, or has one of it inside: helpers put words around those they are given."""
    place = 0
    for words in template.split("{}"):
        found = said.find(words, place)
        if found < 0:
            return False
        place = found + len(words)
    return True


def read_table(path: Path | None = None) -> list[Row]:
    path = path or TABLE
    lines = path.read_text(encoding="utf-8").splitlines()[1:] if path.exists() else []
    rows = [line.split("\t") for line in lines]
    return [Row(Text(place, kind, _unescaped(template)), test) for place, kind, template, test in rows]


def write_table(rows: Iterable[Row], path: Path) -> None:
    lines = ["\t".join((row.text.place, row.text.kind, _escaped(row.text.template), row.test)) for row in sorted(rows)]
    path.write_text("\n".join(["place\tclass\ttext\ttest", *lines]) + "\n", encoding="utf-8")


def _escaped(template: str) -> str:
    return template.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t")


def _unescaped(template: str) -> str:
    return re.sub(r"\\(.)", lambda found: {"n": "\n", "t": "\t"}.get(found[1], found[1]), template)


@cache
def tests_of(path: str) -> frozenset[str]:
    """The names of a file's tests."""
    body = _parsed(ROOT / path).body if (ROOT / path).is_file() else []
    return frozenset(node.name for node in body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"))


def is_test(name: str) -> bool:
    """Whether `file::function` is a test."""
    path, _, function = name.partition("::")
    return function in tests_of(path)


def recorded(paths: Iterable[str]) -> dict[Text, set[str]]:
    """From files of recordings: the tests that raised each text."""
    found: dict[Text, set[str]] = {}
    for path in paths:
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            place, kind, template, test = json.loads(line)[:4]
            found.setdefault(Text(place, kind, template), set()).add(test)
    return found


def updated(rows: Iterable[Row], raised: dict[Text, set[str]]) -> list[Row]:
    """A row for every text in the sources. A test that is named stays, unless others were seen to raise the text and
    it was not."""
    named = {row.text: row.test for row in rows}
    return [Row(text, _chosen(named.get(text, NOBODY), raised.get(text, set()))) for text in all_texts()]


def _chosen(named: str, raised: set[str]) -> str:
    known = {test for test in raised if is_test(test)}
    if named in known or not known:
        return named if is_test(named) or named.startswith(UNREACHED) else NOBODY
    return min(known)


def main(recordings: list[str]) -> int:
    rows = updated(read_table(), recorded(recordings))
    write_table(rows, TABLE)
    lacking = [row.text for row in rows if row.test == NOBODY]
    for text in lacking:
        print(*text, sep="\t")
    print(f"{len(rows)} texts, {len(lacking)} that no test was seen to raise")
    return 1 if lacking else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
