"""Calls alike of the torch path on a CPU run a program too, and give the same bits."""

import contextlib
import gc
import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastpeft.dispatch import backend
from fastpeft.ops import _cpu_products as cpu
from fastpeft.ops import _lora_linear_torch as path
from fastpeft.ops import _programs, lora_linear
from fastpeft.ops.lora_linear import apply_lora
from tests.memory import Allocations
from tests.ops.programs_cases import (
    DTYPES,
    LAYERS,
    WAYS,
    WITH_PROGRAMS,
    K,
    N,
    R,
    differentiated,
    layer_call,
    projection,
    same,
)

KEPT = 0.05  # a probability of dropout under which backward is given what forward dropped


@pytest.fixture(autouse=True)
def _on_torch(soon_recorded):
    with backend("torch"):
        yield


@pytest.mark.parametrize("name", [name for name, (*_, plan) in WITH_PROGRAMS.items() if plan is None])
def test_a_program_gives_what_it_was_recorded_of(name, counted_programs, poison):
    op, tensors, options, _ = WITH_PROGRAMS[name]
    torch.manual_seed(1)
    given = tensors()
    found = [differentiated(lambda *each: op(*each, **options), given) for _ in range(4)]
    assert all(same(each, found[0]) for each in found[1:])
    assert (len(counted_programs["recorded"]), counted_programs["ran"]) == ((0, 0) if options else (2, 4))


@pytest.mark.parametrize("onednn", [False, True])
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("compute", LAYERS)
def test_whatever_the_call(compute, dtypes, onednn, counted_programs, poison, monkeypatch):
    if onednn:
        monkeypatch.setattr(cpu, "prefers_onednn", torch.backends.mkldnn.is_available)
        monkeypatch.setattr(cpu, "ELEMENTS", 1)
        monkeypatch.setattr(cpu, "ROWS", 1)
    torch.manual_seed(2)
    for way in WAYS:
        for bias in (False, True):
            layers = [projection(*size, bias, DTYPES[dtypes]) for size in LAYERS[compute]]
            x = WAYS[way](torch.randn(2, 6, K, dtype=DTYPES[dtypes][0])).detach().requires_grad_()
            wanted = [x, *(each for one in layers for each in one[1:4] if each is not None)]
            ran = counted_programs["ran"]
            found = [differentiated(lambda *_: compute(x, layers), wanted) for _ in range(3)]  # noqa: B023
            assert same(found[1], found[0]) and same(found[2], found[0])
            assert counted_programs["ran"] == ran + 2


def test_onednn_is_asked_for_by_programs_too(monkeypatch):
    monkeypatch.setattr(cpu, "prefers_onednn", lambda: True)
    monkeypatch.setattr(cpu, "ELEMENTS", 1)
    monkeypatch.setattr(cpu, "ROWS", 1)
    asked = []
    multiply = torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda *args: asked.append(args) or multiply(*args))
    call, _ = layer_call()
    for times in (1, 2, 1, 1):  # torch looks it up again for who records
        asked.clear()
        call()
        assert len(asked) == 4 * times  # y, S, T and dX
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    asked.clear()
    call()
    assert not asked


def dropped_call(rows: int = 64, p: float = KEPT, **changes):
    torch.manual_seed(4)
    call, given = layer_call(x=torch.randn(rows, K, requires_grad=True), dropout=p, **changes)
    tensors = [each for each in given.values() if isinstance(each, torch.Tensor)]

    def of_seed(seed: int):
        torch.manual_seed(seed)
        y = apply_lora(*given.values())
        wanted = [each for each in tensors if each.requires_grad]
        return [y.detach(), *torch.autograd.grad(y.square().sum(), wanted)]

    return of_seed, given


@contextlib.contextmanager
def without_programs(monkeypatch):
    _programs.forget()
    with monkeypatch.context() as patch:
        patch.setattr(_programs, "AFTER", 1 << 30)
        yield
    _programs.forget()


