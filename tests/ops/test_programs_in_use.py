"""Programs beside what else intercepts, repeats, breaks or outlives a call."""

import contextlib
import importlib
import sys
import threading
import weakref
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastpeft
from fastpeft import BackendError, dispatch, fallback
from fastpeft.dispatch import backend, override_plan
from fastpeft.kernels import _common
from fastpeft.ops import _programs, _recording
from fastpeft.ops.lora_linear import LoraLinearFunction, apply_lora
from fastpeft.ops.lora_projections import apply_lora_projections
from tests.memory import Allocations
from tests.ops.programs_cases import DTYPES, WITH_PROGRAMS, K, N, R, differentiated, layer_call, projection, same

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("on_kernels")]


@pytest.mark.parametrize("inside", [False, True])
def test_autocast_has_programs_of_its_own(inside, counted_programs):
    """A backward has them too, but not within autocast."""
    _, given = layer_call()
    tensors = [given[name] for name in ("x", "lora_A", "lora_B")]

    def call(dtype):
        with torch.autocast("cpu", dtype):
            y = apply_lora(*given.values())
            if inside:
                return [y, *torch.autograd.grad(y.float().square().sum(), tensors)]
        return [y, *torch.autograd.grad(y.float().square().sum(), tensors)]

    for dtype in (torch.bfloat16, torch.float16):
        found = [call(dtype) for _ in range(3)]
        assert found[0][0].dtype is dtype and same(found[1], found[0]) and same(found[2], found[0])
    assert counted_programs["ran"] == (2 if inside else 4)


def test_without_gradients_a_forward_has_its_own_program(counted_programs):
    call, _ = layer_call()
    expected = call()[0]
    call()
    with torch.no_grad():
        assert torch.equal(call()[0], expected)
        assert counted_programs["ran"] == 0  # one that keeps nothing for a backward is another
        assert torch.equal(call()[0], expected)
    assert counted_programs["recorded"] == ["_forward", "_backward", "_forward"]
    assert counted_programs["ran"] == 1


def test_layers_alike_share_a_program(counted_programs):
    calls = [layer_call()[0] for _ in range(4)]
    for call in calls:
        call()
    assert len(counted_programs["recorded"]) == 2 and counted_programs["ran"] == 4


def test_a_tensor_that_is_there_twice_is_not_taken_for_two(counted_programs):
    call, given = layer_call(weight=torch.randn(K, K), bias=None, lora_B=nn.Parameter(torch.randn(K, R)))
    given["x"] = given["weight"]
    expected = call()
    assert same(call(), expected) and same(call(), expected)
    assert counted_programs["recorded"] == [] and not _programs.LEARNED


def test_a_subclass_of_tensors_is_not_recorded(counted_programs):
    class Own(torch.Tensor):
        pass

    call, given = layer_call()
    given["weight"] = given["weight"].as_subclass(Own)
    expected = call()
    assert same(call(), expected) and same(call(), expected)
    assert counted_programs["recorded"] == []


def test_transforms_of_functorch_are_refused_as_ever(counted_programs):
    call, given = layer_call()
    for _ in range(3):
        call()
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(lambda x: apply_lora(x, *list(given.values())[1:]).sum())(given["x"].detach())
    assert counted_programs["ran"] == 2


def test_a_derivative_of_a_gradient_is_refused_as_ever():
    call, given = layer_call()
    for _ in range(3):
        call()
    y = apply_lora(*given.values())
    (dx,) = torch.autograd.grad(y.sum(), given["x"], create_graph=True)
    with pytest.raises(fastpeft.errors.OpError, match="first derivatives only"):
        torch.autograd.grad(dx.sum(), given["lora_A"])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant, counted_programs):
    _, given = layer_call(dropout=0.4)

    def call():
        torch.manual_seed(7)
        y = checkpoint(lambda x: apply_lora(x, *list(given.values())[1:]), given["x"], use_reentrant=reentrant)
        leaves = [given[name] for name in ("x", "lora_A", "lora_B")]
        for leaf in leaves:
            leaf.grad = None
        y.square().sum().backward()
        return [y.detach(), *(leaf.grad for leaf in leaves)]

    expected = call()
    assert all(same(call(), expected) for _ in range(3))
    assert counted_programs["ran"] >= 6


def test_what_a_hook_makes_of_saved_tensors_is_asked_again(counted_programs):
    call, _ = layer_call()
    expected = call()
    call()
    turned = torch.autograd.graph.saved_tensors_hooks(
        lambda saved: saved.detach().t().contiguous() if saved.ndim == 2 else saved.detach(),
        lambda saved: saved.t() if saved.ndim == 2 else saved,
    )
    for _ in range(3):
        with turned:
            found = call()
        for each, other in zip(found, expected, strict=True):
            torch.testing.assert_close(each, other)
    assert counted_programs["recorded"] == ["_forward", "_backward", "_backward"]
    assert same(call(), expected)


