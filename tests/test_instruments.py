"""The instruments of the kernel tests, each shown to notice what it is there to notice."""

import contextlib
import importlib.util

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from fastpeft import oracle
from tests import interpreter, interpreter_speed
from tests.ops import lora_linear_cases, prefix_attention_cases
from tests.traffic import count_traffic

pytestmark = pytest.mark.interpreter


@triton.jit
def _copy(x_ptr, out_ptr, size, beyond, BLOCK: tl.constexpr):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x_ptr + places, mask=places < size, other=0.0)
    tl.store(out_ptr + places, values, mask=places < size + beyond)


@triton.jit
def _count(out_ptr, BLOCK: tl.constexpr):
    tl.atomic_add(out_ptr + tl.arange(0, BLOCK), 1.0)


@triton.jit
def _product_both_ways(a_ptr, b_ptr, out_ptr):
    m, k = tl.arange(0, 16), tl.arange(0, 32)
    a = tl.load(a_ptr + m[:, None] * 32 + k[None, :])
    b = tl.load(b_ptr + k[:, None] * 16 + m[None, :])
    place = out_ptr + m[:, None] * 16 + m[None, :]
    tl.store(place, tl.dot(a, b, input_precision="ieee"))
    tl.store(place + 256, tl.trans(tl.dot(tl.trans(b), tl.trans(a), input_precision="ieee")))


@triton.jit
def _last_program(out_ptr):
    tl.store(out_ptr, tl.program_id(0))


@triton.jit
def _square(out_ptr, number):
    tl.store(out_ptr, number * number)


def test_traffic_counts_the_active_lanes_by_argument():
    x, out = torch.arange(20.0, dtype=torch.float16), torch.empty(20)
    with count_traffic() as traffic:
        _copy[(2,)](x, out, 20, 0, BLOCK=16)
    assert torch.equal(out, x.float())
    assert traffic.of("_copy") == ({"x_ptr": 40}, {"out_ptr": 80})
    assert traffic.loaded(x[3:]) == 40
    assert traffic.atomics == 0


def test_traffic_refuses_addresses_outside_the_arguments():
    storage = torch.zeros(64)
    with count_traffic(), pytest.raises(Exception, match="3 addresses outside every argument"):
        _copy[(2,)](torch.zeros(20), storage[20:40], 20, 3, BLOCK=16)
    _copy[(2,)](torch.zeros(20), storage[20:40], 20, 3, BLOCK=16)  # the hooks are gone again


def test_traffic_counts_atomics():
    out = torch.zeros(8)
    with count_traffic() as traffic:
        _count[(2,)](out, BLOCK=8)
    assert traffic.atomics == 2 and out.tolist() == [2.0] * 8


def test_guard_zones_notice_a_write_beside_the_output():
    guarded = interpreter.GuardedTorch()
    out = guarded.empty(2, 10, dtype=torch.float32, device="cpu")
    assert out.isnan().all()
    _copy[(2,)](torch.zeros(20), out, 20, 0, BLOCK=16)
    assert guarded.trespassed() == 0
    _copy[(2,)](torch.zeros(20), out, 20, 3, BLOCK=16)
    assert guarded.trespassed() == 3


def test_overflow_checks():
    out = torch.zeros(1, dtype=torch.int32)
    _square[(1,)](out, 50_000)
    with interpreter.overflow_checks(), pytest.raises(Exception, match="int32 overflow"):
        _square[(1,)](out, 50_000)


def test_programs_run_backwards():
    out = torch.zeros(1, dtype=torch.int32)
    _last_program[(3,)](out)
    assert out.item() == 2
    with interpreter.backwards():
        _last_program[(3,)](out)
    assert out.item() == 0


def test_products_do_not_depend_on_the_orientation():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(16, 32, generator=generator), torch.randn(32, 16, generator=generator)
    out = torch.zeros(2, 16, 16)

    with interpreter.symmetric_products():
        _product_both_ways[(1,)](a, b, out)
    assert torch.allclose(out[0], a @ b, atol=1e-5)
    assert torch.equal(out[0], out[1])


def _of_attention(*modifiers, dtype, **sizes):
    sizes = {"heads": 2, "kv_heads": 1, "queries": 18, "prefix": 17, "dtype": dtype} | sizes
    case = prefix_attention_cases.problem(*modifiers, **sizes)
    with prefix_attention_cases.on("triton", "fused"):
        return prefix_attention_cases.op_outcome(case)


def _of_lora(dtypes):
    problem = lora_linear_cases.draws(1, (18, 35), 33, dtypes=dtypes, dropout=0.3)[0]
    with lora_linear_cases.on("triton", "fused"):
        return oracle.lora_linear_outcomes(problem, ("x", "bias", "lora_A", "lora_B"))[0]


