"""The package as users get it: from a checkout, an editable install, a wheel, a wheel made from the sdist.

The top-level folder `kernels` is the package `fastpeft.kernels`, and must never be taken for Hugging Face's `kernels`.
"""

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHIMS = {"fastpeft/kernels/__init__.py", "fastpeft/benchmarks/__init__.py"}
MEASURED = "fastpeft/measured/some-gpu.json"
LEFT_OUT = ("__pycache__", "*.egg-info", "build", "dist", ".*_cache", "demo-output")


def run(arguments, cwd, **environment):
    """Standard output of a command that must succeed, away from this process's path and bytecode caches."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    clean |= {"PYTHONDONTWRITEBYTECODE": "1", "PIP_NO_INPUT": "1"} | environment
    done = subprocess.run([*map(str, arguments)], cwd=cwd, env=clean, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{arguments} failed in {cwd}:\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    return done.stdout


def copy_of_tree(destination):
    """What a build reads, without leftovers of earlier ones: an old list of sources would hide a missing file."""
    for name in ("kernels", "fastpeft", "benchmarks", "docs", "examples", "tests", ".ci"):
        shutil.copytree(ROOT / name, destination / name, ignore=shutil.ignore_patterns(*LEFT_OUT))
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy2(path, destination)
    (destination / MEASURED).parent.mkdir(exist_ok=True)
    (destination / MEASURED).write_text("{}")  # tables ship as soon as there are some
    return destination


def build(kind, source, destination):
    """The file that setuptools' build hook `build_<kind>` makes of a source tree."""
    hook = f"import setuptools.build_meta as b, sys; print(b.build_{kind}(sys.argv[1]))"
    destination.mkdir(exist_ok=True)
    return destination / run([sys.executable, "-c", hook, destination], cwd=source).splitlines()[-1]