def test_an_unused_projection_has_a_backward_without_a_program(counted_programs):
    layers = [projection(K, N, False, DTYPES["fp32"]) for _ in range(2)]
    x = torch.randn(6, K, requires_grad=True)
    found = []
    for _ in range(3):
        _, y = apply_lora_projections(x, layers)
        found.append([y, *torch.autograd.grad(y.sum(), (x, *layers[1][2:4]))])
    assert same(found[1], found[0]) and same(found[2], found[0])
    assert counted_programs["recorded"] == ["_forward"]


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_a_kernel_that_fails_in_a_program_falls_back(phase, monkeypatch):
    """To the torch path, under the mask that was drawn."""
    from triton.runtime.errors import OutOfResources
    from triton.runtime.interpreter import InterpretedFunction

    def choose(x, dtype, width=0, patched=None, of="rank"):
        return dispatch.Choice("triton", "a test")

    module = importlib.import_module("fastpeft.ops.lora_linear")
    monkeypatch.setattr(module, "choose_backend", choose)
    place = {"forward": "_shrink_kernel", "backward": "_grad_columns_kernel"}[phase]
    broken = getattr(importlib.import_module("fastpeft.kernels.lora_linear"), place)
    launch = InterpretedFunction.run

    def run(kernel, *arguments, **options):
        if kernel is broken:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return launch(kernel, *arguments, **options)

    call, given = layer_call(dropout=0.4)
    with backend("auto"):
        for _ in range(3):
            expected = call()
        monkeypatch.setattr(InterpretedFunction, "run", run)
        try:
            with pytest.warns(RuntimeWarning, match=f"lora_linear, {phase}, on cpu.*OutOfResources"):
                found = call()
        finally:
            fallback._failed.clear()
            fallback._drawn.clear()
    for each, other in zip(found, expected, strict=True):
        torch.testing.assert_close(each, other, rtol=1e-4, atol=1e-4)
    with pytest.raises(BackendError, match="cannot be done without"):
        call()


def seen_empty(shape, strides, dtype):
    """As programs allocate, but in the sight of Allocations."""
    return torch.empty_strided(shape, strides, dtype=dtype)