@triton.jit
def _operators(x_ptr, out_ptr, four, SIZE: tl.constexpr):
    """Every operator on rows, columns, scalars and numbers, of one type and of two."""
    rows, columns = tl.arange(0, SIZE), tl.arange(0, SIZE).to(tl.int64)
    places = rows[:, None] * SIZE + columns[None, :]
    x = tl.load(x_ptr + places)
    column = tl.load(x_ptr + rows)
    low = (places < four * 3) | ((columns[None, :] >= 2) & (rows[:, None] <= four)) ^ (places > 7)
    word = (rows.to(tl.uint32) * 0x9E3779B9)[:, None] ^ (columns & 5).to(tl.uint32)[None, :]
    halves = x.to(tl.float16) * 3 - column.to(tl.float16)[None, :]
    sums = (2 - x) * x + 0.5 - 1.5 * column[:, None] + four * x + halves * x
    sums += ((3 - rows)[:, None] * columns[None, :] - (7 - four)) * 1.0
    both = tl.where(low & (x > 0) & (x <= column[:, None]) & (halves < 1), sums, sums - 100)
    tl.store(out_ptr + places, both + ((word | 3) & 0xFF).to(tl.float32))
    cube = (rows + 1)[:, None, None] * (SIZE * SIZE) + places[None, :, :]
    tl.store(out_ptr + cube, x[None, :, :] - column[:, None, None])


def _of_operators():
    out = torch.empty(9 * 8 * 8)
    _operators[(1,)](torch.randn(8, 8, generator=torch.Generator().manual_seed(3)), out, 4, SIZE=8)
    return {"out": out}


NUMBERS = [0.0, -0.0, 1.0, -2.5, 65504.0, 1e-38, -3e-39, 3e38, float("inf"), float("nan"), 0.1, 7.0, 1e-6, -1e5, 3, 9]


@triton.jit
def _conversions(x_ptr, short_ptr, long_ptr, out_ptr, one, FINITE: tl.constexpr):
    """From every type of numbers to every other, and a scalar beside a block."""
    places = tl.arange(0, 16)
    x, short, long = tl.load(x_ptr + places), tl.load(short_ptr + places), tl.load(long_ptr + places)
    tl.store(out_ptr + places, x.to(tl.float16).to(tl.float32))
    tl.store(out_ptr + 16 + places, short.to(tl.float32))
    tl.store(out_ptr + 32 + places, x.to(tl.bfloat16).to(tl.float32))
    tl.store(out_ptr + 48 + places, (x.to(tl.float64) + short.to(tl.float64)).to(tl.float32))
    narrow, unsigned = long.to(tl.int32), long.to(tl.uint32)
    tl.store(out_ptr + 64 + places, narrow.to(tl.float32) + unsigned.to(tl.float32))
    tl.store(out_ptr + 80 + places, (unsigned.to(tl.int64) + narrow.to(tl.uint32)).to(tl.float32))
    tl.store(out_ptr + 96 + places, (narrow > one).to(tl.float32) + tl.where(narrow > one, one, narrow).to(tl.float32))
    if FINITE:
        tl.store(out_ptr + 112 + places, x.to(tl.int32).to(tl.int64).to(tl.float16).to(tl.float32))


def _of_conversions():
    outcomes = {}
    for dtype in (torch.bfloat16, torch.float16):
        for name, numbers in (("all", NUMBERS), ("normal", [max(min(n, 2.0), 1.0) for n in NUMBERS])):
            x, out = torch.tensor(numbers), torch.zeros(8 * 16)
            long = torch.arange(-8, 8) * (2**30 + 12345)
            with np.errstate(all="ignore"):
                _conversions[(1,)](x, x.to(dtype), long, out, 300, FINITE=name == "normal")
            outcomes[f"{name} {dtype}"] = out.view(torch.int32)
    return outcomes


OUTCOMES = {
    "operators": _of_operators,
    "conversions": _of_conversions,
    "half": lambda: _of_attention("segments", "alibi", "bias", "prefix-bias", "dropout", dtype=torch.float16),
    "single": lambda: _of_attention("window", "gaps", "softcap", "sinks", "own-prefixes", dtype=torch.float32),
    "one-query": lambda: _of_attention("cached", "left-padding", dtype=torch.float16, queries=1, keys=40, start=39),
    "lora": lambda: _of_lora("fp16-fp32"),
    "lora-bf16": lambda: _of_lora("bf16-fp32"),
}


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("outcome", OUTCOMES.values(), ids=OUTCOMES)
def test_the_faster_interpreter_computes_and_touches_the_same(outcome):
    with count_traffic() as traffic:
        got = outcome()
    with interpreter_speed.as_shipped(), count_traffic() as as_shipped:
        expected = outcome()
    assert got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in got)
    counts = (
        [(launch.kernel, launch.loads, launch.stores) for launch in each.launches] for each in (traffic, as_shipped)
    )
    first, second = counts
    assert first == second and first


def _of_source(directory, source):
    """What a kernel of this source leaves: a module of its own each time."""
    path = directory / f"of_{abs(hash(source))}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    out = torch.zeros(1)
    module._kernel[(1,)](out, 2)
    return out.item()


