"""Calls alike run a program, which gives what finding everything out gives, bit for bit; calls that are not alike do
not, whatever it is that differs."""

import contextlib
import importlib
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastpeft
from fastpeft import BackendError, dispatch, fallback, tables
from fastpeft.dispatch import Plan, backend, override_plan
from fastpeft.kernels import _common, _tiles
from fastpeft.ops import _programs, _recording, lora_linear
from fastpeft.ops.lora_linear import Projection, apply_lora
from fastpeft.ops.lora_mlp import apply_lora_mlp
from fastpeft.ops.lora_projections import apply_lora_projections
from fastpeft.scoped import scoped
from tests.memory import Allocations
from tests.op_calls import OPS
from tests.ops.lora_linear_cases import STRATEGIES

pytestmark = pytest.mark.interpreter
K, N, R = 20, 24, 4


@pytest.fixture(autouse=True)
def on_triton():
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


def differentiated(compute, tensors) -> list[torch.Tensor]:
    """The results under one seed, and the gradients of all tensors that want one."""
    torch.manual_seed(3)
    out = compute(*tensors)
    wanted = [each for each in tensors if isinstance(each, torch.Tensor) and each.requires_grad]
    dy = torch.randn(out.shape, generator=torch.Generator().manual_seed(4)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, wanted, dy)]


def same(found, expected):
    return all(torch.equal(each, other) for each, other in zip(found, expected, strict=True))


WITH_PROGRAMS = [name for name in OPS if name.partition("-")[0] in ("lora", "projections", "mlp")]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("name", WITH_PROGRAMS)
def test_a_program_gives_what_it_was_recorded_of(name, counted):
    op, tensors, options, plan = OPS[name]
    torch.manual_seed(1)
    given = tensors()
    with override_plan(plan) if plan else contextlib.nullcontext():
        found = [differentiated(lambda *each: op(*each, **options), given) for _ in range(4)]
    assert all(same(each, found[0]) for each in found[1:])
    assert len(counted["recorded"]) == 2 and counted["ran"] == 4  # a forward and a backward, the second time


DTYPES = {"half": (torch.float16, torch.float16), "wide": (torch.float16, torch.float32), "fp32": (torch.float32,) * 2}
WAYS = {
    "rows": lambda x: x.flatten(0, -2),
    "batch": lambda x: x,
    "turned": lambda x: x.transpose(0, 1),
    "a part": lambda x: torch.cat((x, x), -1)[..., 7 : 7 + x.shape[-1]],
    "spread": lambda x: x[:, :1].expand(-1, 4, -1),
}


def projection(inputs: int, outputs: int, bias: bool, dtypes, scaling=0.5, dropout=0.0) -> Projection:
    dtype, adapter = dtypes
    bias = torch.randn(outputs, dtype=dtype, requires_grad=True) if bias else None
    matrices = [torch.randn(shape, dtype=adapter, requires_grad=True) for shape in ((R, inputs), (outputs, R))]
    return Projection(torch.randn(outputs, inputs, dtype=dtype) / inputs**0.5, bias, *matrices, scaling, dropout)


def of_one(x, each):
    return apply_lora(x, each[0].weight, each[0].bias, None, *each[0][2:])


def of_three(x, each):
    return torch.cat(apply_lora_projections(x, each), -1)


def of_mlp(x, each):
    return apply_lora_mlp(x, *each, "silu")


LAYERS = {of_one: [(K, N)], of_three: [(K, N)] * 3, of_mlp: [(K, 28), (K, 28), (28, N)]}


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("compute", LAYERS)
def test_whatever_the_call(compute, dtypes, strategy, counted):
    """Where x and dY lie, with a bias and without, with dropout and without, by every plan."""
    torch.manual_seed(2)
    for way in WAYS:
        for bias, dropout in ((False, 0.0), (True, 0.3)):
            layers = [projection(*size, bias, DTYPES[dtypes], dropout=dropout) for size in LAYERS[compute]]
            x = WAYS[way](torch.randn(2, 6, K, dtype=DTYPES[dtypes][0])).detach().requires_grad_()
            wanted = [x, *(each for one in layers for each in one[1:4] if each is not None)]
            with override_plan(Plan(strategy, strategy, "a test's")):
                ran = counted["ran"]
                found = [differentiated(lambda *_: compute(x, layers), wanted) for _ in range(3)]  # noqa: B023
            assert same(found[1], found[0]) and same(found[2], found[0])
            assert counted["ran"] == ran + 2


@pytest.mark.parametrize("wanted", ["x", "lora_A", "lora_B", "bias", "weight"])
def test_each_gradient_alone(wanted, counted):
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
    assert len(counted["recorded"]) == 4