@pytest.mark.parametrize("blocks", [1, 3])
def test_dropout_is_drawn_before_the_program(blocks, counted_programs, monkeypatch):
    """Other elements are dropped in every call, and another number of them."""
    call, given = dropped_call()
    monkeypatch.setattr(path, "MASKED_ELEMENTS", -(-given["x"].numel() // blocks))
    with without_programs(monkeypatch):
        expected = [call(seed) for seed in range(12)]
    found = [call(seed) for seed in range(12)]
    assert all(same(*each) for each in zip(found, expected, strict=True))
    assert counted_programs == {"recorded": ["_forward", "_backward"], "ran": 20}
    assert not same(expected[0], expected[1])


ASKED = {  # case -> (rows, probability, blocks)
    "more blocks than are drawn ahead": (64, KEPT, path.BLOCKS_AHEAD + 1),
    "another probability": (64, 0.3, 1),
    "blocks of which nothing is dropped": (6, 2.0**-10, 3),
}


@pytest.mark.parametrize("case", ASKED)
def test_dropout_that_has_to_be_asked_has_no_program(case, counted_programs, monkeypatch):
    rows, p, blocks = ASKED[case]
    call, given = dropped_call(rows, p)
    monkeypatch.setattr(path, "MASKED_ELEMENTS", given["x"].numel() // blocks)
    with without_programs(monkeypatch):
        expected = [call(seed) for seed in range(6)]
    assert all(same(call(seed), expected[seed]) for seed in range(6))
    assert counted_programs["ran"] == 0


def test_dropout_of_dora_has_none(counted_programs):
    op, tensors, *_ = WITH_PROGRAMS["dora"]
    given = tensors()
    found = [differentiated(lambda *each: op(*each, dropout=KEPT), given) for _ in range(4)]
    assert all(same(each, found[0]) for each in found) and counted_programs["recorded"] == []


@pytest.mark.parametrize("wanted", ["x", "lora_A", "lora_B"])
def test_dropout_for_one_gradient(wanted, monkeypatch):
    call, given = dropped_call()
    for name in ("x", "lora_A", "lora_B"):
        given[name] = given[name].detach().requires_grad_(name == wanted)

    def of_seed(seed):
        torch.manual_seed(seed)
        y = apply_lora(*given.values())
        return [y.detach(), *torch.autograd.grad(y.square().sum(), given[wanted])]

    with without_programs(monkeypatch):
        expected = [of_seed(seed) for seed in range(5)]
    assert all(same(of_seed(seed), expected[seed]) for seed in range(5))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_drop_the_same_again(reentrant, counted_programs):
    _, given = dropped_call()
    x, *others = given.values()
    wanted = [x, given["lora_A"], given["lora_B"]]

    def gradients(compute):
        torch.manual_seed(7)
        for each in wanted:
            each.grad = None
        compute(x).square().sum().backward()
        return [each.grad.clone() for each in wanted]

    expected = [gradients(lambda x: apply_lora(x, *others)) for _ in range(3)]
    found = [gradients(lambda x: checkpoint(apply_lora, x, *others, use_reentrant=reentrant)) for _ in range(3)]
    assert all(same(each, expected[0]) for each in expected + found)
    assert counted_programs["ran"] > 2


def test_what_is_not_alike_is_found_out(counted_programs, monkeypatch):
    call, given = layer_call()
    for _ in range(3):
        call()
    assert counted_programs["ran"] == 2
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.mkldnn, "enabled", False)
        call()
    given["scaling"] = 0.25
    call()
    given["x"] = torch.cat((given["x"], given["x"])).detach().requires_grad_()
    found = call()
    assert counted_programs["ran"] == 2
    _programs.forget()
    assert same(found, call())


def test_on_the_meta_device_there_are_none(counted_programs):
    tensors = [torch.randn(*shape, device="meta") for shape in ((3, K), (N, K), (R, K), (N, R))]
    for _ in range(4):
        assert apply_lora(*tensors[:2], None, None, *tensors[2:], 0.5, 0.0).shape == (3, N)
    assert counted_programs["recorded"] == [] and not _programs.LEARNED


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch
import fastpeft
from fastpeft.ops import _programs

x, w, a, b = (torch.randn(*shape, requires_grad=True) for shape in ((4, 6), (5, 6), (2, 6), (5, 2)))
for _ in range(_programs.AFTER + 3):
    fastpeft.ops.lora_linear(x, w.detach(), None, a, b, 2.0).sum().backward()
known, = _programs._alike(fastpeft.ops.lora_linear.__globals__["LoraLinearFunction"], x.shape, b.shape)
found = [*known.call.programs.forward.values(), known.call.programs.backward[0][-1]]
assert [each.__name__ for each in found] == ["program"] * 2, found
assert not [name for name in sys.modules if name.startswith("fastpeft.kernels")]
"""


def test_programs_of_a_cpu_need_no_triton():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_number_of_drawn_elements_is_not_written_down(counted_programs):
    """What asks for it is not recorded."""
    from fastpeft.ops._recording import Recording

    def program(function, x, drawn):
        recording = Recording((x,), (drawn,), False)
        with recording.watching():
            result = function(x, drawn)
        return recording.program(result)

    x, drawn = torch.rand(8), torch.tensor([1, 5])
    assert program(lambda x, drawn: x.clone().index_fill_(0, drawn, 0.0), x, drawn) is not None
    taken = program(lambda x, drawn: x.take(drawn) * 2, x, drawn)
    assert torch.equal(taken(x, drawn[:1]), x[1:2] * 2)
    for asks in (
        lambda x, drawn: x[: len(drawn)],
        lambda x, drawn: x.take(drawn).new_zeros(drawn.shape),
        lambda x, drawn: torch.empty_like(drawn),
        lambda x, drawn: x[: x.take(drawn).numel()] + 1,
        lambda x, drawn: x.take(drawn).view(2, 1) if drawn.numel() == 2 else x,
    ):
        assert program(asks, x, drawn) is None


@pytest.mark.parametrize("p", [0.0, KEPT])
def test_calls_alike_leave_nothing_behind(p, counted_programs):
    """In what is known of them either."""
    call, _ = dropped_call(p=p)

    def objects(calls: int) -> int:
        for seed in range(calls):
            call(seed)
        gc.collect()
        return len(gc.get_objects())

    objects(8)
    before = objects(4)
    assert objects(60) - before <= 3 and counted_programs["ran"] > 120


def test_public_calls_too(counted_programs):
    x, weight = torch.randn(3, 5, K, requires_grad=True), torch.randn(N, K)
    a, b = torch.randn(R, K, requires_grad=True), torch.randn(N, R, requires_grad=True)
    found = [differentiated(lambda *each: lora_linear(*each, 0.5), (x, weight, None, a, b)) for _ in range(4)]
    assert all(same(each, found[0]) for each in found) and counted_programs["ran"] == 4


def test_who_looks_at_what_torch_dispatches_sees_it_all(counted_programs):
    """Programs go past dispatch: a graph that is traced would have what they made for constants."""
    from torch.fx.experimental.proxy_tensor import make_fx

    weight, a, b = torch.randn(K, K) / K**0.5, torch.randn(R, K, requires_grad=True), torch.randn(K, R)
    x, other = torch.randn(3, 5, K), torch.randn(3, 5, K)

    def model(x):
        for _ in range(4):
            x = lora_linear(x, weight, None, a, b, 0.5).tanh()
        return x

    with torch.no_grad():
        traced = make_fx(model)(x)
        assert counted_programs["recorded"] == [] and not _programs.LEARNED
        expected = model(other)
        torch.testing.assert_close(traced(other), expected)
        for _ in range(2):
            model(x)
        assert counted_programs["ran"] > 0
        torch.testing.assert_close(make_fx(model)(x)(other), expected)
    y, ran = model(x), counted_programs["ran"]
    with Allocations():
        y.sum().backward()
    assert counted_programs["ran"] == ran and counted_programs["recorded"][-1] == "_forward"
