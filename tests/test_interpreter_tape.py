"""Programs that are played back: they compute, load and store what they would if they were interpreted."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from tests import interpreter, interpreter_speed, interpreter_tape
from tests.traffic import count_traffic

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(triton.__version__ != interpreter_speed.KNOWN, reason="this Triton is interpreted as shipped"),
]

FACTOR = tl.constexpr(2)


@pytest.fixture
def recorded(monkeypatch):
    """Grows with each program that is interpreted to be written down."""
    begun, record = [], interpreter_tape.Player._record
    monkeypatch.setattr(interpreter_tape, "_tapes", {})
    monkeypatch.setattr(
        interpreter_tape.Player, "_record", lambda self, *given: (begun.append(self), record(self, *given))
    )
    return begun


@triton.jit
def _scaled(x):
    return x * FACTOR


@triton.jit
def _ways(x_ptr, lengths_ptr, out_ptr, touched_ptr, cut, SIZE: tl.constexpr):
    """A loop as long as a number that it loads, branches by that and by the program's own, sums, draws, a product."""
    program = tl.program_id(0)
    tl.atomic_add(touched_ptr + program, 1)
    places = tl.arange(0, SIZE)
    total = tl.zeros([SIZE], tl.float32)
    for step in range(tl.load(lengths_ptr + program)):
        total += _scaled(tl.load(x_ptr + step * SIZE + places, mask=places > step, other=0.5))
        if step == cut:
            total = tl.where(tl.rand(7, places) > 0.5, total, -total)
    square = places[:, None] * SIZE + places[None, :]
    if tl.max(total) > 4.0:
        total += tl.sum(tl.dot(tl.load(x_ptr + square), tl.load(x_ptr + square), input_precision="ieee"), axis=0)
    elif program >= 3:
        total += tl.min(total).to(tl.float16)
    tl.atomic_add(touched_ptr + program, 10)
    tl.store(out_ptr + program * SIZE + places, total)


SIZE, PROGRAMS = 16, 6
LENGTHS = {"first": [0, 2, 2, 5, 2, 0], "second": [2, 2, 5, 0, 1, 7]}


def _ways_outcome(lengths: str, cut: int = 1):
    x = torch.randn(SIZE * SIZE, generator=torch.Generator().manual_seed(1))
    out, touched = torch.empty(PROGRAMS, SIZE), torch.zeros(PROGRAMS, dtype=torch.int32)
    with count_traffic() as traffic:
        _ways[(PROGRAMS,)](x, torch.tensor(LENGTHS[lengths]), out, touched, cut, SIZE=SIZE)
    return out, touched, [(launch.loads, launch.stores) for launch in traffic.launches], traffic.atomics


def test_every_way_through_a_kernel_gives_what_it_gives_interpreted(recorded):
    for number, (lengths, cut) in enumerate([("first", 1), ("first", 1), ("first", 0), ("second", 1), ("second", 4)]):
        before = len(recorded)
        out, touched, *counts = _ways_outcome(lengths, cut)
        assert len(recorded) - before < PROGRAMS and (number != 1 or len(recorded) == before)
        with interpreter_speed.as_shipped():
            expected, _, *expected_counts = _ways_outcome(lengths, cut)
        assert torch.equal(out, expected) and counts == expected_counts
        assert touched.tolist() == [11] * PROGRAMS  # what was done before a new way was met is not done again
    assert recorded


def test_hooks_that_come_later_are_honoured(recorded):
    plain = _ways_outcome("first")[0]
    with interpreter.backwards():
        assert torch.equal(_ways_outcome("first")[0], plain)
    with interpreter.symmetric_products():
        found = _ways_outcome("first")[0]
        with interpreter_speed.as_shipped():
            assert torch.equal(found, _ways_outcome("first")[0])
    assert not torch.equal(found, plain), "no product goes another way"