COPY = """import triton
import triton.language as tl

BASE = 1

@triton.jit
def _kernel(out_ptr, number, MORE: tl.constexpr = BASE + 4):
    tl.store(out_ptr, number * 10.0 + MORE)
"""


def test_a_changed_copy_of_a_kernel_is_not_taken_for_the_first(tmp_path):
    assert _of_source(tmp_path, COPY) == _of_source(tmp_path, COPY + "\n") == 25
    assert _of_source(tmp_path, COPY.replace("BASE = 1", "BASE = 2")) == 26
    assert _of_source(tmp_path, COPY.replace("10.0", "20.0")) == 45
    assert _of_source(tmp_path, COPY.replace("number * 10.0", "number + 10.0")) == 17


@triton.jit
def _sum_with(out_ptr, NUMBER: tl.constexpr, TYPE: tl.constexpr):
    tl.store(out_ptr, tl.arange(0, 1).to(TYPE) + NUMBER)


@pytest.mark.parametrize(
    ("number", "dtype", "words"),
    [
        (2**31, tl.int32, "2147483648 is out of range for type int32"),
        (-(2**31) - 1, tl.int32, "-2147483649 is out of range for type int32"),
        (2**32, tl.uint32, "4294967296 is out of range for type uint32"),
        (-1, tl.uint32, "unsigned tensor and a negative scalar"),
    ],
)
def test_the_faster_interpreter_refuses_the_numbers_that_the_shipped_one_refuses(number, dtype, words):
    for interpreted in (contextlib.nullcontext, interpreter_speed.as_shipped):
        with interpreted(), pytest.raises(Exception, match=words):
            _sum_with[(1,)](torch.zeros(1, dtype=torch.int64), NUMBER=number, TYPE=dtype)


def test_the_faster_interpreter_can_be_left_and_leaves_the_language_as_it_was():
    from triton.language import core
    from triton.runtime import interpreter as shipped

    def defined_in_triton():
        functions = shipped._patch_lang, core.tensor.__init__, core.block_type.__init__, core._unwrap_if_constexpr
        return [function.__module__.startswith("triton.") for function in functions]

    load = tl.load
    assert defined_in_triton() == [triton.__version__ != interpreter_speed.KNOWN] * 4
    with interpreter_speed.as_shipped():
        assert all(defined_in_triton())
    with interpreter.overflow_checks(), pytest.raises(Exception, match="int32 overflow"):
        _square[(1,)](torch.zeros(1, dtype=torch.int32), 50_000)
    assert tl.load is load


def test_uninitialised_memory_is_nan(poison):
    assert torch.empty(3, 3).isnan().all()


def _draws(change=lambda y: y, dtype=torch.bfloat16):
    """Truth, its eager form with two roundings, and a result with one, changed."""
    generator = torch.Generator().manual_seed(0)
    truth = [torch.randn(64, 64, dtype=torch.float64, generator=generator) for _ in range(2)]
    eager = [(t.to(dtype) + 1).sub_(1) for t in truth]
    got = [change(t.clone()).to(dtype) for t in truth]
    return got, eager, truth


def _last_row_off(y):
    y[-1] *= 0.5
    return y


def _one_element_off(y):
    y[5, 5] += 0.05
    return y


def _one_nan(y):
    y[5, 5] = float("nan")
    return y


def test_the_criterion_passes_a_correctly_rounded_result():
    assert oracle.compare("y", *_draws()).faults() == []


@pytest.mark.parametrize(
    ("change", "word"),
    [(lambda y: y * 0.99, "gain"), (_last_row_off, "row"), (_one_element_off, "peak"), (_one_nan, "NaN")],
)
def test_the_criterion_finds(change, word):
    faults = oracle.compare("y", *_draws(change)).faults()
    assert any(word in fault for fault in faults), faults


def test_the_criterion_finds_a_second_rounding():
    got, eager, truth = _draws()
    assert any("rms" in fault for fault in oracle.compare("y", eager, got, truth).faults())


def test_the_criterion_asks_an_exact_result_of_nothing_but_rounding():
    zero, half = torch.zeros(3, 3), torch.full((3, 3), 0.1)
    assert oracle.compare("y", [zero], [zero], [zero.double()]).faults() == []
    assert oracle.compare("y", [half], [half], [half.double()]).faults() == []
    assert oracle.compare("y", [zero + 1e-30], [zero], [zero.double()]).faults() != []


def test_the_criterion_refuses_shapes_and_dtypes_that_differ():
    with pytest.raises(ValueError, match="shapes"):
        oracle.compare("y", [torch.zeros(3)], [torch.zeros(3)], [torch.zeros(4, dtype=torch.float64)])
    with pytest.raises(ValueError, match="float16 against eager's torch.float32"):
        oracle.compare("y", [torch.zeros(3).half()], [torch.zeros(3)], [torch.zeros(3, dtype=torch.float64)])
