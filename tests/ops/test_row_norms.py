"""The row norms of DoRA: against float64, beside the form by blocks of rows; their bytes, and mistakes planted."""

import importlib.util
import itertools
import sys
from pathlib import Path

import pytest
import torch
from triton.runtime.errors import InterpreterError

from fastpeft.dispatch import backend
from fastpeft.errors import BackendError
from fastpeft.kernels import row_norms as kernels
from fastpeft.ops.row_norms import row_norms, row_norms_reference
from tests.counting import count
from tests.memory import Allocations
from tests.planting import mutated
from tests.traffic import count_traffic

BOTH = ["torch", pytest.param("triton", marks=pytest.mark.interpreter)]
DTYPES = {  # weight, adapter
    "fp32": (torch.float32, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "fp16-fp32": (torch.float16, torch.float32),
    "fp32-fp16": (torch.float32, torch.float16),
}
SHAPES = {
    "one": (1, 1, 1),
    "blocks": (32, 64, 16),
    "odd": (37, 45, 5),
    "narrow": (3, 150, 40),
    "deep rank": (20, 33, 70),
}
SCALE = 1.5


def problem(n, k, r, dtypes="fp32", left=1.0, seed=0):
    """(weight, A, B), with `left` of a weight left by the update, of numbers of about √r."""
    generator = torch.Generator().manual_seed(seed)
    a, b, rest = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((r, k), (n, r), (n, k)))
    data, adapter = DTYPES[dtypes]
    a, b = a.to(adapter), b.to(adapter)
    return (left * r**0.5 * rest - SCALE * b.double() @ a.double()).to(data), a, b


def error_of(found, weight, a, b) -> torch.Tensor:
    """Relative, of each row."""
    exact = row_norms_reference(weight.double(), a.double(), b.double(), SCALE)
    return ((found.double() - exact) / exact).abs()


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", BOTH)
def test_beside_float64(name, shape, dtypes):
    tensors = problem(*shape, dtypes)
    with backend(name):
        found = row_norms(*tensors, SCALE)
    assert found.dtype == torch.float32 and found.shape == (shape[0],) and not found.requires_grad
    assert error_of(found, *tensors).max() <= 1e-6


@pytest.mark.interpreter
@pytest.mark.parametrize("dtypes", ["fp32", "fp16-fp32"])
@pytest.mark.parametrize("left", [1.0, 1e-1, 1e-2, 1e-3])
def test_the_kernel_is_as_exact_as_blocks_of_rows_where_little_is_left(left, dtypes):
    """The mean square of the error over the rows of many problems is at most 1.1 times theirs. An expansion of the
    square is none such: it has lost its digits."""
    squares = {"kernel": [], "blocks": [], "expansion": []}
    for seed in range(16):
        tensors = problem(96, 64, 16, dtypes, left, seed)
        weight, a, b = (each.float() for each in tensors)
        crossed = 2 * SCALE * (weight @ a.t() * b).sum(1) + SCALE**2 * ((b @ (a @ a.t())) * b).sum(1)
        found = {"expansion": (weight.square().sum(1) + crossed).clamp(min=0).sqrt()}
        for name, served in (("blocks", "torch"), ("kernel", "triton")):
            with backend(served):
                found[name] = row_norms(*tensors, SCALE)
        for name, norms in found.items():
            squares[name].append(error_of(norms, *tensors).square())
    rms = {name: float(torch.cat(each).mean().sqrt()) for name, each in squares.items()}
    assert rms["kernel"] <= 1.1 * rms["blocks"], rms
    assert left > 1e-2 or rms["expansion"] > 20 * rms["blocks"], rms


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("which", [0, 1, 2], ids=["weight", "A", "B"])
def test_strides_are_any(name, which):
    tensors = list(problem(37, 45, 5))
    with backend(name):
        expected = row_norms(*tensors, SCALE)
        for layout in ("transposed", "gappy"):
            given, each = list(tensors), tensors[which]
            given[which] = each.t().contiguous().t() if layout == "transposed" else torch.stack((each, each), 2)[..., 0]
            assert given[which].stride() != each.stride()
            torch.testing.assert_close(row_norms(*given, SCALE), expected, rtol=1e-6, atol=0)


@pytest.mark.interpreter
def test_columns_split_over_programs(monkeypatch):
    tensors = problem(20, 200, 5)
    found = []
    for processors in (1, 2, 13):
        monkeypatch.setattr(kernels, "processor_count", lambda tensor, number=processors: number)
        with backend("triton"), count_traffic() as traffic:
            found.append(row_norms(*tensors, SCALE))
        assert len(traffic.launches) == 1
        assert error_of(found[-1], *tensors).max() <= 1e-6
    assert torch.allclose(found[0], found[2], rtol=1e-6)