def test_a_global_that_has_changed_is_not_played_back(monkeypatch, recorded):
    outcomes = [_ways_outcome("first")[0]]
    monkeypatch.setitem(globals(), "FACTOR", tl.constexpr(3))
    outcomes.append(_ways_outcome("first")[0])
    with interpreter_speed.as_shipped():
        assert torch.equal(_ways_outcome("first")[0], outcomes[1])
    assert not torch.equal(*outcomes)


@triton.jit
def _square(out_ptr, number):
    tl.store(out_ptr, number * number)


def test_what_was_written_down_without_checks_is_not_played_back_with_them(recorded):
    out = torch.zeros(1, dtype=torch.int32)
    for number in (3, 5, 50_000):
        _square[(1,)](out, number)
    assert len(recorded) == 1
    with interpreter.overflow_checks():
        _square[(1,)](out, 5)
        assert out.item() == 25
        with pytest.raises(Exception, match="int32 overflow"):
            _square[(1,)](out, 50_000)


@triton.jit
def _of_any_type(x_ptr, out_ptr, pair, scale, AT: tl.constexpr):
    places = tl.arange(0, 4)
    tl.store(out_ptr + places, (pair[0] - pair[1] + AT) + tl.load(x_ptr + places).to(tl.float32) * scale)


@pytest.mark.parametrize(
    ("first", "second", "new"),
    [
        ({}, {}, False),
        ({}, {"pair": (3, 7)}, False),
        ({}, {"scale": 5.0}, True),
        ({"scale": 0.0}, {"scale": -0.0, "x": -torch.ones(4)}, True),
        ({}, {"x": torch.tensor([1, 2, 3, 4])}, True),
        ({}, {"x": torch.tensor([1.0, 2, 3, 4]).half()}, True),
        ({}, {"scale": 3}, True),
        ({}, {"pair": (3, 0.5)}, True),
        ({}, {"AT": 2}, True),
        ({"AT": 1}, {"AT": 1.0}, True),
        ({"AT": 1}, {"AT": True}, True),
    ],
)
def test_other_types_and_constants_are_written_down_anew(recorded, first, second, new):
    for number, changed in enumerate((first, second)):
        given = {"x": torch.tensor([1.0, 2, 3, 4]), "pair": (1, 2), "scale": 2.0, "AT": 1} | changed
        found, expected = torch.zeros(4), torch.zeros(4)
        _of_any_type[(1,)](given["x"], found, given["pair"], given["scale"], AT=given["AT"])
        assert len(recorded) == 1 + (number and new)
        with interpreter_speed.as_shipped():
            _of_any_type[(1,)](given["x"], expected, given["pair"], given["scale"], AT=given["AT"])
        assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


@triton.jit
def _narrow_and_wide(x_ptr, out_ptr):
    places = tl.arange(0, 4)
    tl.store(out_ptr + places, tl.load(x_ptr + places).to(tl.float32))
    tl.store(out_ptr + 4 + places, (tl.load(x_ptr + places).to(tl.float32) * 0.5).to(tl.bfloat16).to(tl.float32))


def test_numbers_that_the_interpreter_converts_in_a_way_of_its_own(recorded):
    usual, tiny = torch.tensor([1.0, -2.5, 0.0, 3e38]), torch.tensor([1.0, 1e-39, -3e-39, 0.0])
    for numbers in (usual, tiny, usual, tiny):
        found, expected = torch.zeros(8), torch.zeros(8)
        _narrow_and_wide[(1,)](numbers.bfloat16(), found)
        with interpreter_speed.as_shipped():
            _narrow_and_wide[(1,)](numbers.bfloat16(), expected)
        assert torch.equal(found.view(torch.int32), expected.view(torch.int32))
    assert len(recorded) == 2


@triton.jit
def _sums_so_far(x_ptr, out_ptr):
    places = tl.arange(0, 4)
    tl.store(out_ptr + places, tl.cumsum(tl.load(x_ptr + places), 0))


