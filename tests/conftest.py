"""What every test shares: one thread per worker, no network, the interpreter where there is no GPU, and instruments."""

import gc
import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, which reads it once
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from tests import error_recording, quick_cards, quick_compile, quick_files, quick_logs, quick_seeds

# Before triton is imported, which decides it once per process.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
if os.environ.get("TRITON_INTERPRET") == "1":
    from tests import interpreter_speed

    interpreter_speed.install()
quick_seeds.install()
quick_cards.install()
quick_logs.install()
quick_compile.install()
quick_files.install()
gc.set_threshold(20_000, 20, 20)  # at Python's own 700, compiling spends a tenth of its time in collections


def pytest_configure(config):
    config.pluginmanager.register(error_recording)
    config.addinivalue_line("markers", "interpreter: runs kernels on CPU tensors, so needs TRITON_INTERPRET=1")


def pytest_collection_modifyitems(items):
    """What takes long comes first: at the end, one worker would wait for the other."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU, torch.cuda.is_available() is False"))
        elif item.get_closest_marker("cuda") and interpreting:
            item.add_marker(pytest.mark.skip(reason="needs compiled kernels, but TRITON_INTERPRET is 1"))
        if item.get_closest_marker("interpreter") and not interpreting:
            item.add_marker(pytest.mark.skip(reason="needs the interpreter: set TRITON_INTERPRET=1"))


@pytest.fixture(autouse=True, scope="module")
def _short_collections():
    """What is there when a file's tests begin is never looked through again: transformers' Trainer calls gc.collect()
    several times a run, which takes seconds each in a process that has compiled much."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _launches_anew():
    """What launches and programs are made of is worked out again: a test may have changed what it hangs on."""
    yield
    if programs := sys.modules.get("fastpeft.ops._programs"):
        programs.forget()
    if tiles := sys.modules.get("fastpeft.kernels._tiles"):
        tiles.forget()


@pytest.fixture
def environment_backend(monkeypatch):
    """Sets FASTPEFT_BACKEND, as if before the process's first call."""
    from fastpeft.dispatch import backend_of_environment

    def set_to(name: str) -> None:
        monkeypatch.setenv("FASTPEFT_BACKEND", name)
        backend_of_environment.cache_clear()

    yield set_to
    backend_of_environment.cache_clear()


@pytest.fixture
def poison():
    """torch.empty and its kin return NaN (the greatest integer for integers): what was never written shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture
def overflow_checks():
    """32-bit integer overflow in an interpreted kernel raises."""
    from tests.interpreter import overflow_checks

    with overflow_checks():
        yield


@pytest.fixture
def symmetric_products():
    """fp32 products in interpreted kernels do not depend on the orientation of a tile."""
    from tests.interpreter import symmetric_products

    with symmetric_products():
        yield


@pytest.fixture
def soon_recorded(monkeypatch):
    """Nothing is known of any call, and the second of calls alike is recorded."""
    from fastpeft.ops import _programs

    _programs.forget()
    monkeypatch.setattr(_programs, "AFTER", 1)


@pytest.fixture
def on_kernels(soon_recorded):
    """So it is, and all calls are on the kernels."""
    from fastpeft.dispatch import backend

    with backend("triton"):
        yield


@pytest.fixture
def counted_programs(monkeypatch):
    """Of programs, what was recorded, in order, and how many ran."""
    from fastpeft.ops import _programs

    seen = {"recorded": [], "ran": 0}
    record = _programs._recorded

    def recorded(function, tensors, drawn, rest):
        seen["recorded"].append(function.__name__)
        result, program = record(function, tensors, drawn, rest)

        def run(*given):
            seen["ran"] += program.__name__ == "program"  # and not what stands in for one that was refused
            return program(*given)

        return result, run

    monkeypatch.setattr(_programs, "_recorded", recorded)
    return seen