def packaged(wheel):
    """The files of a wheel that are not its metadata."""
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def expected_in_wheel():
    """Every source of the checkout, the two mapped folders under the package, without the checkout's shims and the
    suites that pytest runs in it."""
    files = {f"fastpeft/{path.relative_to(ROOT).as_posix()}" for path in ROOT.glob("kernels/**/*.py")}
    files |= {f"fastpeft/{path.relative_to(ROOT).as_posix()}" for path in ROOT.glob("benchmarks/*.py")}
    own = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("fastpeft/**/*.py")} - SHIMS
    shipped = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("fastpeft/measured/*.json")}
    return files | own | shipped | {MEASURED}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A copy of the checkout, its wheel, its sdist unpacked, and the wheel made from that."""
    base = tmp_path_factory.mktemp("built")
    tree = copy_of_tree(base / "checkout")
    sdist = build("sdist", tree, base / "sdist")
    shutil.unpack_archive(sdist, base / "unpacked")
    (unpacked,) = (base / "unpacked").iterdir()
    return {
        "checkout": tree,
        "unpacked": unpacked,
        "wheel": build("wheel", copy_of_tree(base / "for_wheel"), base / "wheel"),
        "wheel of sdist": build("wheel", unpacked, base / "wheel_of_sdist"),
    }


@pytest.mark.parametrize("which", ["wheel", "wheel of sdist"])
def test_a_wheel_holds_every_source_and_no_shim(built, which):
    files = packaged(built[which])
    assert "fastpeft/kernels/lora_linear.py" in files and "fastpeft/kernels/__init__.py" not in files
    assert files == expected_in_wheel()


def test_a_wheel_carries_neither_a_top_level_kernels_nor_its_tests(built):
    assert {name.split("/")[0] for name in packaged(built["wheel"])} == {"fastpeft"}


def test_the_sdist_is_a_checkout(built):
    """Whoever unpacks it can run the tests and use the package in place."""
    unpacked = {path.relative_to(built["unpacked"]).as_posix() for path in built["unpacked"].rglob("*.py")}
    checkout = {path.relative_to(built["checkout"]).as_posix() for path in built["checkout"].rglob("*.py")}
    assert checkout <= unpacked
    assert {"Makefile", "constraints.txt", "LICENSE", ".ci/run", "docs/api.md"} <= {
        path.relative_to(built["unpacked"]).as_posix() for path in built["unpacked"].rglob("*") if path.is_file()
    }


def test_naming_only_what_find_packages_finds_loses_the_kernels(built, tmp_path):
    """Shows that the comparison of wheel and checkout can fail, and why setup.py names two packages by hand."""
    tree = shutil.copytree(built["unpacked"], tmp_path / "tree", ignore=shutil.ignore_patterns(*LEFT_OUT))
    for shim in SHIMS:
        (tree / shim).unlink()
    setup = tree / "setup.py"
    assert ", *ELSEWHERE}" in setup.read_text()
    setup.write_text(setup.read_text().replace(", *ELSEWHERE}", "}"))
    files = packaged(build("wheel", tree, tmp_path / "wheel"))
    assert "fastpeft/errors.py" in files and "fastpeft/kernels/lora_linear.py" not in files


class Environment:
    """A virtual environment that sees the libraries of the one the tests run in, and fastpeft as it was installed."""

    def __init__(self, folder, *install):
        venv.create(folder, with_pip=False)
        self.python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        purelib = "import sysconfig; print(sysconfig.get_path('purelib'))"
        self.site = Path(run([self.python, "-c", purelib], cwd=folder).strip())
        (self.site / "libraries_of_the_tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
        pip = [sys.executable, "-m", "pip", "--python", self.python, "install", "-q", "--no-deps", "--no-index"]
        run([*pip, "--no-build-isolation", "--ignore-installed", *install], cwd=folder)


WHERE = """
import importlib.util, json, fastpeft, fastpeft.kernels
names = ["fastpeft", "fastpeft.kernels.lora_linear", "fastpeft.kernels._common", "fastpeft.benchmarks.checkin"]
print(json.dumps({name: importlib.util.find_spec(name).origin for name in names}))
"""


def places(python, cwd, **environment):
    """From which file Python takes each part of the package."""
    found = json.loads(run([python, "-c", WHERE], cwd=cwd, **environment).splitlines()[-1])
    return {name: Path(origin).resolve() for name, origin in found.items()}


def places_in_checkout(tree):
    return {
        "fastpeft": tree / "fastpeft/__init__.py",
        "fastpeft.kernels.lora_linear": tree / "kernels/lora_linear.py",
        "fastpeft.kernels._common": tree / "kernels/_common.py",
        "fastpeft.benchmarks.checkin": tree / "benchmarks/checkin.py",
    }


def test_both_wheels_are_the_same(built):
    """Byte for byte, but for their own lists of hashes and dates: what is shown of one installed holds for both."""
    one, other = (zipfile.ZipFile(built[which]) for which in ("wheel", "wheel of sdist"))
    assert one.namelist() == other.namelist()
    assert {name for name in one.namelist() if one.read(name) != other.read(name)} <= {
        name for name in one.namelist() if name.endswith(".dist-info/RECORD")
    }


def test_an_installed_wheel_has_its_own_kernels(built, tmp_path):
    environment = Environment(tmp_path / "venv", built["wheel of sdist"])
    inside = {name: environment.site / (name.replace(".", "/") + ".py") for name in places_in_checkout(ROOT)}
    inside["fastpeft"] = environment.site / "fastpeft/__init__.py"
    assert places(environment.python, cwd=tmp_path) == {name: path.resolve() for name, path in inside.items()}
    assert (environment.python.parent / "fastpeft").exists(), "the console script is missing"


def test_an_editable_install_uses_the_checkout(built, tmp_path):
    environment = Environment(tmp_path / "venv", "-e", built["checkout"])
    assert places(environment.python, cwd=tmp_path) == places_in_checkout(built["checkout"].resolve())
    whose = (
        "import importlib.util as u; s = u.find_spec('kernels'); print(*(s.submodule_search_locations if s else []))"
    )
    assert str(built["checkout"]) not in run([environment.python, "-c", whose], cwd=tmp_path)


@pytest.mark.parametrize("which", ["checkout", "unpacked"])
def test_nothing_need_be_installed_at_the_root(built, which):
    assert places(sys.executable, cwd=built[which]) == places_in_checkout(built[which].resolve())


def test_the_check_in_starts_from_a_checkout(built):
    finds = "import importlib.util; print(importlib.util.find_spec('benchmarks.checkin').origin)"
    found = run([sys.executable, "-c", finds], cwd=built["checkout"]).strip()
    assert Path(found).resolve() == (built["checkout"] / "benchmarks/checkin.py").resolve()


def test_pytest_at_the_root_needs_no_install(built, tmp_path):
    """The plain `pytest` command puts no folder on the path by itself."""
    tree = shutil.copytree(built["checkout"], tmp_path / "tree")
    expected = {name: str(path) for name, path in places_in_checkout(tree.resolve()).items()}
    (tree / "tests/test_where.py").write_text(
        "from importlib.util import find_spec\n\n\ndef test_where():\n"
        f"    expected = {expected}\n    assert {{name: find_spec(name).origin for name in expected}} == expected\n"
    )
    command = [sys.executable, "-c", "import pytest, sys; sys.path.remove(''); sys.exit(pytest.main(sys.argv[1:]))"]
    assert "1 passed" in run([*command, "-q", "-p", "no:cacheprovider", "tests/test_where.py"], cwd=tree)


LEAN = """
import sys, fastpeft, fastpeft.ops
print([name for name in ("triton", "transformers", "peft", "safetensors", "accelerate") if name in sys.modules])
"""


def test_importing_fastpeft_imports_torch_alone():
    assert run([sys.executable, "-c", LEAN], cwd=ROOT).splitlines() == ["[]"], "or something was printed"


def test_the_lean_import_check_can_fail(built, tmp_path):
    for folder in ("fastpeft", "kernels"):
        shutil.copytree(built["checkout"] / folder, tmp_path / folder)
    heavy = ["triton", "transformers", "peft", "safetensors", "accelerate"]
    for name in heavy:
        (tmp_path / f"{name}.py").touch()  # an empty stand-in is as good, and quick
    with open(tmp_path / "fastpeft/__init__.py", "a") as package:
        package.write(f"\nimport {', '.join(heavy)}\n")
    assert run([sys.executable, "-c", LEAN], cwd=tmp_path).splitlines() == [str(heavy)]


HF_KERNELS = '''
"""Stands for Hugging Face's package: whatever name is imported from it exists, decorators change nothing."""

