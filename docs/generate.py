"""Writes docs/api.md from the docstrings.

    python docs/generate.py                    # or `make docs`

The sources are read, not imported, so the result depends on them alone: on no library, and on no version of Python. A
test compares it with the file.
"""

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/api.md"
HEAD = """# API reference

Written by `make docs` from the docstrings; not by hand. Shapes are written as (..., K). Every error that says what was
refused is a `fastpeft.FastpeftError`, which is a `ValueError`.
"""

# What scripts import from elsewhere: heading -> (what it is called there, its module, its name in it).
ELSEWHERE = {
    "fastpeft.integrations.trainer": [
        ("Trainer", "fastpeft.integrations.trainer_checkpoints", "AdapterCheckpoints"),
        ("Seq2SeqTrainer", "fastpeft.integrations.trainer_checkpoints", "AdapterCheckpoints"),
        ("SFTTrainer", "fastpeft.integrations.trainer_trl", "SFT"),
        ("DPOTrainer", "fastpeft.integrations.trainer_trl", "DPO"),
        ("GRPOTrainer", "fastpeft.integrations.trainer_trl", "GRPO"),
        ("AdaLoraCallback", "fastpeft.integrations.trainer", "AdaLoraCallback"),
    ],
    "fastpeft.integrations.peft": [
        (name, "fastpeft.integrations.peft", name)
        for name in ("patch_peft", "unpatch_peft", "report_peft", "wrapped_by_peft")
    ],
    "fastpeft.reporting": [(name, "fastpeft.reporting", name) for name in ("Report", "LayerReport")],
    "fastpeft.status": [(name, "fastpeft.status", name) for name in ("TunerLayerStatus", "TunerModelStatus")],
    "fastpeft.quantised": [
        (name, "fastpeft.quantised", name) for name in ("register", "Entry", "entry_of", "is_quantised")
    ],
    "fastpeft.integrations.quantised": [],
}
# Classes of other libraries that stand behind ours, whose constructor's arguments are theirs.
FOREIGN = ("Trainer", "Seq2SeqTrainer", "SFTTrainer", "DPOTrainer", "GRPOTrainer", "AdaLoraCallback")
METHODS_OF_MODELS = ("fastpeft.model", "PatchedModel")

ITEM = re.compile(r"(\**\w+(?: to \w+)?(?:, \**\w+)*(?: \([^)]*\))?): +(?=\S)")
SECTION = re.compile(r"(Args|Returns|Raises):$")


class Found(NamedTuple):
    """A definition, and the module that it stands in."""

    node: ast.AST
    module: str
    comment: str  # of a constant, above it


def path_of(module: str) -> Path:
    inside = ROOT / module.replace(".", "/")
    return inside / "__init__.py" if inside.is_dir() else inside.with_suffix(".py")


def tree_of(module: str) -> ast.Module:
    return ast.parse(path_of(module).read_text("utf-8"))


