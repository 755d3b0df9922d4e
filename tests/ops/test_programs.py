"""Calls alike run a program, which gives what finding everything out gives, bit for bit; calls that are not alike do
not, whatever it is that differs."""

import contextlib

import numpy as np
import pytest
import torch
from torch import nn

from fastpeft import dispatch, fallback, tables
from fastpeft.dispatch import Plan, backend, override_plan
from fastpeft.kernels import _tiles
from fastpeft.ops import _programs, lora_linear
from fastpeft.ops.dora_linear import apply_dora
from fastpeft.ops.lora_linear import apply_lora
from fastpeft.ops.lora_mlp import apply_lora_mlp
from fastpeft.ops.lora_projections import apply_lora_projections
from fastpeft.scoped import scoped
from tests.memory import Allocations
from tests.ops.lora_linear_cases import STRATEGIES
from tests.ops.programs_cases import (
    DTYPES,
    LAYERS,
    REFUSED,
    WAYS,
    WITH_PROGRAMS,
    K,
    N,
    R,
    differentiated,
    layer_call,
    of_mlp,
    projection,
    same,
)

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("on_kernels")]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("name", WITH_PROGRAMS)
def test_a_program_gives_what_it_was_recorded_of(name, counted_programs):
    op, tensors, options, plan = WITH_PROGRAMS[name]
    torch.manual_seed(1)
    given = tensors()
    with override_plan(plan) if plan else contextlib.nullcontext():
        found = [differentiated(lambda *each: op(*each, **options), given) for _ in range(4)]
    assert all(same(each, found[0]) for each in found[1:])
    assert len(counted_programs["recorded"]) == 2
    assert counted_programs["ran"] == (0 if name in REFUSED else 4)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("compute", LAYERS)
def test_whatever_the_call(compute, dtypes, strategy, counted_programs):
    """Where x and dY lie, with a bias and without, with dropout and without, by every plan."""
    torch.manual_seed(2)
    for way in WAYS:
        for bias, dropout in ((False, 0.0), (True, 0.3)):
            layers = [projection(*size, bias, DTYPES[dtypes], dropout=dropout) for size in LAYERS[compute]]
            x = WAYS[way](torch.randn(2, 6, K, dtype=DTYPES[dtypes][0])).detach().requires_grad_()
            wanted = [x, *(each for one in layers for each in one[1:4] if each is not None)]
            with override_plan(Plan(strategy, strategy, "a test's")):
                ran = counted_programs["ran"]
                found = [differentiated(lambda *_: compute(x, layers), wanted) for _ in range(3)]  # noqa: B023
            assert same(found[1], found[0]) and same(found[2], found[0])
            assert counted_programs["ran"] == ran + 2


@pytest.mark.parametrize("wanted", ["x", "lora_A", "lora_B", "bias", "weight"])
def test_each_gradient_alone(wanted, counted_programs):
    given = {
        "x": torch.randn(3, 5, K),
        "weight": torch.randn(N, K),
        "bias": torch.randn(N),
        "lora_A": torch.randn(R, K),
        "lora_B": torch.randn(N, R),
    }
    for _ in range(2):  # with the same tensors, of which others want none now
        for name, each in given.items():
            each.requires_grad_(name == wanted)
        found = [differentiated(lambda *each: lora_linear(*each, 0.5), list(given.values())) for _ in range(3)]
        assert same(found[1], found[0]) and same(found[2], found[0])
        wanted = "x" if wanted != "x" else "bias"
    assert len(counted_programs["recorded"]) == 4


def replaced(name, make):
    def change(given):
        before = given[name]
        given[name] = make(before)
        if isinstance(before, torch.Tensor) and before.requires_grad:
            given[name] = given[name].detach().requires_grad_()

    return change


def with_data(name, make):
    def change(given):
        given[name].data = make(given[name].data)

    return change


