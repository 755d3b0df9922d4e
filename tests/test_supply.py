"""What is installed with the package, in CI and by `make compat`, and what `import fastpeft` loads of it."""

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
INSTALLED_BY_MAKE = ("demo", "test", "lint")  # of the extras
# Imported by a benchmark where somebody has installed it.
BROUGHT = {"lorafusion"}
MODULES = {"liger-kernel": "liger_kernel", "pytest-benchmark": "pytest_benchmark", "pytest-xdist": "xdist"}


def requirements_of(file: str) -> dict[str, Requirement]:
    """Name -> what a constraints file says of it, as far as it is for this Python."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    applying = [each for each in found if each.marker is None or each.marker.evaluate()]
    return {canonicalize_name(each.name): each for each in applying}


def declared(*extras: str) -> list[Requirement]:
    """What pyproject.toml asks for at run time, and for these extras."""
    found = [Requirement(line) for line in importlib.metadata.requires("fastpeft")]
    return [each for each in found if _applies(each, extras)]


def _applies(requirement: Requirement, extras) -> bool:
    marker, environment = requirement.marker, default_environment()
    return marker is None or any(marker.evaluate({**environment, "extra": extra}) for extra in ("", *extras))


def closure(requirements: list[Requirement]) -> dict[str, str]:
    """Name -> installed version, of these distributions and all that they require."""
    found, left = {}, [(each.name, frozenset(each.extras)) for each in requirements]
    seen = set(left)
    while left:
        name, extras = left.pop()
        distribution = importlib.metadata.distribution(name)
        found[canonicalize_name(name)] = distribution.version
        for line in distribution.requires or ():
            needed = Requirement(line)
            key = (needed.name, frozenset(needed.extras))
            if _applies(needed, extras) and key not in seen:
                seen.add(key)
                left.append(key)
    return found


def test_everything_that_ci_installs_is_pinned():
    pins, installed = requirements_of("constraints.txt"), closure(declared(*INSTALLED_BY_MAKE))
    assert {"torch", "transformers", "tokenizers", "sympy", "ruff", "pluggy"} <= installed.keys()
    assert sorted(installed.keys() - pins.keys()) == []
    wrong = {name: version for name, version in installed.items() if not pins[name].specifier.contains(version)}
    assert wrong == {}
    exact = {name for name in installed if re.fullmatch(r"==[^*,]+", str(pins[name].specifier))}
    assert installed.keys() - exact <= {"triton"}


def test_no_pin_is_left_over():
    installed = closure(declared(*INSTALLED_BY_MAKE))
    assert sorted(requirements_of("constraints.txt").keys() - installed.keys()) == []


def test_a_distribution_without_a_pin_is_found(monkeypatch):
    monkeypatch.setattr(
        importlib.metadata.Distribution, "requires", property(lambda self: ["pip"] if self.name == "sympy" else [])
    )
    assert closure([Requirement("sympy")]).keys() == {"sympy", "pip"}
    assert "pip" not in requirements_of("constraints.txt")


def test_compat_tries_the_oldest_and_the_newest():
    oldest, newest, pins = map(requirements_of, ("compat/oldest.txt", "compat/newest.txt", "constraints.txt"))
    assert oldest.keys() == newest.keys()
    bounds = {canonicalize_name(each.name): each.specifier for each in declared("test")}
    for name in oldest.keys() - {"torch"}:
        (lower,) = (each.version for each in bounds[name] if each.operator == ">=")
        version = str(oldest[name].specifier).removeprefix("==")
        assert f"{version}.".startswith(f"{lower}."), f"{name}: {version} is not the oldest of {bounds[name]}"
    for name, each in newest.items():
        version = str(each.specifier).removeprefix("==")
        assert bounds[name].contains(version) and pins[name].specifier.contains(version), name


def test_each_dependency_has_its_reason():
    (table,) = re.findall(r"## What it depends on\n\n(.*?)\n\n", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    rows = re.findall(r"^\| `([\w-]+)` \| ([^|]+) \| ([^|]+) \|$", table, re.MULTILINE)
    runtime = {each.name: each.specifier for each in declared()}
    assert sorted(name for name, _, _ in rows) == sorted(runtime)
    for name, why, releases in rows:
        bounds = [each.version for each in runtime[name] if each.operator == ">="]
        assert why.strip() and (re.findall(r"[\d.]+\d", releases)[:1] == bounds), name


def test_what_the_sources_import_is_declared():
    found = set()
    for path in (path for folder in ("fastpeft", "kernels", "benchmarks") for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {each.name.split(".")[0] for each in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(node.module.split(".")[0])
    foreign = found - sys.stdlib_module_names - {"fastpeft", "tests", "benchmarks"}
    known = {MODULES.get(each.name, each.name) for each in declared("demo", "bench", "test")} | BROUGHT
    assert sorted(foreign - known) == []
    assert {each.name for each in declared()} <= foreign


LOADED = """
import sys, torch
before = {name.partition(".")[0] for name in sys.modules}
import fastpeft, fastpeft.ops
more = {name.partition(".")[0] for name in sys.modules} - before - set(sys.stdlib_module_names)
print(sorted(name for name in more if not name.startswith("__")))
"""


def test_importing_fastpeft_loads_nothing_that_torch_does_not():
    done = subprocess.run([sys.executable, "-c", LOADED], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["['fastpeft']"]
