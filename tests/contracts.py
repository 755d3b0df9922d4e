"""What the package relies on in other libraries, and how it is found that it has moved.

Two tables. The one is read from the sources: every name that they import from another library, and every attribute that
they take of one. The other is written by hand in `tests/contract_table.py`: what no import says, such as the arguments
of a method that a class of ours overrides, or what an object holds.
"""

import ast
import functools
import importlib
import importlib.metadata
import inspect
import types
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("fastpeft", "kernels")
LIBRARIES = {  # import's name -> distribution's
    **{name: name for name in ("accelerate", "bitsandbytes", "peft", "regex", "safetensors", "torch", "torchao")},
    **{name: name for name in ("transformers", "triton", "trl")},
}
OWN = "torch.ops.fastpeft."  # operators that the package registers itself


class Surface(NamedTuple):
    """Something of another library's. Words in `takes`, `has` and `closes_over` are separated by spaces.

    name: its dotted path. where: the files of ours that rely on it. takes: arguments that it can be called with, by
    name. has: of a class, what it or an instance of it has; of a function, what its code uses. closes_over: what a
    function that this one makes has in its cells. is_: the value of a constant.
    """

    name: str
    where: str
    takes: str = ""
    has: str = ""
    closes_over: str = ""
    is_: str = ""


def from_sources(root: Path = ROOT) -> list[Surface]:
    """The names of other libraries that the sources import, or take as attributes, with the files that do."""
    found: dict[str, set[str]] = {}
    for file in sorted(path for folder in SOURCES for path in (root / folder).rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for name in names_in(tree):
            found.setdefault(name, set()).add(file.relative_to(root).as_posix())
    return [Surface(name, " ".join(sorted(files))) for name, files in sorted(found.items())]


def names_in(tree: ast.AST) -> set[str]:
    """The dotted names of other libraries in one parsed file."""
    aliases, found = {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for each in node.names:
                aliases[each.asname or each.name.split(".")[0]] = each.name if each.asname else each.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            aliases |= {each.asname or each.name: f"{node.module}.{each.name}" for each in node.names}
    aliases = {alias: name for alias, name in aliases.items() if name.split(".")[0] in LIBRARIES}
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Attribute, ast.Name)) and id(node) not in inner:
            attributes = []
            while isinstance(node, ast.Attribute):
                attributes.append(node.attr)
                node = node.value
            if isinstance(node, ast.Name) and node.id in aliases:
                found.add(".".join([aliases[node.id], *reversed(attributes)]))
    return {name for name in found | set(aliases.values()) if not name.startswith(OWN)}


def resolve(name: str) -> Any:
    """The object of a dotted path: a module, or what hangs below one. Raises LookupError with the part that is not
    there."""
    parts = name.split(".")
    found = importlib.import_module(parts[0])
    for place, part in enumerate(parts[1:], 1):
        path = ".".join(parts[: place + 1])
        if hasattr(found, part):
            found = inspect.getattr_static(found, part) if isinstance(found, type) else getattr(found, part)
            found = getattr(found, "__func__", found) if isinstance(found, (staticmethod, classmethod)) else found
            continue
        try:
            found = importlib.import_module(path)
        except ImportError as error:
            raise LookupError(f"{path} is not there") from error
    return found


def moved(surface: Surface) -> list[str]:
    """What of one surface is not as it is relied on, in words."""
    try:
        found = resolve(surface.name)
    except LookupError as error:
        return [str(error)]
    reasons = []
    if surface.takes:
        known = _arguments(found)
        reasons += [f"{surface.name} takes no {each}" for each in surface.takes.split() if each not in known]
    if surface.has:
        known = _uses(found)
        kind = "has" if isinstance(found, type) else "uses"
        reasons += [f"{surface.name} {kind} no {each}" for each in surface.has.split() if each not in known]
    if surface.closes_over:
        cells = {name for code in _codes(_code(found)) for name in code.co_freevars}
        reasons += [f"{surface.name} closes over no {e}" for e in surface.closes_over.split() if e not in cells]
    if surface.is_ and found != surface.is_:
        reasons.append(f"{surface.name} is {found!r} and not {surface.is_!r}")
    return reasons


def all_moved(surfaces: list[Surface]) -> str:
    """One message that names every surface that has moved, with the libraries' versions; "" if none has."""
    lines = [f"  {why}    ({each.where})" for each in surfaces for why in moved(each)]
    if not lines:
        return ""
    libraries = sorted({LIBRARIES[each.name.split(".")[0]] for each in surfaces if moved(each)})
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in libraries)
    return f"{len(lines)} of what fastpeft relies on moved in {versions}:\n" + "\n".join(lines)


def _arguments(function: Any) -> set[str]:
    function = function.__init__ if isinstance(function, type) else function
    return set(inspect.signature(inspect.unwrap(function)).parameters)


def _uses(found: Any) -> set[str]:
    """The names that a function's code uses; of a class, those of all its methods, its own and its library's bases'
    attributes, and the fields of its annotations."""
    if isinstance(found, property):
        return _uses(found.fget) | (_uses(found.fset) if found.fset else set())
    if not isinstance(found, type):
        return {name for code in _codes(_code(found)) for name in (*code.co_names, *code.co_consts)}
    return _held(found) | set(dir(found))


@functools.cache
def _held(kind: type) -> set[str]:
    names = set()
    for each in kind.__mro__:
        names |= set(vars(each).get("__annotations__", ()))
        for value in vars(each).values():
            value = getattr(value, "__func__", value)
            for function in (value, getattr(value, "fget", None), getattr(value, "fset", None)):
                if isinstance(function, types.FunctionType):
                    names |= {n for code in _codes(_code(function)) for n in code.co_names}
    return names


def _code(function: Any) -> types.CodeType | None:
    return getattr(inspect.unwrap(function), "__code__", None)


def _codes(code: types.CodeType | None):
    if code is None:
        return
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)