def layer_call(**changes):
    """(a function of nothing, what it is of): `apply_lora` on tensors that stay."""
    torch.manual_seed(5)
    given = {
        "x": torch.randn(3, 8, K, requires_grad=True),
        "weight": torch.randn(N, K),
        "bias": torch.randn(N),
        "residual": None,
        "lora_A": nn.Parameter(torch.randn(R, K)),
        "lora_B": nn.Parameter(torch.randn(N, R)),
        "scaling": 0.5,
        "dropout": 0.0,
        "patched_backend": None,
        **changes,
    }

    def call():
        torch.manual_seed(6)
        y = apply_lora(*given.values())
        if not y.requires_grad:
            return [y]
        wanted = [each for each in given.values() if isinstance(each, torch.Tensor) and each.requires_grad]
        return [y.detach(), *torch.autograd.grad(y.float().square().sum(), wanted)]

    return call, given


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
def test_a_call_that_is_not_alike_is_found_out(change, counted):
    with scoped(dispatch._context, None):  # so that it is `patch` that has said which
        call, given = layer_call(patched_backend="triton")
        for _ in range(3):
            call()
        assert counted["ran"] == 2
        CHANGES[change](given)
        found = call()
        assert counted["ran"] == 2
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
def test_what_is_around_a_call_counts(around, counted):
    call, given = layer_call()
    if around == "autocast":
        given["scaling"] = 0.75
    for _ in range(3):
        call()
    assert counted["ran"] == 2
    with AROUND[around]():
        found = call()
        assert counted["ran"] == 2
        _programs.forget()
        assert same(found, call())


@pytest.mark.parametrize("inside", [False, True])
def test_autocast_has_programs_of_its_own(inside, counted):
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
    assert counted["ran"] == (2 if inside else 4)


def test_without_gradients_a_forward_has_its_own_program(counted):
    call, _ = layer_call()
    expected = call()[0]
    call()
    with torch.no_grad():
        assert torch.equal(call()[0], expected)
        assert counted["ran"] == 0  # one that keeps nothing for a backward is another
        assert torch.equal(call()[0], expected)
    assert counted["recorded"] == ["_forward", "_backward", "_forward"]
    assert counted["ran"] == 1


def test_layers_alike_share_a_program(counted):
    calls = [layer_call()[0] for _ in range(4)]
    for call in calls:
        call()
    assert len(counted["recorded"]) == 2 and counted["ran"] == 4


def test_a_tensor_that_is_there_twice_is_not_taken_for_two(counted):
    call, given = layer_call(weight=torch.randn(K, K), bias=None, lora_B=nn.Parameter(torch.randn(K, R)))
    given["x"] = given["weight"]
    expected = call()
    assert same(call(), expected) and same(call(), expected)
    assert counted["recorded"] == [] and not _programs._known


def test_a_subclass_of_tensors_is_not_recorded(counted):
    class Own(torch.Tensor):
        pass

    call, given = layer_call()
    given["weight"] = given["weight"].as_subclass(Own)
    expected = call()
    assert same(call(), expected) and same(call(), expected)
    assert counted["recorded"] == []


def test_transforms_of_functorch_are_refused_as_ever(counted):
    call, given = layer_call()
    for _ in range(3):
        call()
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(lambda x: apply_lora(x, *list(given.values())[1:]).sum())(given["x"].detach())
    assert counted["ran"] == 2


def test_a_derivative_of_a_gradient_is_refused_as_ever():
    call, given = layer_call()
    for _ in range(3):
        call()
    y = apply_lora(*given.values())
    (dx,) = torch.autograd.grad(y.sum(), given["x"], create_graph=True)
    with pytest.raises(fastpeft.errors.OpError, match="first derivatives only"):
        torch.autograd.grad(dx.sum(), given["lora_A"])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant, counted):
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
    assert counted["ran"] >= 6


def test_what_a_hook_makes_of_saved_tensors_is_asked_again(counted):
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
    assert counted["recorded"] == ["_forward", "_backward", "_backward"]
    assert same(call(), expected)


def test_an_unused_projection_has_a_backward_without_a_program(counted):
    layers = [projection(K, N, False, DTYPES["fp32"]) for _ in range(2)]
    x = torch.randn(6, K, requires_grad=True)
    found = []
    for _ in range(3):
        _, y = apply_lora_projections(x, layers)
        found.append([y, *torch.autograd.grad(y.sum(), (x, *layers[1][2:4]))])
    assert same(found[1], found[0]) and same(found[2], found[0])
    assert counted["recorded"] == ["_forward"]


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
    launch = InterpretedFunction.__getitem__

    def launcher(kernel, grid):
        if kernel is broken:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return launch(kernel, grid)

    call, given = layer_call(dropout=0.4)
    with backend("auto"):
        for _ in range(3):
            expected = call()
        monkeypatch.setattr(InterpretedFunction, "__getitem__", launcher)
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


