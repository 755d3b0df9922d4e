"""Instruments for programs (`fastpeft.ops._programs`)."""

import pytest

from fastpeft.dispatch import backend
from fastpeft.ops import _programs


@pytest.fixture
def on_triton():
    """Nothing is known of any call, and all are on the kernels."""
    _programs.forget()
    with backend("triton"):
        yield


@pytest.fixture
def counted(monkeypatch):
    """What was recorded: its names in order; and how many programs ran."""
    seen = {"recorded": [], "ran": 0}
    record = _programs._recorded

    def recorded(function, tensors, rest):
        seen["recorded"].append(function.__name__)
        result, program = record(function, tensors, rest)

        def run(*given):
            seen["ran"] += 1
            return program(*given)

        return result, run

    monkeypatch.setattr(_programs, "_recorded", recorded)
    return seen