def imports(tree: ast.Module) -> Iterator[tuple[str, str, str]]:
    """(module, its name there, its name here) of what is taken from the project."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "fastpeft":
            for each in node.names:
                yield node.module, each.name, each.asname or each.name


def find(module: str, name: str) -> Found:
    """Where a name is defined, through imports. Raises KeyError if it is nowhere."""
    tree, lines = tree_of(module), path_of(module).read_text("utf-8").splitlines()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return Found(node, module, "")
        targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            above = node.lineno - 1
            while lines[above - 1].startswith("#"):
                above -= 1
            return Found(node, module, " ".join(line.lstrip("# ") for line in lines[above : node.lineno - 1]))
    for origin, there, here in imports(tree):
        if here == name:
            return find(origin, there)
    raise KeyError(f"{module}.{name}")


def signature(node: ast.FunctionDef, shown: str, bound: bool = False) -> str:
    """As it would be written, an argument a line if it is long."""
    arguments = node.args
    first = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(first) - len(arguments.defaults)) + arguments.defaults
    parts = [argument(*pair) for pair in zip(first, defaults, strict=True)][bound:]
    if arguments.vararg:
        parts.append("*" + argument(arguments.vararg, None))
    elif arguments.kwonlyargs:
        parts.append("*")
    parts += [argument(*pair) for pair in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    if arguments.kwarg:
        parts.append("**" + argument(arguments.kwarg, None))
    return laid_out(shown, parts, f" -> {ast.unparse(node.returns)}" if node.returns else "")


def argument(node: ast.arg, default: ast.expr | None) -> str:
    text = node.arg + (f": {ast.unparse(node.annotation)}" if node.annotation else "")
    if default is None:
        return text
    return f"{text} = {ast.unparse(default)}" if node.annotation else f"{text}={ast.unparse(default)}"


def laid_out(name: str, parts: list[str], after: str) -> str:
    line = f"{name}({', '.join(parts)}){after}"
    if len(line) <= 100:
        return line
    return "\n".join([f"{name}(", *(f"    {part}," for part in parts), f"){after}"])


def decorators(node: ast.AST) -> set[str]:
    return {ast.unparse(each).partition("(")[0] for each in getattr(node, "decorator_list", [])}


def fields(found: Found) -> list[tuple[str, str, ast.expr | None]]:
    """(name, annotation, default) of a dataclass, those of its bases first, as Python orders them."""
    known = {}
    for base in found.node.bases:
        if isinstance(base, ast.Name):
            try:
                known |= {each[0]: each for each in fields(find(found.module, base.id))}
            except KeyError:  # of another library
                continue
    for node in found.node.body:
        if isinstance(node, ast.AnnAssign) and "ClassVar" not in ast.unparse(node.annotation):
            known[node.target.id] = (node.target.id, ast.unparse(node.annotation), node.value)
    return list(known.values())


def class_signature(found: Found, shown: str) -> str:
    """What it is made with, without fields that are there for peft's sake."""
    if "dataclass" not in decorators(found.node):
        return f"class {shown}"
    parts = []
    for name, annotation, default in fields(found):
        call = called(default)
        if call == "unhonoured":
            continue
        if call == "field":
            made = {each.arg: each.value for each in default.keywords}
            value = f"{ast.unparse(made['default_factory'])}()" if "default_factory" in made else "..."
            if "init" not in made:
                parts.append(f"{name}: {annotation} = {value}")
        else:
            default = default.args[0] if call == "own" else default
            parts.append(f"{name}: {annotation}" + ("" if default is None else f" = {ast.unparse(default)}"))
    return laid_out(shown, parts, "")


def called(default: ast.expr | None) -> str:
    return ast.unparse(default.func) if isinstance(default, ast.Call) else ""


def refused(found: Found) -> list[str]:
    """A sentence about the fields that are there for peft's sake."""
    names = [f"`{name}`" for name, _, default in fields(found) if called(default) == "unhonoured"]
    return [f"At peft's defaults only: {', '.join(names)}.", ""] if names else []


def prose(text: str, names: set[str]) -> str:
    """A docstring as Markdown: sections, and a bullet for each of `names` that a line begins with."""
    out, section, bullet = [], "", False
    for raw in text.splitlines():
        head = SECTION.match(raw)
        if head:
            section, bullet = head[1], False
            out += ["", f"**{section}**", ""]
            continue
        if section and raw and not raw.startswith("    "):
            section, bullet = "", False
            out.append("")
        line = raw[4:] if section else raw
        item = None if line.startswith(" ") else ITEM.match(line)
        if item and is_item(item[1], section, names):
            begins = not bullet and out and out[-1]
            out += [*([""] if begins else []), f"- `{item[1]}`: {escaped(line[item.end() :])}"]
            bullet = True
        elif bullet and line and not line.startswith(" ") and section != "Args" and out[-1].endswith("."):
            out += ["", escaped(line)]
            bullet = False
        elif bullet and line:
            out.append("  " + escaped(line.strip()))
        else:
            bullet = bullet and bool(line)
            out.append(line if line.startswith("    ") else escaped(line.strip()))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(out)).strip("\n")


def is_item(shown: str, section: str, names: set[str]) -> bool:
    words = re.findall(r"\w+", re.sub(r"\(.*\)", "", shown))
    return section == "Args" or words[0].endswith("Error") or all(word in names for word in words)


