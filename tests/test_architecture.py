"""The import law and the sizes, read from the sources without running them; for each rule a violation that is caught.

Imports inside functions count for the question who may know whom; only those at the top of a file (or of a class) count
for the question what `import fastpeft` loads.
"""

import ast
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("kernels", "fastpeft", "benchmarks", "tests")
SHIPPED = ("kernels/", "fastpeft/", "benchmarks/")

# Who may import what of the project: prefix of the file -> prefixes of the names. Files not listed are free.
MAY_KNOW = {
    "kernels/": ("fastpeft.kernels",),
    "fastpeft/errors.py": (),
    "fastpeft/fallback.py": ("fastpeft.dispatch", "fastpeft.errors", "fastpeft.scoped"),
    "fastpeft/ops/": (
        "fastpeft.kernels",
        "fastpeft.ops",
        "fastpeft.dispatch",
        "fastpeft.errors",
        "fastpeft.fallback",  # who computes a call whose kernels fail
    ),
    "fastpeft/tuners/": (
        "fastpeft.attention",  # where a prefix goes
        "fastpeft.calls",  # what a call hands to the embeddings
        "fastpeft.ops",
        "fastpeft.tuners",
        "fastpeft.configs",
        "fastpeft.dispatch",
        "fastpeft.distributed",  # parameters of which a process holds a part
        "fastpeft.errors",
        "fastpeft.names",  # how modules' paths are read and shown
        "fastpeft.prefix_geometry",  # the sizes of virtual tokens
        "fastpeft.selection",  # which adapters a call uses
        "fastpeft.prefix_geometry",  # which sizes a configuration takes from the model
        "fastpeft.scoped",  # values that hold inside a block
        "fastpeft.quantised",  # what is known of other libraries' quantised layers
        "fastpeft.targets",  # which modules a configuration asks for
    ),
}
KERNEL_LIBRARIES = {"torch", "triton"}
PEFT_ALLOWED = ("fastpeft/integrations/", "fastpeft/demo.py", "fastpeft/check.py", "benchmarks/", "tests/")
BENCHMARKS_ALLOWED = ("fastpeft/cli.py", "benchmarks/", "tests/")
CLI_ALLOWED = ("fastpeft/__main__.py", "tests/")
ONLY_IN_FUNCTIONS = (
    *("triton", "transformers", "peft", "safetensors", "accelerate", "bitsandbytes", "torchao"),
    "fastpeft.integrations",
)
IMPORTING_CALLS = ("importlib.import_module", "import_module", "__import__")

FILE_LINES = 450
FUNCTION_LINES = 70
KERNEL_FUNCTION_LINES = 130


class Import(NamedTuple):
    name: str  # absolute; for `from a import b` it is a.b
    line: int
    at_top: bool  # runs when the file is imported
    relative: bool