@pytest.mark.parametrize("name", WITH_PROGRAMS)
def test_a_program_holds_no_more_memory(name):
    """At its peak, than what it was recorded of; and none of it afterwards."""
    op, tensors, options, plan = OPS[name]
    given = tensors()
    peaks, left = [], []

    def watched(function, tensors, *rest):
        with Allocations() as allocated:
            result = function(*tensors, *rest)
        peaks.append(allocated.peak)
        left.append(allocated.live)
        return result

    record = _programs._recorded

    def recorded(function, tensors, rest):
        result, program = record(function, tensors, rest)
        watched(function, tensors, *rest)
        watched(program, tensors)
        return result, program

    with override_plan(plan) if plan else contextlib.nullcontext(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(_programs, "_recorded", recorded)
        for _ in range(2):
            differentiated(lambda *each: op(*each, **options), given)
    assert len(peaks) == 4
    for place in (0, 2):
        assert 0 < peaks[place + 1] <= peaks[place] and left[place + 1] == left[place]


def test_a_program_keeps_no_tensor():
    call, given = layer_call()
    for _ in range(3):
        call()
    known = [weakref.ref(each) for each in given.values() if isinstance(each, torch.Tensor)]
    del call
    given.clear()
    assert _programs._known and all(each() is None for each in known)


def test_what_is_known_has_an_end(monkeypatch):
    monkeypatch.setattr(_programs, "SIZES", 3)
    monkeypatch.setattr(_programs, "ALIKE", 2)
    call, given = layer_call()
    for rows in range(1, 7):
        given["x"] = torch.randn(rows, K)
        call()
    assert [key[1][0] for key in _programs._known] == [4, 5, 6]
    for scaling in (1.0, 2.0, 3.0):
        given["scaling"] = scaling
        call()
    assert [each.asked[0][0] for each in list(_programs._known.values())[-1]] == [3.0, 2.0]


def test_threads(counted, monkeypatch):
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
    assert not wrong and counted["ran"] > 20


def test_on_a_gpu_the_device_is_that_of_the_first_tensor(monkeypatch):
    """There a program's launches are on its device, whichever is current; each launch of an op is likewise."""
    entered = []

    @contextlib.contextmanager
    def on_device_of(tensor):
        entered.append(tensor)
        yield

    monkeypatch.setattr(_recording, "on_device_of", on_device_of)
    x = torch.ones(3)
    recording = _recording.Recording((x,))
    recording._on_a_gpu = True
    with recording.watching():
        y = x + 1
    assert torch.equal(recording.program(y)(x), y) and entered == [x]


# What one line of a program may say, and what it may not.


def recorded(function, *tensors):
    recording = _recording.Recording(tensors)
    with recording.watching():
        result = function(*tensors)
    return result, recording.program(result)


def sums(x, y):
    z = torch.empty_like(x)
    torch.add(x, y, out=z)
    left, right = z.view(-1).split(3)
    z = z.add_(1.0).contiguous()
    return [torch.cat([left, right]), (z.t(), None)], x.shape[0] * 2, x.dtype


def test_a_program_of_results_in_place_and_in_parts():
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    expected, program = recorded(sums, x, y)
    assert program is not None
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    found, expected = program(x, y), sums(x, y)
    assert same(found[0][:1], expected[0][:1]) and torch.equal(found[0][1][0], expected[0][1][0])
    assert found[0][1][1] is None and found[1:] == expected[1:] == (4, torch.float32)


ELSEWHERE = torch.ones(2, 3)
REFUSED = {
    "a value": lambda x: x * x.sum().item(),
    "a truth": lambda x: x if x.sum() > 0 else -x,
    "an address": lambda x: x + x.data_ptr() % 16,
    "a storage": lambda x: x + len(x.untyped_storage()),
    "a view's base": lambda x: x if x._is_view() else x + 1,
    "an offset": lambda x: x + x.storage_offset(),
    "a tensor from elsewhere": lambda x: x + ELSEWHERE,
    "a result from elsewhere": lambda x: ELSEWHERE,
    "a number that no literal says": lambda x: x * float("inf"),
    "too much": lambda x: [x + number for number in range(_recording.MOST + 1)],
    "a generator": lambda x: torch.empty_like(x).normal_(generator=torch.Generator()),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_the_guards_do_not_cover_is_not_recorded(what):
    _, program = recorded(REFUSED[what], torch.rand(2, 3))
    assert program is None


def test_a_tensor_given_twice_is_not_recorded():
    x = torch.rand(2, 3)
    assert recorded(torch.add, x, x)[1] is None


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