CHANGES = {
    "more rows": replaced("x", lambda x: torch.cat((x, x), 1)),
    "other leading dimensions": replaced("x", lambda x: x.view(4, 6, K)),
    "other strides": replaced("x", lambda x: x.detach().transpose(0, 1).contiguous().transpose(0, 1)),
    "the weight's strides": replaced("weight", lambda w: w.t().contiguous().t()),
    "lora_A's strides in place": with_data("lora_A", lambda a: a.t().contiguous().t()),
    "a bias of every second number": replaced("bias", lambda b: torch.stack((b, b), -1)[:, 0]),
    "no bias": replaced("bias", lambda b: None),
    "x wants no gradient": lambda given: given.update(x=given["x"].detach()),
    "the weight wants one": lambda given: given["weight"].requires_grad_(),
    "lora_A wants none": lambda given: given["lora_A"].requires_grad_(False),
    "scaling": replaced("scaling", lambda s: 0.25),
    "dropout": replaced("dropout", lambda p: 0.5),
    "half adapters": lambda given: given.update(
        x=given["x"].detach().half().requires_grad_(), weight=given["weight"].half(), bias=given["bias"].half()
    ),
    "another rank": lambda given: given.update(
        lora_A=nn.Parameter(torch.randn(2 * R, K)), lora_B=nn.Parameter(torch.randn(N, 2 * R))
    ),
    "the torch backend": replaced("patched_backend", lambda name: "torch"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_call_that_is_not_alike_is_found_out(change, counted_programs):
    with scoped(dispatch._context, None):  # so that it is `patch` that has said which
        call, given = layer_call(patched_backend="triton")
        for _ in range(3):
            call()
        assert counted_programs["ran"] == 2
        CHANGES[change](given)
        found = call()
        assert counted_programs["ran"] == 2
        _programs.forget()
        assert same(found, call())


@contextlib.contextmanager
def rows_of_tiles():
    """Other tiles than the interpreter's."""
    before = _tiles.FAMILIES["interpreter"]
    _tiles.FAMILIES["interpreter"] = tuple(row._replace(tiles=row.tiles._replace(rows=32)) for row in before)
    _tiles.forget()
    try:
        yield
    finally:
        _tiles.FAMILIES["interpreter"] = before
        _tiles.forget()


@contextlib.contextmanager
def tf32():
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


@contextlib.contextmanager
def another_table():
    tables.use_none(torch.device("cpu"))
    try:
        yield
    finally:
        tables.forget()


AROUND = {
    "a plan": lambda: override_plan(Plan("addmm", "prewrite", "a test's")),
    "no fallback": fallback.no_fallback,
    "the torch backend": lambda: backend("torch"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "other tiles": rows_of_tiles,
    "inference": torch.inference_mode,
    "allocations are watched": Allocations,
    "tf32": tf32,
    "a table was read": another_table,
}


@pytest.mark.parametrize("around", AROUND)
def test_what_is_around_a_call_counts(around, counted_programs):
    call, given = layer_call()
    if around == "autocast":
        given["scaling"] = 0.75
    for _ in range(3):
        call()
    assert counted_programs["ran"] == 2
    with AROUND[around]():
        found = call()
        assert counted_programs["ran"] == 2
        _programs.forget()
        assert same(found, call())


@contextlib.contextmanager
def tf32_by_its_other_name():
    """As torch recommends it; what is asked by the old one then raises."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def test_tf32_by_either_name():
    call, _ = layer_call()
    for around in (tf32_by_its_other_name, tf32):
        for _ in range(3):
            call()
        with around():
            found = [call() for _ in range(3)]
        assert same(found[1], found[0]) and same(found[2], found[0])
        with around(), torch.autocast("cpu", torch.bfloat16):
            call()
        with around(), backend("torch"):
            call()


def launched_modes(monkeypatch):
    """The MODE of each launch, as they come."""
    from triton.runtime.interpreter import InterpretedFunction

    modes, launch = [], InterpretedFunction.__getitem__

    def launcher(kernel, grid):
        def run(*arguments, **options):
            modes.extend([options["MODE"]] if "MODE" in options else [])
            return launch(kernel, grid)(*arguments, **options)

        return run

    monkeypatch.setattr(InterpretedFunction, "__getitem__", launcher)
    return modes


def test_tf32_that_changes_between_forward_and_backward(monkeypatch):
    _, given = layer_call()
    modes = launched_modes(monkeypatch)

    def backward(around):
        y = apply_lora(*given.values())
        modes.clear()
        with around():
            torch.autograd.grad(y.sum(), [given["x"], given["lora_A"], given["lora_B"]])
        return list(modes)

    for _ in range(3):
        assert set(backward(contextlib.nullcontext)) == {"ieee"}
    for _ in range(3):
        assert set(backward(tf32)) == {"tf32"}


def test_tf32_of_a_residual_alone(monkeypatch):
    """On a half-precision x."""
    half = {"x": torch.randn(3, 8, K).half().requires_grad_(), "weight": None, "bias": None}
    call, _ = layer_call(**half, residual=torch.randn(3, 8, N))
    modes = launched_modes(monkeypatch)
    for _ in range(3):
        call()
    modes.clear()
    with tf32():
        call()
    assert "tf32" in modes


def test_a_plan_that_changes_between_forward_and_backward(counted_programs):
    """Which an MLP asks for in backward."""
    torch.manual_seed(2)
    layers = [projection(*size, False, DTYPES["half"]) for size in LAYERS[of_mlp]]
    x = torch.randn(4, K).half().requires_grad_()

    def call(plan):
        y = of_mlp(x, layers)
        with override_plan(plan) if plan else contextlib.nullcontext():
            return torch.autograd.grad(y.float().sum(), (x, layers[2].lora_B))

    for _ in range(3):
        call(None)
    other = Plan("prewrite", "prewrite", "a test's", reads=2)
    found = call(other)
    _programs.forget()
    assert same(found, call(other))


@pytest.mark.parametrize("make", [torch.tensor, np.array])
def test_a_number_that_changes_in_place(make):
    """Is read in every call, and kept by none."""
    scaling = make(0.25)
    x = torch.randn(4, K, requires_grad=True)
    layers = [projection(*size, False, DTYPES["fp32"]) for size in LAYERS[of_mlp]]

    def calls(scaling):
        one = layers[0]
        yield apply_lora(x, one.weight, None, None, one.lora_A, one.lora_B, scaling, 0.0)
        yield torch.cat(apply_lora_projections(x, [each._replace(scaling=scaling) for each in layers[:2]]), -1)
        yield apply_lora_mlp(x, *[each._replace(scaling=scaling) for each in layers], "silu")
        yield apply_dora(x, one.weight, None, one.lora_A, one.lora_B, torch.ones(28, requires_grad=True), scaling, 0.0)

    for _ in range(3):
        list(calls(scaling))
    scaling[...] = 0.75
    found = list(calls(scaling)), list(calls(0.75))
    _programs.forget()
    assert same(found[0], list(calls(0.75))) and same(found[1], found[0])


def test_sizes_that_are_symbols(counted_programs):
    """Of what is traced they cannot be looked up."""
    from torch.fx.experimental.proxy_tensor import make_fx

    call, given = layer_call()
    for _ in range(3):
        call()
    given = [each.detach() if isinstance(each, torch.Tensor) else each for each in given.values()]
    with backend("torch"):
        traced = make_fx(lambda x: apply_lora(x, *given[1:]), tracing_mode="symbolic", _allow_non_fake_inputs=True)
        found = traced(given[0])(given[0])
    torch.testing.assert_close(found, call()[0])
    assert counted_programs["ran"] == 4
