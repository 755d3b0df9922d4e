"""What one line of a program may say, and what it may not."""

import contextlib

import pytest
import torch

from fastpeft.kernels import _common
from fastpeft.ops import _recording
from tests.ops.programs_cases import same

pytestmark = pytest.mark.interpreter


def test_on_a_gpu_the_device_is_that_of_the_first_tensor(monkeypatch):
    """There a program's launches are on its device, whichever is current; each launch of an op is likewise."""
    entered = []

    @contextlib.contextmanager
    def on_device_of(tensor):
        entered.append(tensor)
        yield

    monkeypatch.setattr(_common, "on_device_of", on_device_of)
    x = torch.ones(3)
    recording = _recording.Recording((x,), (), True)
    recording._device = torch.device("cuda")
    with recording.watching():
        y = x + 1
    assert torch.equal(recording.program(y)(x), y) and entered == [x]


# What one line of a program may say, and what it may not.


def recorded(function, *tensors):
    recording = _recording.Recording(tensors, (), True)
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
    "a keyword of Python's": lambda x: torch.empty_like(x).random_(**{"from": 0, "to": 2}),
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


def with_an_overload_in_place(x):
    y = x.clone()
    torch.ops.aten.mul_.Scalar(y, 2.0)
    return y


def with_a_result_that_is_none(x):
    wanted = [True, False, True]
    grads = torch.ops.aten.convolution_backward(
        x[None], x[None], x[:, :2, None], [2], [1], [0], [1], False, [0], 1, wanted
    )  # fmt: skip
    return [each for each in grads if each is not None]


@pytest.mark.parametrize("function", [with_an_overload_in_place, with_a_result_that_is_none])
def test_what_a_line_says_of_overloads(function):
    _, program = recorded(function, torch.rand(2, 3))
    x = torch.rand(2, 3)
    found, expected = program(x), function(x)
    assert same(found, expected) if isinstance(found, list) else torch.equal(found, expected)


def test_what_nobody_uses_is_not_done_again():
    """As of what a finaliser does meanwhile."""
    torch.manual_seed(1)

    def function(x):
        torch.rand(1)
        return x.view(-1) + 1

    _, program = recorded(function, torch.rand(2, 3))
    state = torch.get_rng_state()
    program(torch.rand(2, 3, generator=torch.Generator()))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.fixture
def quick(monkeypatch):
    """Names of what recordings write as quick allocations and parts, in order."""
    found = []

    def counted(name, make):
        def run(*arguments):
            found.append(name)
            return make(*arguments)

        return run

    empty, part = counted("empty", _recording.quick_empty("cpu")), counted("part", _recording.quick_part())
    monkeypatch.setattr(_recording, "quick_empty", lambda device_type: empty)
    monkeypatch.setattr(_recording, "quick_part", lambda: part)
    return found


QUICK = {
    "empty": (lambda x: torch.empty(4, 2, dtype=x.dtype).fill_(3.0), ["empty"]),
    "empty_like": (lambda x: torch.empty_like(x).copy_(x), ["empty"]),
    "new_empty": (lambda x: x.new_empty((5,)).fill_(2.0), ["empty"]),
    "unbind": (lambda x: [each + 1 for each in x.unbind(0)], ["part", "part"]),
    "views": (lambda x: x.view(-1)[2:].t() * 2, ["part", "part"]),
    "before its whole": (lambda x: x.view(-1)[3:].as_strided((2,), (1,), 0) + 1, ["part", "part"]),
    "result": (lambda x: x.view(3, 2), ["part"]),
    "in place through a view": (lambda x: _in_place_through_a_view(x.clone()), ["part"]),
}


def _in_place_through_a_view(x):
    x.view(-1).mul_(2.0)
    return x


@pytest.mark.parametrize("what", QUICK)
def test_memory_is_had_the_quick_way(what, quick):
    function, ways = QUICK[what]
    _, program = recorded(function, torch.rand(2, 3))
    assert quick == []
    x = torch.rand(2, 3)
    found, expected = program(x), function(x)
    assert quick == ways
    found, expected = (each if isinstance(each, list) else [each] for each in (found, expected))
    assert same(found, expected)
    assert [each.stride() for each in found] == [each.stride() for each in expected]
    if what == "result":
        assert found[0].data_ptr() == x.data_ptr()


SLOW = {
    "other bits": (lambda x: x.view(torch.int32) + 1, torch.rand(2, 3)),
    "conjugated": (lambda x: x.conj().resolve_conj() * 2, torch.rand(2, 3, dtype=torch.complex64)),
    "negative": (lambda x: x.imag.resolve_neg() + 1, torch.rand(2, 3, dtype=torch.complex64).conj()),
    "one that wants a gradient": (
        lambda x: torch.empty(2, 3, requires_grad=True).detach().fill_(0.5),
        torch.rand(2, 3),
    ),
    "its columns in a row": (lambda x: torch.empty_strided((2, 3), (1, 2)).copy_(x), torch.rand(2, 3)),
    "another device": (lambda x: [torch.empty(2, 3, device="meta"), x + 1][1], torch.rand(2, 3)),
    "a copy": (lambda x: x.t().contiguous() + 1, torch.rand(2, 3)),
}
SHOWN = {"one that wants a gradient": 1, "a copy": 1}  # detach and t


@pytest.mark.parametrize("what", SLOW)
def test_what_has_no_quick_way_stays_as_it_is(what, quick):
    function, x = SLOW[what]
    _, program = recorded(function, x)
    assert torch.equal(program(x), function(x))
    assert quick == ["part"] * SHOWN.get(what, 0)


def test_an_option_that_is_a_tensor_is_not_kept():
    launched = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **options: launched.append((grid, arguments, options))

    x = torch.ones(2)
    for option, kept in ((16, True), (x, False)):
        recording = _recording.Recording((x,), (), True)
        with recording.watching():
            _common.launch(Kernel(), (3,), x, x, 1.5, None, BLOCK=option)
        program = recording.program(x)
        assert (program is not None) is kept and launched == [((3,), (x, 1.5, None), {"BLOCK": option})]
        if kept:
            program(x)
            assert launched.pop() == launched[0]
        launched.clear()