class Anything:
    def __init__(self, *arguments, **options):
        pass

def decorator(*arguments, **options):
    return lambda target: target

use_kernel_forward_from_hub = use_kernel_func_from_hub = use_kernelized_func = decorator

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return Anything
'''

IMPORT_A_MODEL = """
import json, sys
from transformers.utils.import_utils import is_kernels_available
available = is_kernels_available()
from transformers import LlamaForCausalLM
import fastpeft.kernels
print(json.dumps([available, getattr(sys.modules.get("kernels"), "__file__", None), [*fastpeft.kernels.__path__]]))
"""


@pytest.fixture
def hf_kernels(tmp_path):
    """A folder as site-packages would be with `kernels` installed, in a version that transformers accepts."""
    from transformers.utils.import_utils import KERNELS_MIN_VERSION

    site = tmp_path / "site"
    (site / "kernels").mkdir(parents=True)
    (site / "kernels/__init__.py").write_text(HF_KERNELS)
    metadata = site / f"kernels-{KERNELS_MIN_VERSION}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n")
    return site


def import_a_model(cwd, **environment):
    """[whether transformers sees `kernels`, the file it was imported from, the path of fastpeft.kernels]"""
    return json.loads(run([sys.executable, "-c", IMPORT_A_MODEL], cwd=cwd, **environment).splitlines()[-1])


def test_transformers_at_the_root_finds_hugging_face_kernels(hf_kernels):
    seen = import_a_model(ROOT, PYTHONPATH=str(hf_kernels))
    assert seen == [True, str(hf_kernels / "kernels/__init__.py"), [str(ROOT / "kernels")]]


def test_transformers_at_the_root_without_hugging_face_kernels():
    try:
        importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        assert import_a_model(ROOT) == [False, None, [str(ROOT / "kernels")]]
    else:
        available, file, ours = import_a_model(ROOT)
        assert ROOT not in Path(file).parents and ours == [str(ROOT / "kernels")]


def test_an_init_file_in_kernels_would_break_transformers(built, hf_kernels, tmp_path):
    """Shows that the two checks above can fail, and why the folder has no such file."""
    tree = shutil.copytree(built["checkout"], tmp_path / "tree")
    (tree / "kernels/__init__.py").touch()
    with pytest.raises(AssertionError, match="cannot import name .* from 'kernels'"):
        import_a_model(tree, PYTHONPATH=str(hf_kernels))