@triton.jit
def _by_descriptor(x_ptr, out_ptr):
    descriptor = tl.make_tensor_descriptor(x_ptr, [4, 4], [4, 1], [4, 4])
    places = tl.arange(0, 4)
    tl.store(out_ptr + places[:, None] * 4 + places[None, :], descriptor.load([0, 0]) * 2)


@triton.jit
def _turned(x_ptr, out_ptr):
    places = tl.arange(0, 4)
    square = places[:, None] * 4 + places[None, :]
    tl.store(out_ptr + square, tl.load(x_ptr + square).T + 0.5)


OF_NO_TAPE = {
    _sums_so_far: lambda x: x[:4].cumsum(0),
    _by_descriptor: lambda x: 2 * x,
    _turned: lambda x: x.view(4, 4).t().flatten() + 0.5,
}


@pytest.mark.parametrize("kernel", OF_NO_TAPE, ids=lambda kernel: kernel.__name__)
def test_what_no_tape_knows_is_interpreted(recorded, kernel):
    for start in (0.0, 3.0):
        x, out = torch.arange(16.0).add(start), torch.zeros(16)
        kernel[(1,)](x, out)
        expected = OF_NO_TAPE[kernel](x)
        assert torch.equal(out[: len(expected)], expected)
    assert len(recorded) == 1
    assert [tape.usable for _, tape in interpreter_tape._tapes.values()] == [False]


@triton.jit
def _beyond(x_ptr, out_ptr, size):
    places = tl.program_id(0) * 4 + tl.arange(0, 4)
    if tl.program_id(0) == 1:
        tl.device_assert(places < size, "beyond the end")
    tl.store(out_ptr + places, tl.load(x_ptr + places, mask=places < size), mask=places < size)


def test_an_error_leaves_nothing_behind(recorded):
    x, out = torch.arange(8.0), torch.zeros(8)
    methods = dict(vars(interpreter_tape.builder))
    for _ in range(2):
        with interpreter.overflow_checks(), pytest.raises(Exception, match="beyond the end"):
            _beyond[(2,)](x, out, 6)
        assert interpreter_tape.active is None
    assert dict(vars(interpreter_tape.builder)).keys() == methods.keys()
    _beyond[(2,)](x, out, 6)
    assert out.tolist() == [0, 1, 2, 3, 4, 5, 0, 0]


def test_an_address_beyond_the_arguments_is_found_in_what_is_played_back(recorded):
    x, out = torch.arange(16.0), torch.zeros(16)
    with count_traffic():
        _beyond[(2,)](x, out, 8)
    size = len(recorded)
    with count_traffic(), pytest.raises(Exception, match="outside every argument"):
        _beyond[(2,)](x[:6], out, 8)
    assert len(recorded) == size


@triton.jit
def _as_long_as(lengths_ptr, out_ptr):
    total = 0.0
    for step in range(tl.load(lengths_ptr + tl.program_id(0))):
        total += step
    tl.store(out_ptr + tl.program_id(0), total)


def test_a_kernel_with_a_way_for_each_program_is_interpreted_in_the_end(monkeypatch, recorded):
    monkeypatch.setattr(interpreter_tape, "RECORDINGS", 5)
    lengths, out = torch.arange(9), torch.zeros(9)
    for _ in range(2):
        _as_long_as[(9,)](lengths, out)
        assert torch.equal(out, (lengths * (lengths - 1) / 2).float())
    assert len(recorded) == 5


def test_results_that_are_no_arrays_are_not_lost_sight_of():
    tape = interpreter_tape.Tape(1)
    array = np.ones(3)
    recorder = interpreter_tape.Recorder(tape, [array], tape.start, [])
    assert recorder.computed(np.add, (array, 1)).tolist() == [2, 2, 2] and not recorder.lost
    assert recorder.computed(np.sum, (array,)) == 3 and recorder.lost


def test_it_is_left_with_the_rest(recorded):
    with interpreter_speed.as_shipped():
        _ways_outcome("first")
    assert not recorded