@pytest.mark.parametrize("name", WITH_PROGRAMS)
def test_a_program_holds_no_more_memory(name):
    """At its peak, than what it was recorded of, nor does that while it is; and none of it afterwards."""
    op, tensors, options, plan = WITH_PROGRAMS[name]
    given = tensors()
    peaks, left = [], []

    def watched(function, tensors, *rest):
        """The most of five, of which one may miss a storage that lies where another lay."""
        found = []
        for _ in range(5):
            with Allocations() as allocated:
                result = function(*tensors, *rest)
            found.append((allocated.peak, allocated.live))
            del result
        peaks.append(max(peak for peak, _ in found))
        left.append(max(live for _, live in found))

    record = _programs._recorded

    def recorded(function, tensors, drawn, rest):
        assert drawn == ()
        result, program = record(function, tensors, drawn, rest)
        watched(function, tensors, *rest)
        watched(program, tensors)
        watched(lambda *tensors: record(function, tensors, drawn, rest)[0], tensors)
        return result, program

    with override_plan(plan) if plan else contextlib.nullcontext(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(_programs, "_recorded", recorded)
        patch.setattr(_recording, "quick_empty", lambda device_type: seen_empty)
        for _ in range(2):
            differentiated(lambda *each: op(*each, **options), given)
    assert len(peaks) == 6
    for place in (0, 3):
        assert 0 < peaks[place + 1] <= peaks[place] and left[place + 1] == left[place]
        assert peaks[place + 2] == peaks[place] and left[place + 2] == left[place]  # while it is recorded


def test_a_program_keeps_no_tensor():
    call, given = layer_call()
    for _ in range(3):
        call()
    known = [weakref.ref(each) for each in given.values() if isinstance(each, torch.Tensor)]
    del call
    given.clear()
    assert _programs.LEARNED and all(each() is None for each in known)


def known_of(given):
    """What is known of calls of `layer_call` with tensors of these sizes."""
    return _programs._alike(LoraLinearFunction, given["x"].shape, given["lora_B"].shape)


def test_what_is_known_has_an_end(monkeypatch):
    assert _programs._alike.cache_info().maxsize == _programs.SIZES
    monkeypatch.setattr(_programs, "ALIKE", 2)
    call, given = layer_call()
    for scaling in (1.0, 2.0, 3.0):
        given["scaling"] = scaling
        call()
    assert [each.asked[0][0] for each in known_of(given)] == [3.0, 2.0]
    _programs.forget()
    assert known_of(given) == [] and not _programs.LEARNED


def test_threads(counted_programs, monkeypatch):
    from triton.runtime.interpreter import InterpretedFunction

    calls = [layer_call() for _ in range(2)]
    calls[1][1]["scaling"] = 0.25
    expected = [call() for call, _ in calls]
    _programs.forget()
    wrong, start, alone = [], threading.Barrier(4), threading.Lock()
    launch = InterpretedFunction.__getitem__

    def launcher(kernel, grid):
        def run(*arguments, **options):
            with alone:  # the interpreter knows one grid at a time
                return launch(kernel, grid)(*arguments, **options)

        return run

    monkeypatch.setattr(InterpretedFunction, "__getitem__", launcher)

    def work(number):
        start.wait()
        for _ in range(6):
            with backend("triton"):
                if not same(calls[number % 2][0](), expected[number % 2]):
                    wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not wrong and counted_programs["ran"] > 20


def test_a_launch_that_fails_ends_the_recording(monkeypatch):
    call, _ = layer_call()
    call()
    monkeypatch.setattr(_common, "on_device_of", None)
    with pytest.raises(TypeError):
        call()
    monkeypatch.undo()
    assert _common._watch.get() is None and torch.overrides._get_current_function_mode() is None
    with backend("triton"):
        assert same(call(), call())


def test_what_is_asked_of_a_tensor_on_a_gpu_is_covered(counted_programs, monkeypatch):
    def on_device_of(tensor):
        assert (tensor.is_cuda, tensor.get_device(), tensor.device) == (False, -1, torch.device("cpu"))
        return contextlib.nullcontext()

    monkeypatch.setattr(_common, "on_device_of", on_device_of)
    call, _ = layer_call()
    for _ in range(3):
        call()
    assert counted_programs["ran"] == 2


def test_lengths_that_change_are_not_recorded(counted_programs, monkeypatch):
    """As long as none comes often."""
    monkeypatch.undo()
    monkeypatch.setattr(_programs, "AFTER", 3)
    call, given = layer_call()
    with backend("triton"):
        for rows in (3, 4, 5, 3, 4, 5, 3, 4, 5):
            given["x"] = torch.randn(rows, K)
            call()
            assert [each.call.programs for each in known_of(given)] == [None]
        expected = call()
        assert [each.call.programs is not None for each in known_of(given)] == [True]
        assert same(call(), expected)


def test_two_results_with_one_gradient(counted_programs):
    """Their dY is one tensor, of which no program is made."""
    layers = [projection(K, N, False, DTYPES["fp32"]) for _ in range(2)]
    x, dy = torch.randn(6, K, requires_grad=True), torch.randn(6, N)
    found = [torch.autograd.grad(apply_lora_projections(x, layers), x, [dy, dy])[0] for _ in range(4)]
    assert all(torch.equal(each, found[0]) for each in found)
    assert counted_programs["recorded"] == ["_forward"] and counted_programs["ran"] == 2


def test_threads_that_learn_and_forget(monkeypatch):
    monkeypatch.setattr(_programs, "ALIKE", 2)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    failed, start = [], threading.Barrier(4)
    tensors = [[torch.ones(number + 1, 2), torch.ones(2, 2)] for number in range(40)]

    class Call(NamedTuple):
        programs: object = None
        dtype: torch.dtype = torch.float32
        by_kernels: bool = True
        is_straight: bool = True

    def work():
        start.wait()
        try:
            for _ in range(20):
                for number, each in enumerate(tensors):
                    _programs.learn(work, each, None, (), Call(), None)
                    _programs.known(work, each, None, ())
                    if number % 9 == 0:
                        _programs.forget()
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    try:
        for each in threads:
            each.start()
        for each in threads:
            each.join()
    finally:
        sys.setswitchinterval(before)
    assert not failed and all(len(_programs._alike(work, *(each.shape for each in pair))) < 6 for pair in tensors)


@pytest.mark.parametrize("fault", ["not there", "another signature", "other answers"])
def test_without_torch_s_guards_there_are_no_programs(fault, counted_programs, monkeypatch):
    """They are not public, and may change in a release."""
    from torch._C._dynamo import guards

    if fault == "not there":
        monkeypatch.delattr(guards, "TensorGuards")
    else:
        refuses = fault == "another signature"
        other = (lambda tensor: None) if refuses else (lambda *_, **__: SimpleNamespace(check=lambda *_: True))
        monkeypatch.setattr(guards, "TensorGuards", other)
    _programs._make_guards.cache_clear()
    try:
        call, _ = layer_call()
        expected = call()
        assert same(call(), expected) and same(call(), expected)
        assert counted_programs["recorded"] == [] and not _programs.LEARNED
    finally:
        _programs._make_guards.cache_clear()