def escaped(text: str) -> str:
    """What Markdown would take for marks, outside of code."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"([*<])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)


def entry(shown: str, found: Found, level: int = 3) -> list[str]:
    """A name with its signature, its docstring, and of a class its public methods."""
    node, source = found.node, path_of(found.module).relative_to(ROOT).as_posix()
    lines = ["#" * level + f" `{shown}`", ""]
    where = f"[{source}](../{source})"
    if isinstance(node, ast.FunctionDef):
        names = {each.arg for each in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)}
        kind = "with " if decorators(node) & {"contextlib.contextmanager"} else ""
        return [*lines, *fenced(kind + signature(node, shown)), prose(documented(node), names), "", where, ""]
    if isinstance(node, ast.ClassDef):
        names = {name for name, *_ in fields(found)}
        if "Enum" in " ".join(map(ast.unparse, node.bases)):
            members = [each.targets[0].id for each in node.body if isinstance(each, ast.Assign)]
            about = [*fenced("\n".join(f"{shown}.{each}" for each in members))]
        elif any(ast.unparse(each).endswith("Error") for each in node.bases):
            about = fenced(f"class {shown}({', '.join(map(ast.unparse, node.bases))})")
        else:
            about = fenced(class_signature(found, shown))
        text = prose(documented(node), names)
        return [*lines, *about, text, "", *refused(found), *methods(node, level + 1, shown), where, ""]
    return [*lines, escaped(found.comment), "", where, ""]


def prose_of(found: Found) -> list[str]:
    return [prose(documented(found.node), set())]


def methods(node: ast.ClassDef, level: int, shown: str, of_class: bool | None = None) -> Iterator[str]:
    """Those that have a docstring and no leading underscore; `of_class` says which, None all."""
    for each in node.body:
        if isinstance(each, ast.FunctionDef) and not each.name.startswith("_") and ast.get_docstring(each):
            kinds = decorators(each)
            if of_class not in (None, "classmethod" in kinds):
                continue
            names = {argument.arg for argument in (*each.args.args, *each.args.kwonlyargs)}
            yield from ("#" * level + f" `{shown}.{each.name}`", "")
            if "property" not in kinds:
                yield from fenced(signature(each, each.name, bound="staticmethod" not in kinds))
            yield from (prose(documented(each), names), "")


def documented(node: ast.AST) -> str:
    text = ast.get_docstring(node)
    if not text:
        raise SystemExit(f"{node.name} (line {node.lineno}) has no docstring")
    return text


def fenced(text: str) -> list[str]:
    """Without a language, as a signature is no Python that a formatter may lay out anew."""
    return ["```", text.replace("'", '"'), "```", ""]


def about(module: str) -> list[str]:
    return [prose(inspect.cleandoc(ast.get_docstring(tree_of(module)) or ""), set()), ""]


def first_paragraph(module: str) -> list[str]:
    return [about(module)[0].split("\n\n")[0], ""]


def page() -> str:
    """docs/api.md."""
    lines, top = [HEAD], tree_of("fastpeft")
    groups: dict[str, list[str]] = {}
    for module, name, _ in imports(top):
        if name != "ops":
            groups.setdefault(module, []).append(name)
    lines += ["## fastpeft", ""]
    for module, names in groups.items():
        lines += [f"### From {module}", "", *first_paragraph(module)]
        for name in names:
            lines += entry(f"fastpeft.{name}", find(module, name), 4)
    module, name = METHODS_OF_MODELS
    lines += ["## Methods of patched models", "", *about(module)]
    lines += methods(find(module, name).node, 3, "model", of_class=False)
    lines += ["## What a task's class can say", "", *prose_of(find(module, name)), ""]
    lines += methods(find(module, name).node, 3, name, of_class=True)
    lines += ["## fastpeft.ops", "", *about("fastpeft.ops")]
    described = set()
    for module, name, here in imports(tree_of("fastpeft.ops")):
        if not here.startswith("_"):
            lines += [] if module in described else [f"### From {module}", "", *about(module)]
            described.add(module)
            lines += entry(f"fastpeft.ops.{here}", find(module, name), 4)
    for heading, entries in ELSEWHERE.items():
        lines += [f"## {heading}", "", *about(heading)]
        for shown, module, name in entries:
            lines += entry(f"{heading}.{shown}" if shown not in FOREIGN else shown, find(module, name))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)}: {len(page().splitlines())} lines")