def expected_bytes(n, k, r, sizes, tiles, processors):
    """(loads, stores) of the kernel: W once; A once for each block of rows; B once for each run of columns, or, where
    its ranks are taken in turn, for each block of columns; and the sums of each run."""
    of_w, of_a = sizes
    row_blocks = -(-n // tiles.rows)
    run, runs = kernels.split_evenly(k, tiles.columns, processors // max(1, row_blocks))
    columns = sum(-(-min(run, k - start) // tiles.columns) for start in range(0, k, run))
    turns = runs if r <= tiles.ranks else columns
    loads = {"w_ptr": n * k * of_w, "a_ptr": row_blocks * r * k * of_a, "b_ptr": turns * n * r * of_a}
    return loads, {"out_ptr": runs * n * 4}


@pytest.mark.interpreter
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtypes", ["fp32", "fp16", "fp16-fp32"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("processors", [1, 4])
def test_the_weight_is_read_once(shape, dtypes, processors, monkeypatch):
    monkeypatch.setattr(kernels, "processor_count", lambda tensor: processors)
    n, k, r = shape
    sizes = [dtype.itemsize for dtype in DTYPES[dtypes]]
    with backend("triton"), count_traffic() as traffic:
        row_norms(*problem(*shape, dtypes), SCALE)
    loads, stores = expected_bytes(n, k, r, sizes, kernels.SMALL, processors)
    assert traffic.atomics == 0
    assert traffic.of("_row_norms_kernel") == (loads, stores)


@pytest.mark.interpreter
def test_nothing_of_the_weight_s_size_is_allocated():
    tensors = problem(160, 320, 4)
    for name, most in (("triton", 160 * 4 * 2), ("torch", 160 * 320 * 4 // 4)):
        with backend(name), Allocations() as allocations:
            row_norms(*tensors, SCALE)
        assert 160 * 4 <= max(allocations.sizes) <= most, name


@pytest.mark.parametrize("name", BOTH)
def test_autocast_changes_nothing(name):
    tensors = problem(37, 45, 5)
    with backend(name):
        with torch.autocast("cpu", torch.bfloat16):
            inside = row_norms(*tensors, SCALE)
        assert torch.equal(inside, row_norms(*tensors, SCALE))


def test_float64_is_torch_s_and_triton_says_that_it_has_none():
    weight, a, b = (each.double() for each in problem(20, 30, 4))
    found = row_norms(weight, a, b, SCALE)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, row_norms_reference(weight, a, b, SCALE))
    with backend("triton"), pytest.raises(BackendError):
        row_norms(weight, a, b, SCALE)


@pytest.mark.parametrize("name", BOTH)
def test_nothing_is_remembered(name):
    """Edits that torch's version counters see, and those that they do not."""
    weight, a, b = problem(37, 45, 5)
    with backend(name):
        for edit in (weight.mul_, weight.data.mul_, a.data.mul_, b.detach().mul_):
            edit(1.5)
            assert error_of(row_norms(weight, a, b, SCALE), weight, a, b).max() <= 1e-6


@pytest.mark.parametrize("name", BOTH)
def test_values_that_are_none_come_through(name):
    weight, a, b = problem(37, 45, 5)
    weight[3, 7], b[5, 1] = float("inf"), float("nan")
    with backend(name):
        found = row_norms(weight, a, b, SCALE)
    assert found[3].isinf() and found[5].isnan() and found.isfinite().sum() == 35


@pytest.mark.parametrize("name", BOTH)
def test_compiled_it_is_one_node(name):
    tensors = problem(37, 45, 5)
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    with backend(name):
        expected = row_norms(*tensors, SCALE)
        found = torch.compile(lambda w, a, b: row_norms(w, a, b, SCALE), backend=keep, fullgraph=True)(*tensors)
    assert torch.equal(found, expected)
    assert [str(node.target) for node in graphs[0].graph.nodes].count("fastpeft.row_norms") == 1
    torch.library.opcheck(torch.ops.fastpeft.row_norms.default, (*tensors, SCALE, ""))


@pytest.mark.interpreter
def test_a_kernel_that_fails_is_answered_by_torch(monkeypatch):
    from triton.runtime.errors import OutOfResources

    from fastpeft import fallback
    from fastpeft.dispatch import Choice

    def fail(*given):
        raise OutOfResources(300_000, 232_448, "shared memory")

    tensors = problem(37, 45, 5)
    monkeypatch.setattr(kernels, "row_norms", fail)
    with backend("triton"), pytest.raises(BackendError, match="row_norms, forward, on cpu"):
        row_norms(*tensors, SCALE)
    module = sys.modules["fastpeft.ops.row_norms"]
    monkeypatch.setattr(module, "choose_backend", lambda *given, **more: Choice("triton", "as on a GPU"))
    try:
        with pytest.warns(RuntimeWarning, match="row_norms, forward, on cpu"):
            found = row_norms(*tensors, SCALE)
    finally:
        fallback._failed.clear()
    assert torch.equal(found, module.row_norms_torch(*tensors, SCALE))


MUTANTS = [
    ("_row_norms_kernel", "last row", "m_n = rows < N", "m_n = rows < N - 1"),
    ("_row_norms_kernel", "last column", "m_k = inner < K - k", "m_k = inner < K - k - 1"),
    ("_row_norms_kernel", "columns of the first run", "inner = first +", "inner = 0 * first +"),
    ("_row_norms_kernel", "last rank of one block", "m_r = ranks < R\n", "m_r = ranks < R - 1\n"),
    ("_row_norms_kernel", "last rank of several", "m_rest = ranks < R - r", "m_rest = ranks < R - r - 1"),
    ("_row_norms_kernel", "first ranks alone", "(r + ranks)[:, None] * stride_ar", "ranks[:, None] * stride_ar"),
    ("_row_norms_kernel", "first ranks of B alone", "(r + ranks)[None, :] * stride_br", "ranks[None, :] * stride_br"),
    ("_row_norms_kernel", "scale left out", "+ scale * update", "+ update"),
    ("_row_norms_kernel", "sign of the update", "+ scale * update", "- scale * update"),
    ("_row_norms_kernel", "no update", "+ scale * update", "+ 0.0 * update"),
    ("_row_norms_kernel", "fp16 tiles", "v = w.to(tl.float32)", "v = w.to(tl.float16).to(tl.float32)"),
    ("_row_norms_kernel", "sum in place of squares", "tl.sum(v * v, axis=1)", "tl.sum(v, axis=1)"),
    ("_row_norms_kernel", "last block alone", "acc += tl.sum", "acc = tl.sum"),
    ("_row_norms_kernel", "W not stepped on", "p_w += BLOCK_K * stride_wk", "p_w += 0 * stride_wk"),
    ("_row_norms_kernel", "A not stepped on", "p_a += BLOCK_K * stride_ak", "p_a += 0 * stride_ak"),
    ("_row_norms_kernel", "row stride of W", "rows[:, None] * stride_wn", "rows[:, None] * K"),
    ("_row_norms_kernel", "column stride of A", "inner[None, :] * stride_ak", "inner[None, :]"),
    ("_row_norms_kernel", "row stride of B", "rows[:, None] * stride_bn", "rows[:, None] * R"),
    ("_row_norms_kernel", "square in place of the root", "else tl.sqrt_rn(acc)", "else acc"),
    ("_row_norms_kernel", "root of a part", "acc if SPLIT else", "tl.sqrt_rn(acc) if SPLIT else"),
    ("_row_norms_kernel", "runs over one another", "depth_run * N + rows", "rows"),
    ("row_norms", "last rows", "cdiv(rows, tiles.rows)", "rows // tiles.rows"),
    ("row_norms", "last run", "out[0] if runs == 1 else", "out[0].sqrt() if runs > 1 else out[0] if runs == 1 else"),
    ("row_norms", "one block of ranks", "rank <= block", "True"),
]  # fmt: skip


def first_fault(op) -> str | None:
    """What is wrong with it, in words; a lane that would leave its tensor is stopped before it does."""
    shapes = [(37, 45, 5), (3, 150, 40), (20, 33, 16), (40, 100, 20)]
    for shape, dtypes, gappy in itertools.product(shapes, ("fp32", "fp16-fp32"), (False, True)):
        tensors = problem(*shape, dtypes, left=0.3)
        if gappy:
            tensors = [torch.stack((each, each * 2), 2)[..., 0] for each in tensors]
        try:
            with count_traffic():
                found = op(*tensors, SCALE)
        except (InterpreterError, RuntimeError) as fault:
            return f"{fault} {fault.__cause__}"
        if not error_of(found, *tensors).max() <= 2e-6:
            return f"{shape} {dtypes}: {error_of(found, *tensors).max()}"
    return None


@pytest.mark.interpreter
@pytest.mark.usefixtures("poison")
def test_the_kernel_as_it_is_passes():
    assert first_fault(kernels.row_norms) is None


@pytest.mark.interpreter
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant[1])
def test_a_mistake_is_found(mutant, tmp_path, monkeypatch):
    path = tmp_path / "fastpeft_mutant_norms.py"
    path.write_text(mutated(Path(kernels.__file__).read_text(), mutant[0], *mutant[2:]))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)
    spec.loader.exec_module(module)
    assert first_fault(module.row_norms) is not None
    count("planted faults caught")
