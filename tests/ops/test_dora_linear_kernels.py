"""The kernels of `dora_linear` move what they must and not a byte more, counted in the interpreter; and mistakes
planted in them are found."""

import importlib.util
import itertools
import sys
from pathlib import Path

import pytest
import torch
from triton.runtime.errors import InterpreterError

from fastpeft.kernels import dora_linear as kernels
from fastpeft.kernels._common import Dropout
from fastpeft.kernels._tiles import SMALL
from fastpeft.ops import _dora_linear_triton as path
from fastpeft.ops._lora_linear_triton import keep_mask
from tests.counting import count
from tests.planting import mutated
from tests.traffic import count_traffic

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poison")]

M, N, R = 37, 45, 20
STREAM = kernels.STREAM
DATA, ADAPTER = 2, 4  # bytes of an element


def blocks(length: int, block: int) -> int:
    return -(-length // block)


def half(*shape):
    return torch.randn(*shape).half()


@pytest.mark.parametrize("plain", [False, True], ids=["", "plain"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_combining_reads_and_writes_what_is_as_large_as_y_once(plain, bias):
    with count_traffic() as traffic:
        kernels.combine(
            half(M, N) if plain else None, half(N) if bias else None, half(M, N), torch.randn(N),
            torch.randn(M, R), torch.randn(N, R), 0.5,
        )  # fmt: skip
    rows, columns = blocks(M, SMALL.rows), blocks(N, SMALL.columns)
    loads = {"base_ptr": M * N * DATA, "gain_ptr": rows * N * 4, "bias_ptr": rows * N * DATA * bias}
    loads |= {"plain_ptr": M * N * DATA * plain, "p_ptr": columns * M * R * ADAPTER, "q_ptr": rows * N * R * ADAPTER}
    loads = {name: size for name, size in loads.items() if size}
    assert traffic.of("_dora_combine_kernel") == (loads, {"out_ptr": M * N * DATA})
    assert len(traffic.launches) == 1 and traffic.atomics == 0


@pytest.mark.parametrize("parts", [(True, True), (True, False), (False, True)], ids=["both", "out", "sum"])
@pytest.mark.parametrize("processors", [1, 13])
def test_the_gradients_pass_reads_dy_and_base_once(parts, processors, monkeypatch):
    monkeypatch.setattr(kernels, "processor_count", lambda tensor: processors)
    with count_traffic() as traffic:
        kernels.scaled_grad(half(M, N), half(M, N), torch.randn(N), *parts)
    columns = blocks(N, STREAM.columns)
    runs = kernels.split_evenly(M, STREAM.rows, max(1, 8 * processors // columns))[1]
    out, sums = parts
    loads = {"dy_ptr": M * N * DATA, "base_ptr": M * N * DATA * sums, "gain_ptr": runs * N * 4}
    stores = {"out_ptr": M * N * DATA * out, "sum_ptr": runs * N * 4 * sums}
    found = traffic.of("_dora_grad_kernel")
    assert found == tuple({name: size for name, size in each.items() if size} for each in (loads, stores))
    assert (
        traffic.kernels() == ["_dora_grad_kernel"] + ["_sum_partials_kernel"] * (sums and runs > 1)
        and traffic.atomics == 0
    )


@pytest.mark.parametrize("onto", [False, True], ids=["", "onto"])
def test_the_mask_is_read_from_nowhere(onto):
    with count_traffic() as traffic:
        kernels.drop(half(M, N), Dropout(torch.tensor([3]), 0.3), half(M, N) if onto else None)
    looks = blocks(M, STREAM.rows) * blocks(N, STREAM.columns)
    loads = {"x_ptr": M * N * DATA, "seed_ptr": looks * 8} | ({"out_ptr": M * N * DATA} if onto else {})
    assert traffic.of("_dora_drop_kernel") == (loads, {"out_ptr": M * N * DATA})


def test_forward_reads_the_base_s_result_once():
    """And writes y once: nothing else as large as it is between the products."""
    x, weight, bias = half(M, 64), half(N, 64), half(N)
    a, b, f = torch.randn(5, 64), torch.randn(N, 5), torch.rand(N)
    with count_traffic() as traffic:
        y, _, base = path.forward(x, weight, bias, a, b, f, 0.5, None, 0.0)
    assert traffic.loaded(base) == M * N * DATA and traffic.loaded(x) == M * 64 * DATA
    large = [each.stores.total() for each in traffic.launches if each.kernel.startswith("_dora")]
    assert large == [y.nbytes]


COMBINE = [
    ("_dora_combine_kernel", "last row", "m_m, m_n = rows < M", "m_m, m_n = rows < M - 1"),
    ("_dora_combine_kernel", "last column", "columns < N\n", "columns < N - 1\n"),
    ("_dora_combine_kernel", "first ranks alone", "ranks = r + tl.arange", "ranks = 0 * r + tl.arange"),
    ("_dora_combine_kernel", "last rank", "(ranks < R)[None, :]", "(ranks < R - 1)[None, :]"),
    ("_dora_combine_kernel", "scale left out", "acc *= scale", "acc *= 1.0"),
    ("_dora_combine_kernel", "gain left out", "gain[None, :] * tl.load", "tl.load"),
    ("_dora_combine_kernel", "gain of the first column", "gain_ptr + columns", "gain_ptr + columns * 0"),
    ("_dora_combine_kernel", "sign of the base", "acc += gain", "acc -= gain"),
    ("_dora_combine_kernel", "plain left out", "acc += tl.load(plain_ptr", "acc += 0.0 * tl.load(plain_ptr"),
    ("_dora_combine_kernel", "bias twice", "acc += tl.load(bias_ptr", "acc += 2 * tl.load(bias_ptr"),
    ("_dora_combine_kernel", "rank stride of B", "ranks[:, None] * stride_qr", "ranks[:, None]"),
    ("_dora_combine_kernel", "row stride of B", "columns[None, :] * stride_qn", "columns[None, :] * R"),
    ("combine", "last tile", "cdiv(columns, tiles.columns),), base,", "(columns // tiles.columns),), base,"),
]  # fmt: skip
GRAD = [
    ("_dora_grad_kernel", "last row", "(rows < M)", "(rows < M - 1)"),
    ("_dora_grad_kernel", "last column", "m_n = columns < N", "m_n = columns < N - 1"),
    ("_dora_grad_kernel", "rows of the first run", "row_run * rows_per_program + offset", "row_run * 0 + offset"),
    ("_dora_grad_kernel", "last block of rows", "range(0, rows_per_program,", "range(0, rows_per_program - BLOCK_M,"),
    ("_dora_grad_kernel", "first block of rows", "row_run * rows_per_program + offset", "row_run * rows_per_program"),
    ("_dora_grad_kernel", "gain left out", "gain[None, :] * dy, mask", "dy, mask"),
    ("_dora_grad_kernel", "gain of the first column", "gain_ptr + columns", "gain_ptr + columns * 0"),
    ("_dora_grad_kernel", "sum of G", "tl.sum(dy * tl.load", "tl.sum(gain[None, :] * dy * tl.load"),
    ("_dora_grad_kernel", "sum of the last block", "total += tl.sum", "total = tl.sum"),
    ("_dora_grad_kernel", "sums over one another", "row_run * N + columns", "columns"),
    ("_dora_grad_kernel", "row stride of dY", "rows[:, None] * stride_dm", "rows[:, None] * N"),
    ("_dora_grad_kernel", "column stride of dY", "columns[None, :] * stride_dn", "columns[None, :]"),
    ("scaled_grad", "last tile", "cdiv(columns, tiles.columns)\n    run", "columns // tiles.columns\n    run"),
]  # fmt: skip
DROP = [
    ("_dora_drop_kernel", "last row", "(rows < M)", "(rows < M - 1)"),
    ("_dora_drop_kernel", "last column", "(columns < K)", "(columns < K - 1)"),
    ("_dora_drop_kernel", "row stride", "rows[:, None] * stride_xm", "rows[:, None] * K"),
    ("_dora_drop_kernel", "column stride", "columns[None, :] * stride_xk", "columns[None, :]"),
    ("_dora_drop_kernel", "scale left out", "x * keep_scale", "x"),
    ("_dora_drop_kernel", "nothing dropped", "keep, x * keep_scale, 0.0", "keep, x * keep_scale, x * keep_scale"),
    ("_dora_drop_kernel", "the kept dropped", "keep, x * keep_scale, 0.0", "keep, 0.0, x * keep_scale"),
    ("_dora_drop_kernel", "one mask for all rows of tiles", "seed_ptr, row_start,", "seed_ptr, row_start * 0,"),
    ("_dora_drop_kernel", "one mask for columns of tiles", "column_start, threshold", "column_start * 0, threshold"),
    ("_dora_drop_kernel", "what is there is lost", "x += tl.load(p_out", "x += 0.0 * tl.load(p_out"),
    ("_dora_drop_kernel", "what is there twice", "x += tl.load(p_out", "x += 2.0 * tl.load(p_out"),
    ("drop", "last tile", "cdiv(columns, tiles.columns),), x,", "(columns // tiles.columns),), x,"),
]  # fmt: skip
MUTANTS = {"combine": COMBINE, "scaled_grad": GRAD, "drop": DROP}


def gappy(*shape):
    """With strides of its own."""
    return torch.randn(*shape[::-1], 2)[..., 0].t()


def combined(module):
    for plain, bias in itertools.product((None, torch.randn(M, N)), (None, torch.randn(N))):
        base, gain, s, b = torch.randn(M, N), torch.randn(N), torch.randn(M, R), gappy(N, R)
        expected = gain * base + 0.5 * s @ b.t() + (0 if plain is None else plain) + (0 if bias is None else bias)
        yield module.combine(plain, bias, base, gain, s, b, 0.5), expected


def scaled(module):
    dy, base, gain = gappy(M * 8, N), torch.randn(M * 8, N), torch.randn(N)
    out, total = module.scaled_grad(dy, base, gain, True, True)
    yield from ((out, gain * dy), (total, (dy * base).sum(0)))
    yield module.scaled_grad(dy, None, gain, True, False)[0], gain * dy
    yield module.scaled_grad(dy, base, gain, False, True)[1], (dy * base).sum(0)


def masked(module):
    x, dropout = gappy(M, N), Dropout(torch.tensor([5]), 0.3)
    keep = keep_mask(dropout.seed, 0.3, M, N, x.device) * dropout.keep_scale
    yield module.drop(x, dropout), x * keep
    yield module.drop(x, dropout, torch.ones(M, N)), x * keep + 1


RUNS = {"combine": combined, "scaled_grad": scaled, "drop": masked}


def first_fault(name: str, module) -> str | None:
    torch.manual_seed(0)
    try:
        with count_traffic():
            for found, expected in RUNS[name](module):
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    except (AssertionError, InterpreterError, RuntimeError) as fault:
        return f"{fault} {fault.__cause__}"
    return None


@pytest.mark.parametrize("name", MUTANTS)
def test_the_kernels_as_they_are_pass(name):
    assert first_fault(name, kernels) is None
    assert len({each[2:] for each in MUTANTS[name]}) == len(MUTANTS[name]) >= 12


@pytest.mark.parametrize(
    ("name", "mutant"), [(name, each) for name, rows in MUTANTS.items() for each in rows],
    ids=[f"{name}: {each[1]}" for name, rows in MUTANTS.items() for each in rows],
)  # fmt: skip
def test_a_mistake_is_found(name, mutant, tmp_path, monkeypatch):
    file = tmp_path / "fastpeft_mutant_dora.py"
    file.write_text(mutated(Path(kernels.__file__).read_text(), mutant[0], *mutant[2:]))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, file.stem, module)
    spec.loader.exec_module(module)
    assert first_fault(name, module) is not None
    count("planted faults caught")
