"""What the properties share: poison in uninitialised memory, the interpreter's products as a GPU has them, counts."""

import os
import time

import pytest
import torch

from tests.counting import count
from tests.fuzz.profiles import UNTIL


@pytest.fixture(scope="module")
def poisoned():
    """torch.empty and its kin return NaN, and products in interpreted kernels do not depend on a tile's orientation."""
    from tests.interpreter import symmetric_products

    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    with symmetric_products():
        yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    result = yield
    if item.get_closest_marker("hypothesis"):
        count("properties")
    return result


def pytest_runtest_setup(item):
    if (until := os.environ.get(UNTIL)) and time.time() > float(until):
        pytest.skip("the time is over")
