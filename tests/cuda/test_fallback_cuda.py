"""Kernels that really do not compile, and really ask for too much, on a GPU: torch computes, under the same dropout."""

import importlib

import pytest
import torch
import triton
import triton.language as tl

import fastpeft
from fastpeft import BackendError, fallback, ops
from fastpeft.kernels import lora_linear as kernels
from tests.peft_pair import close

pytestmark = pytest.mark.cuda


@triton.jit
def _uncompilable():
    tl.static_assert(False, "planted by a test")


class Uncompilable:
    def __getitem__(self, grid):
        return lambda *args, **kwargs: _uncompilable[grid]()


class Greedy:
    """More stages of a pipeline than any GPU has shared memory for."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.kernel[grid](*args, **{**kwargs, "num_stages": 64})


@pytest.fixture(autouse=True)
def nothing_has_failed():
    yield
    fallback._failed.clear()
    fallback._drawn.clear()


def outcome():
    draw = torch.Generator("cuda").manual_seed(1)
    x, a, b = (
        torch.randn(shape, generator=draw, device="cuda").requires_grad_()
        for shape in ((512, 256), (16, 256), (256, 16))
    )
    weight = torch.randn(256, 256, generator=draw, device="cuda") / 16
    torch.manual_seed(3)
    y = ops.lora_linear(x, weight, None, a, b, 0.1, dropout=0.2, training=True)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), (x, a, b))]


@pytest.mark.parametrize("kernel", ["_shrink_kernel", "_grad_columns_kernel"])
@pytest.mark.parametrize("how", ["compilation", "resources"])
def test_torch_takes_over(how, kernel, monkeypatch):
    expected = outcome()
    wrong = Uncompilable() if how == "compilation" else Greedy(getattr(kernels, kernel))
    monkeypatch.setattr(kernels, kernel, wrong)
    with pytest.warns(RuntimeWarning, match="the Triton kernels failed") as caught:
        found = outcome()
    assert sum(warning.category is RuntimeWarning for warning in caught) == 1
    for mine, theirs in zip(found, expected, strict=True):
        close(mine, theirs, 1e-4)
    torch.cuda.synchronize()  # nothing is left of the failure
    with fastpeft.backend("triton"), pytest.raises(BackendError, match="cannot be done without"):
        outcome()


def test_a_broken_compiler(monkeypatch):
    """Nothing compiles that is not compiled yet, as without a C compiler or with a full disk."""
    expected = None
    with fastpeft.backend("torch"):
        expected = outcome()
    monkeypatch.setattr(
        importlib.import_module("triton.runtime.jit").JITFunction, "run", lambda *args, **kwargs: _fails()
    )
    with pytest.warns(RuntimeWarning, match="No C compiler"):
        found = outcome()
    assert [each.shape for each in found] == [each.shape for each in expected]
    assert all(torch.isfinite(each).all() for each in found)


def _fails():
    from triton.runtime.errors import PTXASError

    raise PTXASError("No C compiler")