def is_under(name, prefixes):
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def for_type_checkers(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def absolute(node, package):
    """The module that a `from ... import` names, in a file of the package given as a list of names."""
    if node.level == 0:
        return node.module
    base = package[: len(package) - node.level + 1]
    return ".".join([*base, node.module] if node.module else base)


def names_imported(node, package):
    """The absolute names one statement or call imports; also importlib.import_module("...") and __import__("...")."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{absolute(node, package)}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and node.args and ast.unparse(node.func) in IMPORTING_CALLS:
        return [node.args[0].value] if isinstance(node.args[0], ast.Constant) else []
    return []


def imports(tree, package):
    """Every import of a parsed file."""

    def visit(node, at_top):
        if for_type_checkers(node):
            return
        relative = isinstance(node, ast.ImportFrom) and node.level > 0
        for name in names_imported(node, package):
            yield Import(name, node.lineno, at_top, relative)
        in_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            yield from visit(child, at_top and not in_function)

    return list(visit(tree, True))


def broken_by_import(path, found):
    """The rules that one import breaks in the file at `path` (relative, with slashes)."""
    ours = is_under(found.name, ["fastpeft"])
    outside = found.name.split(".")[0]
    for prefix, names in MAY_KNOW.items():
        if path.startswith(prefix) and ours and not is_under(found.name, names):
            yield f"{prefix} may not know {found.name}"
    if path.startswith("kernels/"):
        if found.relative:
            yield "kernels import absolutely: the folder is a package under another name"
        if not ours and outside not in KERNEL_LIBRARIES | sys.stdlib_module_names:
            yield f"kernels need torch and triton only, not {found.name}"
    if path.startswith(SHIPPED) and outside in ("tests", "benchmarks", "kernels"):
        yield f"`{outside}` is no top-level package once fastpeft is installed"
    if outside == "peft" and not path.startswith(PEFT_ALLOWED):
        yield "peft is known only to integrations, demo, check, benchmarks and tests"
    if is_under(found.name, ["fastpeft.benchmarks"]) and not path.startswith(BENCHMARKS_ALLOWED):
        yield "only the command line knows the benchmarks"
    if is_under(found.name, ["fastpeft.cli"]) and not path.startswith(CLI_ALLOWED):
        yield "nothing imports the command line"
    own_integration = ours and path.startswith("fastpeft/integrations/")
    at_top = found.at_top and path.startswith("fastpeft/") and not own_integration
    if at_top and is_under(found.name, ONLY_IN_FUNCTIONS):
        yield f"{found.name} is imported inside functions, so that `import fastpeft` stays light"


def broken_by_size(path, source, tree):
    lines = source.count("\n")
    if lines > FILE_LINES:
        yield 1, f"{lines} lines, at most {FILE_LINES}"
    limit = KERNEL_FUNCTION_LINES if path.startswith("kernels/") else FUNCTION_LINES
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            size = node.end_lineno - node.lineno + 1
            if size > limit:
                yield node.lineno, f"{node.name} has {size} lines, at most {limit}"


def package_of(path):
    """The package a file belongs to, as a list of names: that of fastpeft for the two folders mapped into it."""
    folders = list(Path(path).parts[:-1])
    return ["fastpeft", *folders] if folders[0] in ("kernels", "benchmarks") else folders


def violations(root):
    """`path:line: rule` for everything in the tree at `root` that breaks a rule."""
    found = ["kernels/__init__.py: hides Hugging Face's package `kernels`"] * (root / "kernels/__init__.py").exists()
    for file in sorted(path for folder in FOLDERS for path in (root / folder).rglob("*.py")):
        path = file.relative_to(root).as_posix()
        source = file.read_text(encoding="utf-8")
        tree = ast.parse(source, path)
        for each in imports(tree, package_of(path)):
            found += [f"{path}:{each.line}: {rule}" for rule in broken_by_import(path, each)]
        found += [f"{path}:{line}: {rule}" for line, rule in broken_by_size(path, source, tree)]
    return found


def plant(root, path, source):
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(textwrap.dedent(source), encoding="utf-8")
    return root


def test_the_sources_keep_the_law():
    assert (ROOT / "kernels/lora_linear.py").exists() and (ROOT / "fastpeft/errors.py").exists()
    assert violations(ROOT) == []


BROKEN = [
    ("kernels/a.py", "import numpy", "torch and triton only"),
    ("kernels/a.py", "def f():\n    import transformers", "torch and triton only"),
    ("kernels/a.py", "from fastpeft.ops import lora_linear", "kernels/ may not know fastpeft.ops.lora_linear"),
    ("kernels/a.py", "from fastpeft import errors", "kernels/ may not know fastpeft.errors"),
    ("kernels/a.py", "import fastpeft", "kernels/ may not know fastpeft"),
    ("kernels/a.py", "from ._common import dot", "import absolutely"),
    ("kernels/__init__.py", "", "hides Hugging Face's package"),
    ("fastpeft/errors.py", "from fastpeft import configs", "fastpeft/errors.py may not know fastpeft.configs"),
    ("fastpeft/ops/a.py", "from fastpeft.tuners.lora import x", "fastpeft/ops/ may not know fastpeft.tuners.lora.x"),
    ("fastpeft/ops/a.py", "def f():\n    from ..patching import patch", "may not know fastpeft.patching.patch"),
    ("fastpeft/tuners/a.py", "from fastpeft.patching import x", "fastpeft/tuners/ may not know fastpeft.patching.x"),
    ("fastpeft/tuners/a.py", "def f():\n    import fastpeft.kernels.a", "may not know fastpeft.kernels.a"),
    ("fastpeft/a.py", "def f():\n    from tests import oracle", "`tests` is no top-level package"),
    ("benchmarks/a.py", "import tests.oracle", "`tests` is no top-level package"),
    ("benchmarks/a.py", "from benchmarks.harness import x", "`benchmarks` is no top-level package"),
    ("fastpeft/ops/a.py", "def f():\n    from kernels import a", "`kernels` is no top-level package"),
    ("fastpeft/patching.py", "def f():\n    import peft", "peft is known only to"),
    ("fastpeft/a.py", 'def f():\n    importlib.import_module("peft.tuners")', "peft is known only to"),
    ("fastpeft/a.py", "def f():\n    from fastpeft.benchmarks import x", "only the command line knows"),
    ("fastpeft/a.py", "def f():\n    from fastpeft.cli import main", "nothing imports the command line"),
    ("fastpeft/a.py", "import triton.language as tl", "triton.language is imported inside functions"),
    ("fastpeft/a.py", "try:\n    import transformers\nexcept ImportError:\n    pass", "inside functions"),
    ("fastpeft/a.py", "class A:\n    from transformers import Cache", "transformers.Cache is imported inside"),
    ("fastpeft/integrations/a.py", "import peft", "peft is imported inside functions"),
    ("fastpeft/a.py", "from bitsandbytes import nn", "bitsandbytes.nn is imported inside functions"),
    ("fastpeft/a.py", "from safetensors.torch import save_file", "safetensors.torch.save_file is imported inside"),
    ("fastpeft/a.py", "from fastpeft.integrations import trainer", "fastpeft.integrations.trainer is imported in"),
    ("tests/a.py", "x = 1\n" * 451, "451 lines, at most 450"),
    ("fastpeft/a.py", "def f():\n" + "    x = 1\n" * 70, "f has 71 lines, at most 70"),
    ("kernels/a.py", "def f():\n" + "    x = 1\n" * 130, "f has 131 lines, at most 130"),
]


@pytest.mark.parametrize(("path", "source", "rule"), BROKEN)
def test_a_broken_rule_is_found(path, source, rule, tmp_path):
    (found,) = violations(plant(tmp_path, path, source))
    assert found.startswith(path) and rule in found


KEPT = [
    ("kernels/a.py", "import math\nimport triton.language as tl\nfrom fastpeft.kernels._common import dot"),
    ("kernels/a.py", "def f():\n" + "    x = 1\n" * 129),
    ("fastpeft/ops/a.py", "from fastpeft.errors import X\ndef f():\n    from fastpeft.kernels import a"),
    ("fastpeft/ops/a.py", "from .b import g"),
    ("fastpeft/tuners/a.py", "from fastpeft import ops\nfrom fastpeft.configs import LoraConfig"),
    ("fastpeft/a.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from transformers import Cache"),
    ("fastpeft/a.py", "import torch\ndef f():\n    import transformers, triton, safetensors.torch"),
    ("fastpeft/integrations/a.py", "from fastpeft.integrations import b\ndef f():\n    import peft"),
    ("fastpeft/cli.py", "def f():\n    from fastpeft.benchmarks import harness"),
    ("fastpeft/__main__.py", "from fastpeft.cli import main"),
    ("benchmarks/a.py", "import peft\nfrom fastpeft.benchmarks.harness import x"),
    ("tests/a.py", "import peft, triton, transformers\nfrom tests import traffic\n" + "x = 1\n" * 448),
]


@pytest.mark.parametrize(("path", "source"), KEPT)
def test_what_the_law_allows_is_no_violation(path, source, tmp_path):
    assert violations(plant(tmp_path, path, source)) == []


# A package's attribute becomes the submodule of its name whenever that is imported for the first time, which a second
# import in the user's script must not be.
SECOND_IMPORT = """
import importlib, importlib.util, types
for name in PACKAGES:
    package = importlib.import_module(name)
    public = {n for n, value in vars(package).items() if not isinstance(value, types.ModuleType)}
    for n in sorted(n for n in public | {*getattr(package, "__all__", ())} if not n.startswith("_")):
        if f"{name}.{n}" not in PACKAGES and importlib.util.find_spec(f"{name}.{n}"):
            importlib.import_module(f"{name}.{n}")
            print(f"{name}.{n}", "callable" if callable(getattr(package, n)) else "a module")
"""


def after_second_import(packages, cwd):
    """What each public name that is also a submodule's name stands for, once that submodule was imported again."""
    program = f"PACKAGES = {packages}\n{SECOND_IMPORT}"
    done = subprocess.run([sys.executable, "-c", program], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return dict(line.split(" ", 1) for line in done.stdout.splitlines())


def test_a_function_stays_a_function_after_a_second_import():
    seen = after_second_import(["fastpeft", "fastpeft.ops"], cwd=ROOT)
    assert "fastpeft.ops.lora_linear" in seen
    assert set(seen.values()) == {"callable"}, seen


def test_the_second_import_of_a_name_bound_late_is_found(tmp_path):
    late = """
        __all__ = ["op"]

        def __getattr__(name):
            from late import op
            return op.op
    """
    plant(tmp_path, "late/__init__.py", late)
    plant(tmp_path, "late/op.py", "def op():\n    return 1\n")
    assert after_second_import(["late"], cwd=tmp_path) == {"late.op": "a module"}
